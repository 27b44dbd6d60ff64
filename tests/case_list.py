"""The case list as NumPy arrays: every test that computes attention starts here."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CASES = Path(__file__).with_name("cases.json")

# Rows after the last packed sequence: no kernel may read or write them.
PACKED_TAIL = 3


@dataclass(frozen=True)
class Case:
    """One line of cases.json with its defaults filled in. Fields: tests/README.md."""

    name: str
    d: int
    dv: int
    heads: int
    heads_k: int
    batch: int
    q: int
    k: int
    packed: tuple[tuple[int, int], ...] | None
    seqused_q: tuple[int, ...] | None
    seqused_k: tuple[int, ...] | None
    causal: bool
    window: tuple[int | None, int | None]
    softcap: float
    scale: float
    alibi: str | None
    layout: str
    values: str
    where: str

    @property
    def shape_q(self) -> tuple[int, ...]:
        if self.packed is None:
            return (self.batch, self.q, self.heads, self.d)
        return (sum(n for n, _ in self.packed) + PACKED_TAIL, self.heads, self.d)

    @property
    def shape_k(self) -> tuple[int, ...]:
        if self.packed is None:
            return (self.batch, self.k, self.heads_k, self.d)
        return (sum(m for _, m in self.packed) + PACKED_TAIL, self.heads_k, self.d)

    @property
    def shape_v(self) -> tuple[int, ...]:
        return self.shape_k[:-1] + (self.dv,)

    @property
    def shape_o(self) -> tuple[int, ...]:
        return self.shape_q[:-1] + (self.dv,)


def load_cases(where: str = "everywhere") -> list[Case]:
    """The cases of the list that run `where`: "everywhere", or "device" (which runs all)."""
    cases = [case_of(line) for line in json.loads(CASES.read_text())]
    return [case for case in cases if where == "device" or case.where == "everywhere"]


def case_of(line: dict) -> Case:
    """A line of the list with its defaults filled in. Raises ValueError for unknown fields."""
    line = dict(line)
    packed = line.pop("packed", None)
    heads = line.pop("heads", 1)
    case = Case(
        name=line.pop("name"),
        dv=line.pop("dv", line["d"]),
        d=line.pop("d"),
        heads=heads,
        heads_k=line.pop("heads_k", heads),
        batch=len(packed) if packed else line.pop("batch", 1),
        q=max(n for n, _ in packed) if packed else line.pop("q"),
        k=max(m for _, m in packed) if packed else line.pop("k"),
        packed=tuple((n, m) for n, m in packed) if packed else None,
        seqused_q=_tuple_or_none(line.pop("seqused_q", None)),
        seqused_k=_tuple_or_none(line.pop("seqused_k", None)),
        causal=line.pop("causal", False),
        window=tuple(line.pop("window", (None, None))),
        softcap=float(line.pop("softcap", 0)),
        scale=line.pop("scale", None),
        alibi=line.pop("alibi", None),
        layout=line.pop("layout", "contiguous"),
        values=line.pop("values", "normal"),
        where=line.pop("where", "everywhere"),
    )
    if line:
        raise ValueError(f"case {case.name!r} has unknown fields: {sorted(line)}")
    if case.scale is None:
        object.__setattr__(case, "scale", 1 / math.sqrt(case.d))
    return case


def _tuple_or_none(values: list[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(values)


@dataclass
class Inputs:
    """A case's inputs: float32 arrays whose values the dtype under test holds exactly."""

    case: Case
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    alibi_slopes: np.ndarray | None
    cu_seqlens_q: np.ndarray | None
    cu_seqlens_k: np.ndarray | None
    seqused_q: np.ndarray | None
    seqused_k: np.ndarray | None


def make_inputs(case: Case, dtype: str) -> Inputs:
    """Reproducible inputs of a case, rounded to `dtype` ("float16", "bfloat16", "float32")."""
    random = np.random.default_rng(zlib.crc32(case.name.encode()))
    q, k, v = (
        round_to(_values(case, name, shape, random), dtype)
        for name, shape in (("q", case.shape_q), ("k", case.shape_k), ("v", case.shape_v))
    )
    if case.packed is not None:
        _poison_unused(case, q, k, v)
    if case.layout == "broadcast":
        k, v = np.repeat(k[:1], case.batch, axis=0), np.repeat(v[:1], case.batch, axis=0)
    slopes = None
    if case.alibi is not None:
        shape = (case.heads,) if case.alibi == "h" else (case.batch, case.heads)
        slopes = random.uniform(0.01, 0.5, shape).astype(np.float32)
    return Inputs(
        case,
        q,
        k,
        v,
        slopes,
        _cumulative(case, 0),
        _cumulative(case, 1),
        None if case.seqused_q is None else np.array(case.seqused_q, np.int32),
        None if case.seqused_k is None else np.array(case.seqused_k, np.int32),
    )


@dataclass
class Cotangents:
    """A loss's gradients by O and by L: float32 arrays, dout with values that the dtype holds."""

    dout: np.ndarray
    dlse: np.ndarray | None


def make_cotangents(case: Case, dtype: str, with_lse: bool = True) -> Cotangents:
    """Reproducible gradients, normal whatever the case's values; NaN in rows that are not used."""
    random = np.random.default_rng(zlib.crc32(f"gradients of {case.name}".encode()))
    dout = round_to(random.standard_normal(case.shape_o), dtype)
    heads, rows = case.heads, case.shape_q[-3]
    shape = (heads, rows) if case.packed else (case.batch, heads, rows)
    dlse = random.standard_normal(shape).astype(np.float32)
    if case.packed is not None:
        unused = _unused_rows([n for n, _ in case.packed], case.seqused_q)
        dout[unused], dlse[:, unused] = np.nan, np.nan
    return Cotangents(dout, dlse if with_lse else None)


def _values(
    case: Case, name: str, shape: tuple[int, ...], random: np.random.Generator
) -> np.ndarray:
    x = random.standard_normal(shape).astype(np.float32)
    if case.values == "large" and name != "v":
        x *= 30
    elif case.values == "constant":
        x[...] = 0.75
    elif case.values == "tiny":
        x *= 1e-39
    elif case.values == "rising" and name == "k":
        # Scores rise by a few log2 units a block, so that every step moves the row maximum.
        x += np.linspace(0, 4, shape[-3], dtype=np.float32)[:, None, None]
    elif case.values == "falling" and name == "k":
        # By some 30 nats from one block of 128 keys to the block in front of it: P = exp(S - m)
        # would be out of range by the m of a later block.
        x += np.linspace(16, 0, shape[-3], dtype=np.float32)[:, None, None]
    elif case.values in ("rising", "falling") and name == "q":
        x = np.abs(x)
    return x


def _poison_unused(case: Case, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    """NaN into the packed rows that belong to no sequence or lie past its used length."""
    assert case.packed is not None
    q[_unused_rows([n for n, _ in case.packed], case.seqused_q)] = np.nan
    unused = _unused_rows([m for _, m in case.packed], case.seqused_k)
    k[unused], v[unused] = np.nan, np.nan


def _unused_rows(lengths: list[int], used: tuple[int, ...] | None) -> np.ndarray:
    unused = np.ones(sum(lengths) + PACKED_TAIL, bool)
    for first, count in zip(np.cumsum([0] + lengths), used or lengths):
        unused[first : first + count] = False
    return unused


def _cumulative(case: Case, which: int) -> np.ndarray | None:
    if case.packed is None:
        return None
    lengths = [0] + [pair[which] for pair in case.packed]
    return np.cumsum(lengths, dtype=np.int32)


def round_to(x: np.ndarray, dtype: str) -> np.ndarray:
    """x rounded to the nearest value of `dtype`, kept in float32 (float64 stays as it is)."""
    if dtype == "float64":
        return x.astype(np.float64)
    x = x.astype(np.float32)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = x.view(np.uint32)
        rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) & np.uint32(0xFFFF0000)
        return np.where(np.isnan(x), x, rounded.view(np.float32))
    if dtype == "float32":
        return x
    raise ValueError(f"unknown dtype {dtype!r}")


def storage_of(shape: tuple[int, ...], layout: str) -> tuple[int, int, tuple[int, ...]]:
    """Elements, offset and strides of a tensor of this shape in this layout.

    shape is [batch, seqlen, heads, d] or [total, heads, d]. The strides count elements; the last
    one is 1. Between the elements of "gaps" and "odd" lies memory that belongs to nobody.
    """
    batch, seqlen, heads, d = (1,) + shape if len(shape) == 3 else shape
    offset, head, row = 0, d, heads * d
    per_batch = seqlen * row
    if layout == "transposed":
        head, row = seqlen * d, d
    elif layout == "gaps":
        offset = 8
        head = (d + 7) // 8 * 8 + 8
        row = heads * head + 16
        per_batch = seqlen * row + 8
    elif layout == "odd":
        offset = 1
        head = d + (2 if d % 2 else 1)
        row = heads * head + 3
        per_batch = seqlen * row + 5
    elif layout not in ("contiguous", "broadcast"):
        raise ValueError(f"unknown layout {layout!r}")
    if layout == "broadcast":
        strides = (0, row, head, 1)
        elements = per_batch
    else:
        strides = (per_batch, row, head, 1)
        elements = offset + batch * per_batch
    return elements + 8, offset, strides[1:] if len(shape) == 3 else strides
