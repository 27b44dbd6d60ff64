"""Gradients of tensors of every library: what goes in comes out, by the rule on NumPy arrays."""

from __future__ import annotations

import anyflash
import numpy as np
import pytest
from accuracy import Gradients, worst_gradient_violation
from case_list import load_cases, make_cotangents, make_inputs
from foreign_tensors import BFLOAT, Foreign, bfloat16_bits

CASES = {case.name: case for case in load_cases()}
NAMES = [
    "gqa causal softcap",
    "packed with an empty sequence",
    "d 40 dv 24",
    "no keys",
    "no queries",
]

RANDOM = np.random.default_rng(4)
Q, K, V = (
    RANDOM.standard_normal((2, n, h, 32), np.float32) for n, h in ((17, 4), (19, 2), (19, 2))
)
DOUT = RANDOM.standard_normal(Q.shape, np.float32)
DLSE = RANDOM.standard_normal((2, 4, 17), np.float32)
OPTIONS = {"causal": True, "softcap": 20.0}
O, L = anyflash.reference(Q, K, V, return_lse=True, **OPTIONS)
EXPECTED = anyflash.reference_backward(DOUT, Q, K, V, dlse=DLSE, **OPTIONS)


def differentiate(convert=lambda x: x, **options):
    """dQ, dK, dV of the example above, its tensors converted."""
    tensors = [convert(x) for x in (DOUT, Q, K, V, O)]
    return anyflash.attention_backward(*tensors, L, dlse=DLSE, **OPTIONS, **options)


def check(gradients, tolerance=1e-4):
    for x, expected in zip(gradients, EXPECTED):
        np.testing.assert_allclose(
            np.asarray(x, np.float32), expected, rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_numpy_meets_the_rule(name, dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="NumPy has bfloat16 through ml_dtypes")
    case = CASES[name]
    inputs, cotangents = make_inputs(case, dtype), make_cotangents(case, dtype)
    q, k, v, dout = (x.astype(dtype) for x in (inputs.q, inputs.k, inputs.v, cotangents.dout))
    options = {"causal": case.causal, "window": case.window, "softcap": case.softcap}
    lengths = ()
    if case.packed is not None:
        lengths = (inputs.cu_seqlens_q, inputs.cu_seqlens_k, case.q, case.k)
    forward = anyflash.attention if case.packed is None else anyflash.attention_varlen
    o, lse = forward(q, k, v, *lengths, return_lse=True, **options)
    given = {f"d{n}": np.full(x.shape, np.nan, x.dtype) for n, x in zip("qkv", (q, k, v))}
    results = anyflash.attention_backward(
        dout, q, k, v, o, lse, *lengths, dlse=cotangents.dlse, **options, **given
    )
    assert all(x is y for x, y in zip(results, given.values()))
    widened = Gradients(*(np.asarray(x, np.float32) for x in results))
    assert worst_gradient_violation(widened, inputs, cotangents, dtype) is None


def test_numpy_gets_numpy():
    gradients = differentiate()
    assert [type(x) for x in gradients] == [np.ndarray] * 3
    assert [x.shape for x in gradients] == [Q.shape, K.shape, V.shape]
    check(gradients)


def test_inputs_may_be_read_only_and_strided():
    def convert(x):
        wide = np.zeros((*x.shape[:-1], 40), np.float32)
        wide[..., 3:35] = x
        wide.flags.writeable = False
        return wide[..., 3:35]

    check(differentiate(convert))


def test_some_gradients_given():
    dk = np.full(K.shape, np.nan, np.float32)
    dq, result, dv = differentiate(dk=dk)
    assert result is dk and dq is not dk and dv is not dk
    check((dq, dk, dv))


def test_without_the_gradient_of_lse():
    expected = anyflash.reference_backward(DOUT, Q, K, V, **OPTIONS)
    gradients = anyflash.attention_backward(DOUT, Q, K, V, O, L, **OPTIONS)
    for x, y in zip(gradients, expected):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
    zero = anyflash.attention_backward(DOUT, Q, K, V, O, L, dlse=np.zeros_like(L), **OPTIONS)
    assert all(x.tobytes() == y.tobytes() for x, y in zip(gradients, zero))


def test_torch():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensors = [torch.from_numpy(x) for x in (DOUT, Q, K, V, O, L)]
    gradients = anyflash.attention_backward(*tensors, dlse=torch.from_numpy(DLSE), **OPTIONS)
    assert all(type(x) is torch.Tensor for x in gradients)
    check(gradients)


@pytest.mark.parametrize("versioned", [False, True])
def test_foreign_tensors(versioned):
    gradients = differentiate(lambda x: Foreign(x, versioned=versioned))
    check([np.from_dlpack(x) for x in gradients])


def test_foreign_bfloat16():
    given = {f"d{n}": np.zeros(x.shape, np.uint16) for n, x in zip("qkv", (Q, K, V))}
    written = {name: Foreign(x, code=BFLOAT, bits=16) for name, x in given.items()}
    results = differentiate(lambda x: Foreign(bfloat16_bits(x), code=BFLOAT, bits=16), **written)
    assert all(x is y for x, y in zip(results, written.values()))
    widened = [(x.astype(np.uint32) << 16).view(np.float32) for x in given.values()]
    check(widened, 0.1)


@pytest.mark.parametrize("threads", ["1", "3", "16"])
def test_same_bits_for_any_number_of_threads(threads, monkeypatch):
    rows = RANDOM.standard_normal(
        (1, 300, 3, 40), np.float32
    )  # one key head: its queries are split
    keys = rows[:, :, :1]

    def gradients():
        o, lse = anyflash.attention(rows, keys, keys, return_lse=True)
        return anyflash.attention_backward(rows, rows, keys, keys, o, lse)

    expected = gradients()
    monkeypatch.setenv("ANYFLASH_NUM_THREADS", threads)
    assert all(x.tobytes() == y.tobytes() for x, y in zip(gradients(), expected))
