"""The oracle of the tests agrees with the formula written out, and its rule can fail."""

from __future__ import annotations

import math

import numpy as np
import pytest
from accuracy import (
    Gradients,
    formula,
    gradient_formula,
    sequences,
    standard,
    standard_gradients,
    worst_gradient_violation,
    worst_violation,
)
from case_list import Cotangents, load_cases, make_cotangents, make_inputs, round_to

CASES = {case.name: case for case in load_cases()}
DTYPES = ["float16", "bfloat16", "float32"]


def written_out(inputs, b, i, h):
    """O and L of one row with nothing but loops and floats."""
    case = inputs.case
    sequence = list(sequences(case))[b]
    pick = (lambda x: x) if case.packed else (lambda x: x[b])
    row = [float(x) for x in pick(inputs.q)[sequence.q][i, h]]
    keys = pick(inputs.k)[sequence.k][: sequence.used_k, h // (case.heads // case.heads_k)]
    values = pick(inputs.v)[sequence.k][: sequence.used_k, h // (case.heads // case.heads_k)]
    diagonal = i + sequence.used_k - sequence.used_q
    scores = {}
    for j, key in enumerate(keys):
        s = case.scale * sum(a * float(c) for a, c in zip(row, key))
        if case.softcap:
            s = case.softcap * math.tanh(s / case.softcap)
        if inputs.alibi_slopes is not None:
            slopes = np.broadcast_to(inputs.alibi_slopes, (case.batch, case.heads))
            s -= float(slopes[b, h]) * abs(diagonal - j)
        left, right = case.window
        hidden = (
            (case.causal and j > diagonal)
            or (left is not None and j < diagonal - left)
            or (right is not None and j > diagonal + right)
        )
        if not hidden:
            scores[j] = s
    if not scores or i >= sequence.used_q:
        return np.zeros(case.dv), -math.inf
    m = max(scores.values())
    lse = m + math.log(sum(math.exp(s - m) for s in scores.values()))
    return sum(math.exp(s - lse) * values[j].astype(float) for j, s in scores.items()), lse


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_formula_is_the_formula_written_out(case):
    inputs = make_inputs(case, "float32")
    result = formula(inputs)
    for b, sequence in enumerate(sequences(case)):
        n = sequence.q.stop - sequence.q.start
        for i in sorted({0, n // 2, n - 1} & set(range(n))):
            o, lse = written_out(inputs, b, i, case.heads - 1)
            at = (sequence.q.start + i,) if case.packed else (b, i)
            at_lse = (case.heads - 1, at[0]) if case.packed else (b, case.heads - 1, i)
            np.testing.assert_allclose(result.o[at][case.heads - 1], o, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(result.lse[at_lse], lse, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["causal", "packed seqused", "softcap", "no keys", "large values"])
def test_rule_accepts_the_rounded_formula_and_the_standard_computation(name, dtype):
    inputs = make_inputs(CASES[name], dtype)
    exact = formula(inputs)
    exact.o = round_to(exact.o, dtype)
    exact.lse = exact.lse.astype(np.float32)
    assert worst_violation(exact, inputs, dtype) is None
    peer = standard(inputs, dtype)[0]
    peer.lse = exact.lse
    assert worst_violation(peer, inputs, dtype) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda r: r.o.__setitem__((0, 3, 1, 2), np.nan), "O[0, 3, 1, 2] is NaN"),
        (lambda r: r.o.__setitem__((0, 3, 1, 2), r.o[0, 3, 1, 2] + 0.1), "O[0, 3, 1, 2]"),
        (lambda r: r.lse.__setitem__((0, 1, 3), r.lse[0, 1, 3] + 1e-3), "L[0, 1, 3]"),
        (lambda r: r.lse.__setitem__((0, 1, 3), -np.inf), "L[0, 1, 3] is -inf"),
        (lambda r: r.o.__imul__(1.02), "O"),
    ],
)
def test_rule_rejects_what_is_wrong(dtype, spoil, complaint):
    inputs = make_inputs(CASES["plain"], dtype)
    result = formula(inputs)
    spoil(result)
    assert complaint in (worst_violation(result, inputs, dtype) or "")


def test_rule_rejects_a_write_past_the_last_sequence():
    inputs = make_inputs(CASES["packed"], "float32")
    result = formula(inputs)
    result.o[-1] = 0
    assert "NaN in the reference" in (worst_violation(result, inputs, "float32") or "")


@pytest.mark.parametrize("off", [1, -1])
def test_rule_notices_a_diagonal_that_is_off_by_one(off):
    case = CASES["causal"]
    inputs = make_inputs(case, "bfloat16")
    shifted = make_inputs(case, "bfloat16")
    object.__setattr__(shifted, "case", type(case)(**{**case.__dict__, "window": (None, off)}))
    object.__setattr__(shifted.case, "causal", False)
    assert worst_violation(formula(shifted), inputs, "bfloat16") is not None


def test_torch_and_numpy_agree():
    torch = pytest.importorskip("torch")
    inputs = make_inputs(CASES["window softcap alibi"], "bfloat16")
    expected = formula(inputs)
    for name in ("q", "k", "v"):
        setattr(inputs, name, torch.from_numpy(getattr(inputs, name)))
    result = formula(inputs)
    np.testing.assert_allclose(result.o.numpy(), expected.o, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(result.lse.numpy(), expected.lse, rtol=1e-12, atol=1e-14)
    result.o = result.o.to(torch.bfloat16)
    assert worst_violation(result, inputs, "bfloat16") is None


# Gradients

GRADIENT_CASES = ["d 7 causal", "gqa 3", "window softcap alibi", "packed seqused short gqa"]


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradient_formula_is_the_formula_differentiated(name):
    case = CASES[name]
    inputs, cotangents = make_inputs(case, "float32"), make_cotangents(case, "float32")
    random = np.random.default_rng(5)
    start = {n: getattr(inputs, n).astype(np.float64) for n in "qkv"}
    direction = {n: random.standard_normal(x.shape) for n, x in start.items()}

    def loss(step):
        for n, x in start.items():
            setattr(inputs, n, x + step * direction[n])
        result = formula(inputs)
        of_lse = np.where(np.isfinite(result.lse), cotangents.dlse * result.lse, 0)
        return np.nansum(cotangents.dout * result.o) + np.nansum(of_lse)

    step = 1e-4
    near, far = loss(step) - loss(-step), loss(2 * step) - loss(-2 * step)
    loss(0.0)
    gradients = vars(gradient_formula(inputs, cotangents)).values()
    along = sum(np.nansum(g * x) for g, x in zip(gradients, direction.values()))
    np.testing.assert_allclose(along, (8 * near - far) / (12 * step), rtol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["causal", "packed seqused", "softcap", "no keys", "large values"])
def test_gradient_rule_accepts_the_rounded_formula_and_the_standard_computation(name, dtype):
    inputs, cotangents = make_inputs(CASES[name], dtype), make_cotangents(CASES[name], dtype)
    exact = gradient_formula(inputs, cotangents)
    rounded = Gradients(*(round_to(x, dtype) for x in vars(exact).values()))
    for result in (rounded, standard_gradients(inputs, cotangents, dtype)[0]):
        assert worst_gradient_violation(result, inputs, cotangents, dtype) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda g: g.dq.__setitem__((0, 3, 1, 2), np.nan), "dQ[0, 3, 1, 2] is NaN"),
        (lambda g: g.dk.__setitem__((0, 3, 1, 2), g.dk[0, 3, 1, 2] + 0.1), "dK[0, 3, 1, 2]"),
        (lambda g: g.dv.__imul__(1.03), "dV"),
        (lambda g: g.dq.__imul__(0.97), "dQ"),
    ],
)
def test_gradient_rule_rejects_what_is_wrong(dtype, spoil, complaint):
    inputs, cotangents = make_inputs(CASES["plain"], dtype), make_cotangents(CASES["plain"], dtype)
    result = gradient_formula(inputs, cotangents)
    spoil(result)
    violation = worst_gradient_violation(result, inputs, cotangents, dtype) or ""
    assert complaint in violation


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_rule_notices_a_missing_gradient_of_lse(dtype):
    inputs, cotangents = make_inputs(CASES["plain"], dtype), make_cotangents(CASES["plain"], dtype)
    result = gradient_formula(inputs, Cotangents(cotangents.dout, None))
    assert worst_gradient_violation(result, inputs, cotangents, dtype) is not None
