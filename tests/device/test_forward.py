"""Every case of the list, against the formula in fp64 by the rule of tests/accuracy.py."""

from __future__ import annotations

import os

import pytest

torch = pytest.importorskip("torch", reason="the device tests need torch")
anyflash = pytest.importorskip("anyflash", reason="anyflash is not installed")

from accuracy import formula, worst_violation
from case_list import case_of, load_cases
from case_tensors import prepare
from random_cases import random_line

ON_GPU = os.environ.get("ANYFLASH_TEST_DEVICE", "cuda") == "cuda"
CASES = {case.name: case for case in load_cases("device" if ON_GPU else "everywhere")}
DTYPES = ["float16", "bfloat16"] + ([] if ON_GPU else ["float32"])


def run(call):
    return call.run(anyflash.attention, anyflash.attention_varlen)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_case(name, dtype, device):
    call = prepare(CASES[name], dtype, device)
    result = run(call)
    assert worst_violation(result, call.inputs, dtype) is None
    assert call.untouched(), "memory around the output was written"


@pytest.mark.parametrize("seed", range(200 if ON_GPU else 20))
def test_random_case(seed, device):
    dtype = DTYPES[seed % len(DTYPES)]
    call = prepare(case_of(random_line(seed)), dtype, device)
    assert worst_violation(run(call), call.inputs, dtype) is None
    assert call.untouched(), "memory around the output was written"


@pytest.mark.parametrize("name", ["causal", "packed seqused", "d 192 dv 128 causal", "odd strides"])
def test_own_output_is_that_of_out(name, device):
    call = prepare(CASES[name], "bfloat16", device)
    expected = run(call)
    call.out.view.fill_(0)
    o = anyflash.attention if CASES[name].packed is None else anyflash.attention_varlen
    arguments = (call.q, call.k, call.v)
    options = dict(call.options)
    if CASES[name].packed is not None:
        arguments += tuple(
            options.pop(n) for n in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        )
    own = o(*arguments, **options)
    used = expected.o == expected.o
    assert own.dtype == call.q.dtype
    assert own.device == call.q.device
    assert own.shape == torch.Size(CASES[name].shape_o)
    rows = slice(0, -3) if CASES[name].packed is not None else slice(None)
    assert bool((used == used)[rows].all())
    run(call)
    assert torch.equal(own[rows], call.out.view[rows])


@pytest.mark.parametrize("name", CASES)
def test_same_bits_from_run_to_run(name, device):
    call = prepare(CASES[name], "bfloat16", device)
    first = run(call)
    o, lse = first.o.clone(), first.lse.clone()
    for _ in range(3):
        call.out.storage.fill_(float("nan"))
        again = run(call)
        assert torch.equal(again.o.view(torch.int16), o.view(torch.int16))
        assert torch.equal(again.lse.view(torch.int32), lse.view(torch.int32))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_nan_and_overflow_show_in_their_rows_alone(d, bad, device):
    """Who trains in 16 bit looks for them: a loss scaler, for one."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 150, 2, d, device=device, dtype=torch.bfloat16)
    q[0, 33, 0, 1] = bad
    q.requires_grad_()
    o, lse = anyflash.attention(q, k, v, return_lse=True)
    (dq,) = torch.autograd.grad(o.float().sum(), q)
    ill = torch.zeros(150, 2, dtype=torch.bool, device=device)
    ill[33, 0] = True
    assert torch.equal(o[0].isnan().any(-1), ill)
    assert torch.equal(lse[0].isnan().T, ill)
    assert torch.equal(dq[0].isnan().any(-1), ill)


@pytest.mark.parametrize("name", ["plain", "mqa", "softcap", "large values", "d 256"])
def test_order_of_keys_does_not_matter(name, device):
    call = prepare(CASES[name], "float16", device)
    order = torch.randperm(CASES[name].k, generator=torch.Generator().manual_seed(1)).to(device)
    call.k, call.v = call.k[:, order], call.v[:, order]
    assert worst_violation(run(call), call.inputs, "float16") is None


@pytest.mark.parametrize("d", [64, 128])
def test_keys_split_in_two_merge_by_their_lse(d, device):
    torch.manual_seed(0)
    shapes = ((2, 100, 4, d), (2, 300, 2, d), (2, 300, 2, d))
    q, k, v = (torch.randn(s, device=device, dtype=torch.bfloat16) for s in shapes)
    whole, whole_lse = anyflash.attention(q, k, v, return_lse=True)
    parts = [
        anyflash.attention(q, k[:, part], v[:, part], return_lse=True)
        for part in (slice(0, 131), slice(131, 300))
    ]
    lse = torch.stack([part_lse for _, part_lse in parts])
    weights = torch.softmax(lse, 0).transpose(2, 3)[..., None]
    merged = sum(w * o.float() for w, (o, _) in zip(weights, parts))
    torch.testing.assert_close(torch.logsumexp(lse, 0), whole_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(merged, whole.float(), rtol=2e-2, atol=4e-3)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (40, 0), "softcap": 20.0}])
def test_batch_and_packed_agree_bit_for_bit(options, device):
    torch.manual_seed(0)
    batch, n, heads, heads_k, d = 3, 256, 4, 2, 64
    q = torch.randn(batch, n, heads, d, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(batch, n, heads_k, d, device=device, dtype=q.dtype) for _ in range(2))
    lengths = torch.arange(0, (batch + 1) * n, n, dtype=torch.int32, device=device)
    dense, dense_lse = anyflash.attention(q, k, v, return_lse=True, **options)
    packed, packed_lse = anyflash.attention_varlen(
        *(x.flatten(0, 1) for x in (q, k, v)), lengths, lengths, n, n, return_lse=True, **options
    )
    assert torch.equal(packed.unflatten(0, (batch, n)), dense)
    assert torch.equal(packed_lse.unflatten(1, (batch, n)).transpose(0, 1), dense_lse)


@pytest.mark.parametrize("name", ["causal", "gqa causal softcap", "no keys"])
def test_library_reference_is_the_formula(name):
    call = prepare(CASES[name], "float32", "cpu")
    o, lse = anyflash.reference(
        *(x.double() for x in (call.q, call.k, call.v)), return_lse=True, **call.options
    )
    expected = formula(call.inputs)
    torch.testing.assert_close(o, expected.o, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(lse.double(), expected.lse, rtol=1e-6, atol=1e-6)
