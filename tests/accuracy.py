"""What a result must meet: the formula in fp64, the standard computation, and the rule.

Works on NumPy arrays and on torch tensors (of any device), so that long cases can be checked on the
GPU that computed them. Nothing here calls the library: it is the oracle of the library's own
reference too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Callable

import numpy as np
from case_list import Case, Cotangents, Inputs, round_to

# In float32 the standard computation differs from ours only in the order of its sums, and a good
# matrix product has a very good order: eight roundings of a value of 1 on top.
FLOAT32_FLOOR = 8 * 2.0**-23
# Of rms errors: what lies under float32's own noise.
RMS_FLOOR = 1e-7


@dataclass
class Result:
    """o: [B, N, H, dv] or [total, H, dv]; lse: [B, H, N] or [H, total]. Rows outside every
    sequence hold NaN: nobody may write there."""

    o: Any
    lse: Any


@dataclass
class Gradients:
    """dq, dk, dv: shaped like q, k, v; rows outside every sequence hold NaN."""

    dq: Any
    dk: Any
    dv: Any


@dataclass
class Sequence:
    """One sequence of a problem: where its rows lie, and how many of them are used."""

    index: int
    q: slice
    k: slice
    used_q: int
    used_k: int


def sequences(case: Case) -> Iterator[Sequence]:
    first_q = first_k = 0
    for b, (n, m) in enumerate(case.packed or [(case.q, case.k)] * case.batch):
        used_q = n if case.seqused_q is None else case.seqused_q[b]
        used_k = m if case.seqused_k is None else case.seqused_k[b]
        yield Sequence(b, slice(first_q, first_q + n), slice(first_k, first_k + m), used_q, used_k)
        if case.packed is not None:
            first_q, first_k = first_q + n, first_k + m


def formula(inputs: Inputs) -> Result:
    """O and L of the problem in fp64."""
    return _attention(inputs, "float64", _same, scale_keys_first=False)


def gradient_formula(inputs: Inputs, cotangents: Cotangents) -> Gradients:
    """dQ, dK, dV in fp64."""
    return _gradients(inputs, cotangents, "float64", _same, scale_keys_first=False)


def standard(inputs: Inputs, dtype: str) -> list[Result]:
    """The standard computation in `dtype`: every matrix product and every step rounded to it.

    Two orders (the scale on the scores, or on the keys before the product): a result may be as far
    off as the worse one.
    """
    rounded = _rounding(dtype)
    return [_attention(inputs, "float32", rounded, first) for first in (False, True)]


def standard_gradients(inputs: Inputs, cotangents: Cotangents, dtype: str) -> list[Gradients]:
    """What automatic differentiation makes of `standard`: S, P, dP, dS rounded to `dtype`."""
    rounded = _rounding(dtype)
    return [_gradients(inputs, cotangents, "float32", rounded, first) for first in (False, True)]


def _rounding(dtype: str) -> Callable[[Any], Any]:
    def rounded(x: Any) -> Any:
        if _is_torch(x):
            return x.to(getattr(sys.modules["torch"], dtype)).to(x.dtype)
        return round_to(x, dtype)

    return rounded


def _same(x: Any) -> Any:
    return x


def _attention(
    inputs: Inputs, precision: str, rounded: Callable[[Any], Any], scale_keys_first: bool
) -> Result:
    case = inputs.case
    q, k, v = (_cast(x, precision) for x in (inputs.q, inputs.k, inputs.v))
    o = _full(case.shape_o, np.nan, q)
    lse_shape = (case.heads, case.shape_q[0]) if case.packed else (case.batch, case.heads, case.q)
    lse = _full(lse_shape, np.nan, q)
    for sequence in sequences(case):
        at = () if case.packed else (sequence.index,)
        rows, row_lse = _one_sequence(
            _heads_first(q[(*at, sequence.q)][: sequence.used_q]),
            _heads_first(k[(*at, sequence.k)][: sequence.used_k]),
            _heads_first(v[(*at, sequence.k)][: sequence.used_k]),
            case,
            _slopes(inputs, sequence.index, q),
            rounded,
            scale_keys_first,
        )
        out, out_lse = o[(*at, sequence.q)], lse[(*at, slice(None), sequence.q)]
        out[...] = 0
        out_lse[...] = -np.inf
        out[: sequence.used_q] = _heads_first(rows)
        out_lse[:, : sequence.used_q] = row_lse
    return Result(o, lse)


def _one_sequence(
    q: Any,
    k: Any,
    v: Any,
    case: Case,
    slopes: Any | None,
    rounded: Callable[[Any], Any],
    scale_keys_first: bool,
) -> tuple[Any, Any]:
    """q [H, N, d], k [Hk, M, d], v [Hk, M, dv], slopes [H, 1, 1] -> O [H, N, dv], L [H, N]."""
    n = q.shape[1]
    if k.shape[1] == 0:
        return _full((case.heads, n, case.dv), 0, q), _full((case.heads, n), -np.inf, q)
    p, lse, _ = _probabilities(q, k, case, slopes, rounded, scale_keys_first)
    return rounded(p @ _of_query_heads(v, case)), lse


def _of_query_heads(x: Any, case: Case) -> Any:
    """[Hk, ...] -> [H, ...]: what each query head reads."""
    return x[_arange(case.heads, x) // (case.heads // case.heads_k)]


def _of_key_heads(x: Any, case: Case) -> Any:
    """[H, ...] -> [Hk, ...]: sums over the query heads that share a key head."""
    return x.reshape(case.heads_k, case.heads // case.heads_k, *x.shape[1:]).sum(1)


def _probabilities(
    q: Any,
    k: Any,
    case: Case,
    slopes: Any | None,
    rounded: Callable[[Any], Any],
    scale_keys_first: bool,
) -> tuple[Any, Any, Any]:
    """P [H, N, M], L [H, N], and what the softcap multiplies gradients of S by. M > 0."""
    xp = _module(q)
    n, m = q.shape[1], k.shape[1]
    k = _of_query_heads(k, case)
    if scale_keys_first:
        s = rounded(q @ rounded(k * case.scale).swapaxes(1, 2))
    else:
        s = rounded(rounded(q @ k.swapaxes(1, 2)) * case.scale)
    derivative = None
    if case.softcap:
        t = xp.tanh(s / case.softcap)
        s, derivative = rounded(t * case.softcap), 1 - t * t
    i = _arange(n, q)[:, None] + m - n
    j = _arange(m, q)[None, :]
    if slopes is not None:
        s = rounded(s - slopes * _cast(abs(i - j), _precision(q)))
    left, right = case.window
    if case.causal:
        right = 0 if right is None else min(right, 0)
    visible = (j >= i - left) if left is not None else (j == j)
    if right is not None:
        visible = visible & (j <= i + right)
    s = xp.where(visible, s, _full((), -np.inf, q))
    largest = xp.amax(s, -1)
    empty = largest == -np.inf
    largest_or_zero = xp.where(empty, _full((), 0.0, q), largest)
    p = xp.exp(s - largest_or_zero[..., None])
    total = xp.where(empty, _full((), 1.0, q), p.sum(-1))
    lse = xp.where(empty, largest, largest_or_zero + xp.log(total))
    return rounded(p / total[..., None]), lse, derivative


def _gradients(
    inputs: Inputs,
    cotangents: Cotangents,
    precision: str,
    rounded: Callable[[Any], Any],
    scale_keys_first: bool,
) -> Gradients:
    case = inputs.case
    q, k, v, dout = (_cast(x, precision) for x in (inputs.q, inputs.k, inputs.v, cotangents.dout))
    dlse = None if cotangents.dlse is None else _cast(cotangents.dlse, precision)
    dq, dk, dv = (_full(tuple(x.shape), np.nan, q) for x in (q, k, v))
    for sequence in sequences(case):
        at = () if case.packed else (sequence.index,)
        rows, keys = slice(0, sequence.used_q), slice(0, sequence.used_k)
        for whole, of in ((dq, sequence.q), (dk, sequence.k), (dv, sequence.k)):
            whole[(*at, of)] = 0
        if sequence.used_q == 0 or sequence.used_k == 0:
            continue
        results = _gradients_of_one_sequence(
            *(_heads_first(x[(*at, sequence.q)][rows]) for x in (q, dout)),
            *(_heads_first(x[(*at, sequence.k)][keys]) for x in (k, v)),
            None if dlse is None else dlse[(*at, slice(None), sequence.q)][:, rows],
            case,
            _slopes(inputs, sequence.index, q),
            rounded,
            scale_keys_first,
        )
        for whole, of, used, x in zip(
            (dq, dk, dv), (sequence.q, sequence.k, sequence.k), (rows, keys, keys), results
        ):
            whole[(*at, of)][used] = _heads_first(x)
    return Gradients(dq, dk, dv)


def _gradients_of_one_sequence(
    q: Any,
    dout: Any,
    k: Any,
    v: Any,
    dlse: Any | None,
    case: Case,
    slopes: Any | None,
    rounded: Callable[[Any], Any],
    scale_keys_first: bool,
) -> tuple[Any, Any, Any]:
    """Shapes as in _one_sequence; dout [H, N, dv], dlse [H, N] -> dQ, dK, dV.

    dS = P (dP - rowsum(P dP) + dL), where dP = dO V^T.
    """
    p, _, derivative = _probabilities(q, k, case, slopes, rounded, scale_keys_first)
    k, v = _of_query_heads(k, case), _of_query_heads(v, case)
    dp = rounded(dout @ v.swapaxes(1, 2))
    change = dp - (p * dp).sum(-1)[..., None]
    if dlse is not None:
        change = change + dlse[..., None]
    ds = rounded(p * change)
    if derivative is not None:
        ds = rounded(ds * derivative)
    if scale_keys_first:
        dq = rounded(ds @ rounded(k * case.scale))
        dk = rounded(rounded(_of_key_heads(ds.swapaxes(1, 2) @ q, case)) * case.scale)
    else:
        ds = rounded(ds * case.scale)
        dq = rounded(ds @ k)
        dk = rounded(_of_key_heads(ds.swapaxes(1, 2) @ q, case))
    return dq, dk, rounded(_of_key_heads(p.swapaxes(1, 2) @ dout, case))


def _heads_first(x: Any) -> Any:
    """[N, H, d] -> [H, N, d], and back."""
    return x.swapaxes(0, 1)


def _slopes(inputs: Inputs, b: int, like: Any) -> Any | None:
    slopes = inputs.alibi_slopes
    if slopes is None:
        return None
    column = (slopes if slopes.ndim == 1 else slopes[b]).reshape(-1, 1, 1)
    if _is_torch(like) and not _is_torch(column):
        column = sys.modules["torch"].from_numpy(column).to(like.device)
    return _cast(column, _precision(like))


def worst_violation(result: Result, inputs: Inputs, dtype: str) -> str | None:
    """None if `result` meets the rule, else one line: which element, and by how much.

    O: |o - ref| <= factor * max |standard - ref| + the rounding of ref in dtype, and rms within
    1.25 times (float32: 2), and 1 + 1 / sqrt(n) times that over n rows; factor 2, with softcap 3
    (its tanh is approximate).
    L: 1e-5 max(1, |ref|) + 2^-20.
    NaN (rows that nobody may write) and infinities are in the same places.
    """
    reference = formula(inputs)
    peers = [peer.o for peer in standard(inputs, dtype)]
    floors = (FLOAT32_FLOOR, RMS_FLOOR)
    return (
        _places_differ("O", result.o, reference.o)
        or _places_differ("L", result.lse, reference.lse)
        or _violation("O", result.o, reference.o, peers, inputs.case, dtype, floors)
        or _lse_violation(result.lse, reference.lse, inputs)
    )


def worst_gradient_violation(
    result: Gradients, inputs: Inputs, cotangents: Cotangents, dtype: str
) -> str | None:
    """As `worst_violation`, for dQ, dK and dV alike; their floor is `_gradient_floors`."""
    reference = gradient_formula(inputs, cotangents)
    peers = standard_gradients(inputs, cotangents, dtype)
    lse = _magnitude(formula(inputs).lse)
    case = inputs.case
    dp = _magnitude(cotangents.dout) * _magnitude(inputs.v) * case.dv**0.5 * abs(case.scale)
    cancelling = {"dq": dp * _magnitude(inputs.k), "dk": dp * _magnitude(inputs.q), "dv": 0.0}
    for name, terms in cancelling.items():
        x, ref = getattr(result, name), getattr(reference, name)
        of_peers = [getattr(peer, name) for peer in peers]
        shown = f"d{name[1].upper()}"
        violation = _places_differ(shown, x, ref) or _violation(
            shown, x, ref, of_peers, case, dtype, _gradient_floors(ref, terms, lse)
        )
        if violation:
            return violation
    return None


def _gradient_floors(ref: Any, cancelling: float, lse: float) -> tuple[float, float]:
    """Floors in float32, of the largest error and of the rms error. The roundings of the gradient's
    own size (a sum over all rows or keys has no bound like O's); of dP and delta, which cancel (in
    the standard computation to the last bit where a row sees one key); and of L, which every P
    carries."""
    size = _magnitude(ref)
    unit = max(1.0, size)
    return (
        FLOAT32_FLOOR * unit + 2.0**-23 * (cancelling + lse * size),
        RMS_FLOOR * unit + 2.0**-26 * cancelling + 2.0**-24 * lse * _rms(ref[ref == ref]),
    )


def _magnitude(x: Any) -> float:
    """The largest absolute value, NaN and infinities left out."""
    x = abs(x)
    x = x[x < np.inf]
    return float(x.max()) if x.shape[0] else 0.0


def _places_differ(name: str, x: Any, ref: Any) -> str | None:
    for kind, of in (("NaN", lambda a: a != a), ("-inf", lambda a: a == -np.inf)):
        here, there = of(x), of(ref)
        if bool((here != there).any()):
            at = _first(here != there)
            where, other = ("result", "reference") if bool(here[at]) else ("reference", "result")
            return f"{name}{list(at)} is {kind} in the {where}, not in the {other}"
    return None


def _violation(
    name: str,
    x: Any,
    ref: Any,
    peers: list[Any],
    case: Case,
    dtype: str,
    floors: tuple[float, float],
) -> str | None:
    """The rule for one tensor; floors: of the largest error in float32, of the rms error."""
    finite = ref == ref
    if not bool(finite.any()):
        return None
    error = abs(_cast(x, "float64") - ref)
    error = _module(ref).where(finite, error, _full((), 0.0, ref))
    peer_errors = [abs(_cast(peer, "float64") - ref)[finite] for peer in peers]
    allowed_max = max(float(e.max()) for e in peer_errors)
    allowed_rms = max(_rms(e) for e in peer_errors)
    rounding = abs(_cast(_round_like(ref + 0.3, dtype), "float64") - (ref + 0.3))[finite]
    factor = 3 if case.softcap else 2
    limit = factor * allowed_max + 2 * float(rounding.max()) + (3e-4 if case.softcap else 0)
    if dtype == "float32":
        limit += floors[0]
    worst = float(error.max())
    if worst > limit:
        at = _first(error == error.max())
        return (
            f"{name}{list(at)} = {float(x[at])!r}, reference {float(ref[at])!r}: "
            f"error {worst:.3g}, allowed {limit:.3g}"
        )
    # The floor is one rounding of the output and of what lies under float32's own noise.
    rms_factor = (2 if dtype == "float32" else 1.25) * (1.5 if case.softcap else 1)
    # The columns of a row share their roundings; over few rows an rms of them scatters.
    rms_factor *= 1 + (ref.shape[-1] / float(finite.sum())) ** 0.5
    rms_limit = rms_factor * allowed_rms + _rms(rounding) + floors[1]
    if _rms(error[finite]) > rms_limit:
        return f"{name}: rms error {_rms(error[finite]):.3g}, allowed {rms_limit:.3g}"
    return None


def _lse_violation(lse: Any, ref: Any, inputs: Inputs) -> str | None:
    """|L - ref| <= 1e-5 max(1, |ref|, the largest |score| term) + 2^-20, where ref is finite."""
    case = inputs.case
    finite = (ref == ref) & (ref != -np.inf)
    if not bool(finite.any()):
        return None
    magnitude = _module(ref).where(abs(ref) > 1, abs(ref), _full((), 1.0, ref))
    limit = 1e-5 * magnitude + 2.0**-20 + (3e-4 * max(1.0, case.softcap) if case.softcap else 0)
    # Scores carry the rounding of their own size, also where they cancel in the sum.
    limit = limit + 2.0**-21 * _largest_score(inputs)
    zero = _full((), 0.0, ref)
    pick = _module(ref).where
    excess = abs(pick(finite, _cast(lse, "float64"), zero) - pick(finite, ref, zero)) - limit
    if float(excess[finite].max()) <= 0:
        return None
    at = _first(pick(finite, excess, -limit) == excess[finite].max())
    return f"L{list(at)} = {float(lse[at])!r}, reference {float(ref[at])!r}: off by too much"


def _largest_score(inputs: Inputs) -> float:
    """An upper bound of sum |q k| scale, from the largest values of a few rows."""
    q, k = inputs.q, inputs.k
    q, k = q[q == q], k[k == k]
    if q.shape[0] == 0 or k.shape[0] == 0:
        return 0.0
    largest = float(abs(q).max()) * float(abs(k).max())
    return largest * inputs.case.d**0.5 * abs(inputs.case.scale)


def _rms(x: Any) -> float:
    return float((x * x).mean()) ** 0.5 if x.shape[0] else 0.0


def _first(mask: Any) -> tuple[int, ...]:
    flat = int(np.argmax(_to_numpy(mask).reshape(-1)))
    return tuple(int(i) for i in np.unravel_index(flat, tuple(mask.shape)))


def _round_like(x: Any, dtype: str) -> Any:
    if _is_torch(x):
        return x.to(getattr(sys.modules["torch"], dtype))
    return round_to(x, dtype)


# The few places where NumPy and torch differ.


def _is_torch(x: Any) -> bool:
    return type(x).__module__.partition(".")[0] == "torch"


def _module(x: Any) -> Any:
    return sys.modules["torch"] if _is_torch(x) else np


def _precision(x: Any) -> str:
    return str(x.dtype).rpartition(".")[2]


def _cast(x: Any, precision: str) -> Any:
    return x.to(getattr(sys.modules["torch"], precision)) if _is_torch(x) else x.astype(precision)


def _full(shape: tuple[int, ...], value: float, like: Any) -> Any:
    if _is_torch(like):
        torch = sys.modules["torch"]
        return torch.full(shape, value, dtype=like.dtype, device=like.device)
    return np.full(shape, value, like.dtype)


def _arange(count: int, like: Any) -> Any:
    if _is_torch(like):
        return sys.modules["torch"].arange(count, device=like.device)
    return np.arange(count)


def _to_numpy(x: Any) -> np.ndarray:
    return x.cpu().numpy() if _is_torch(x) else x
