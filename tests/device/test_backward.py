"""Gradients of every case of the list, against the formula in fp64 by the rule of
tests/accuracy.py."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch", reason="the device tests need torch")
anyflash = pytest.importorskip("anyflash", reason="anyflash is not installed")

from accuracy import gradient_formula, worst_gradient_violation
from case_list import case_of, load_cases
from case_tensors import prepare_backward
from random_cases import random_line

ON_GPU = os.environ.get("ANYFLASH_TEST_DEVICE", "cuda") == "cuda"
CASES = {case.name: case for case in load_cases("device" if ON_GPU else "everywhere")}
DTYPES = ["float16", "bfloat16"] + ([] if ON_GPU else ["float32"])
FEW = ["causal", "gqa 3", "window softcap alibi", "packed seqused short gqa", "odd strides"]


@pytest.fixture(autouse=True)
def _supported(device):
    """Skips where the device has no backward yet, with the library's own words."""
    x = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16, device=device)
    o, lse = anyflash.attention(x, x, x, return_lse=True)
    try:
        anyflash.attention_backward(x, x, x, x, o, lse)
    except NotImplementedError as error:
        if not ON_GPU:
            raise
        pytest.skip(f"no backward on this GPU: {error}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_case(name, dtype, device):
    call = prepare_backward(CASES[name], dtype, device)
    result = call.run(anyflash)
    assert worst_gradient_violation(result, call.forward.inputs, call.cotangents, dtype) is None
    assert call.untouched(), "memory around a gradient was written"


@pytest.mark.parametrize("seed", range(200 if ON_GPU else 20))
def test_random_case(seed, device, monkeypatch):
    dtype = DTYPES[seed % len(DTYPES)]
    if seed % 3 == 1:
        monkeypatch.setenv("ANYFLASH_FREE_ORDER", "1")
    call = prepare_backward(case_of(random_line(seed)), dtype, device)
    result = call.run(anyflash, deterministic=seed % 3 == 0)
    assert worst_gradient_violation(result, call.forward.inputs, call.cotangents, dtype) is None
    assert call.untouched(), "memory around a gradient was written"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FEW)
def test_without_the_gradient_of_lse(name, dtype, device):
    call = prepare_backward(CASES[name], dtype, device, with_lse=False)
    result = call.run(anyflash)
    assert worst_gradient_violation(result, call.forward.inputs, call.cotangents, dtype) is None


@pytest.mark.parametrize("name", CASES)
def test_same_bits_from_run_to_run(name, device):
    call = prepare_backward(CASES[name], "bfloat16", device)
    first = [x.clone() for x in vars(call.run(anyflash, deterministic=True)).values()]
    call.poison()
    again = vars(call.run(anyflash, deterministic=True)).values()
    for a, b in zip(first, again):
        assert torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize("name", ["causal", "packed seqused", "d 192 dv 128 causal", "odd strides"])
def test_own_gradients_are_those_of_given_ones(name, device):
    call = prepare_backward(CASES[name], "bfloat16", device)
    given = vars(call.run(anyflash, deterministic=True))
    arguments = call.arguments(anyflash.attention, anyflash.attention_varlen)
    own = anyflash.attention_backward(**arguments, deterministic=True)
    dk = call.gradients["dk"].view
    _, mine, _ = anyflash.attention_backward(**arguments, dk=dk, deterministic=True)
    assert mine is dk
    rows = slice(0, -3) if CASES[name].packed is not None else slice(None)
    for x, y, like in zip(own, given.values(), "qkv"):
        tensor = getattr(call.forward, like)
        assert (x.dtype, x.device, x.shape) == (tensor.dtype, tensor.device, tensor.shape)
        assert torch.equal(x[rows], y[rows])


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (40, 0), "softcap": 20.0}])
def test_batch_and_packed_agree_bit_for_bit(options, device):
    torch.manual_seed(0)
    batch, n, heads, heads_k, d = 3, 256, 4, 2, 64
    q, dout = torch.randn(2, batch, n, heads, d, device=device, dtype=torch.bfloat16)
    k, v = torch.randn(2, batch, n, heads_k, d, device=device, dtype=q.dtype)
    o, lse = anyflash.attention(q, k, v, return_lse=True, **options)
    lengths = torch.arange(0, (batch + 1) * n, n, dtype=torch.int32, device=device)
    packed = [x.flatten(0, 1) for x in (dout, q, k, v, o)]
    packed_lse = lse.transpose(0, 1).flatten(1)
    options["deterministic"] = True
    dense = anyflash.attention_backward(dout, q, k, v, o, lse, **options)
    results = anyflash.attention_backward(
        *packed, packed_lse.contiguous(), lengths, lengths, n, n, **options
    )
    for x, y in zip(dense, results):
        assert torch.equal(y.unflatten(0, (batch, n)), x)


@pytest.mark.parametrize("name", FEW + ["no keys", "no queries", "scale negative"])
def test_library_reference_is_the_formula(name):
    call = prepare_backward(CASES[name], "float32", "cpu")
    tensors = (call.dout, call.forward.q, call.forward.k, call.forward.v)
    results = anyflash.reference_backward(
        *(x.double() for x in tensors), dlse=call.dlse, **call.forward.options
    )
    expected = gradient_formula(call.forward.inputs, call.cotangents)
    rows = slice(0, -3) if CASES[name].packed is not None else slice(None)
    for x, y in zip(results, vars(expected).values()):
        torch.testing.assert_close(x[rows], y[rows], rtol=1e-7, atol=1e-7)
