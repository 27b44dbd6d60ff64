"""A few small problems through anyflash.attention on a device, against the reference in double.

The rule is the project's: the largest error is at most twice that of the standard computation in
the same dtype (three times with softcap, whose tanh may be approximate), plus twice the rounding
of the result itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import anyflash

Array = Any  # np.ndarray
ToDevice = Callable[
    [Array, str], Any
]  # (float32 array, dtype) -> tensor of that dtype on the device
ToHost = Callable[[Any], Array]  # tensor -> float32 array

# In float32 the standard computation differs from ours only in the order of its sums, and a good
# matrix product has a very good order: eight roundings of a value of 1 on top.
FLOAT32_FLOOR = 8 * 2.0**-23


@dataclass(frozen=True)
class Problem:
    """Sizes as in the documentation: n queries, m keys, heads of them over heads_k."""

    name: str
    n: int
    m: int
    heads: int
    heads_k: int
    d: int
    options: dict[str, Any] = field(default_factory=dict)
    alibi: bool = False


PROBLEMS = (
    Problem("full", 129, 200, 2, 2, 64),
    Problem("causal", 100, 165, 4, 2, 128, {"causal": True}),
    Problem("rows without a key", 70, 20, 2, 1, 32, {"causal": True}),
    Problem("window, softcap", 150, 150, 2, 2, 96, {"window": (40, 7), "softcap": 20.0}),
    Problem("ALiBi, odd head dim", 90, 90, 3, 3, 37, {"causal": True}, alibi=True),
)


@dataclass
class Outcome:
    """share: the largest error as a part of what the rule allows; error: what went wrong instead
    of a result."""

    problem: str
    dtype: str
    share: float | None = None
    error: str = ""

    @property
    def passed(self) -> bool:
        return self.share is not None and self.share <= 1


def run(dtypes: tuple[str, ...], to_device: ToDevice, to_host: ToHost) -> list[Outcome]:
    """Every problem in every dtype ("float32", "float16", "bfloat16") on one device."""
    return [_solve(problem, dtype, to_device, to_host) for problem in PROBLEMS for dtype in dtypes]


def _solve(problem: Problem, dtype: str, to_device: ToDevice, to_host: ToHost) -> Outcome:
    outcome = Outcome(problem.name, dtype)
    random = np.random.default_rng(7)
    shapes = [(1, problem.n, problem.heads)] + 2 * [(1, problem.m, problem.heads_k)]
    q, k, v = (rounded(random.standard_normal((*s, problem.d), np.float32), dtype) for s in shapes)
    options = dict(problem.options)
    slopes = np.geomspace(0.5, 0.01, problem.heads).astype(np.float32) if problem.alibi else None
    try:
        reference_slopes = {} if slopes is None else {"alibi_slopes": slopes}
        device_slopes = {} if slopes is None else {"alibi_slopes": to_device(slopes, "float32")}
        qd, kd, vd = (to_device(x, dtype) for x in (q, k, v))
        o = to_host(anyflash.attention(qd, kd, vd, **options, **device_slopes)).astype(np.float64)
        q64, k64, v64 = (x.astype(np.float64) for x in (q, k, v))
        expected = anyflash.reference(q64, k64, v64, **options, **reference_slopes)
    except Exception as error:  # a self-test reports whatever happens
        outcome.error = f"{type(error).__name__}: {error}"
        return outcome
    if not (np.isfinite(o).all() and o.shape == expected.shape):
        outcome.error = "the result has the wrong shape, or values that are not finite"
        return outcome
    standard = standard_attention(q, k, v, dtype, slopes, **options)
    rounding = np.abs(rounded((expected + 0.3).astype(np.float32), dtype) - 0.3 - expected).max()
    factor = 3 if options.get("softcap") else 2
    allowed = factor * np.abs(standard - expected).max() + 2 * rounding
    if dtype == "float32":
        allowed += FLOAT32_FLOOR
    outcome.share = float(np.abs(o - expected).max() / allowed)
    return outcome


def standard_attention(
    q: Array,
    k: Array,
    v: Array,
    dtype: str,
    slopes: Array | None,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
) -> Array:
    """softmax(Q K^T / sqrt(d)) V with every intermediate result rounded to the dtype."""
    n, m, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    qt, kt, vt = (
        x.transpose(0, 2, 1, 3) for x in (q, np.repeat(k, group, 2), np.repeat(v, group, 2))
    )
    s = rounded(qt @ kt.transpose(0, 1, 3, 2) * np.float32(q.shape[-1] ** -0.5), dtype)
    if softcap:
        s = rounded(softcap * np.tanh(s / np.float32(softcap)), dtype)
    offset = np.arange(m)[None, :] - np.arange(n)[:, None] - (m - n)  # j - (i + m - n)
    if slopes is not None:
        s = rounded(s - slopes[:, None, None] * np.abs(offset).astype(np.float32), dtype)
    left, right = window
    if causal:
        right = 0 if right is None else min(right, 0)
    seen = np.ones_like(offset, bool)
    seen &= offset >= -left if left is not None else True
    seen &= offset <= right if right is not None else True
    s = np.where(seen, s, -np.inf)
    top = s.max(-1, keepdims=True)
    p = np.exp(s - np.where(np.isfinite(top), top, 0))
    total = p.sum(-1, keepdims=True)
    p = rounded(p / np.where(total == 0, 1, total), dtype)
    return rounded((p @ vt).transpose(0, 2, 1, 3), dtype).astype(np.float64)


def rounded(x: Array, dtype: str) -> Array:
    """float32 values rounded to nearest even in the dtype."""
    x = np.ascontiguousarray(x, np.float32)
    if dtype == "float16":
        return x.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return x
