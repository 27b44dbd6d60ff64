"""Every row of the backward, at its own head dims and just below; what the GPU's kernels promise
beyond the case list."""

from __future__ import annotations

import json
import re

import pytest

torch = pytest.importorskip("torch", reason="the device tests need torch")
anyflash = pytest.importorskip("anyflash", reason="anyflash is not installed")

from accuracy import worst_gradient_violation
from anyflash import _library
from case_list import case_of
from case_tensors import prepare_backward

DTYPES = {"fp16": "float16", "bf16": "bfloat16"}
# What makes the plan take the variant; the first entry of each also runs packed.
OPTIONS = {
    "plain": [{"causal": True}, {}, {"window": [70, 9]}],
    "general": [{"softcap": 20, "causal": True}, {"alibi": "bh"}, {"layout": "odd"}],
}
NAME = re.compile(
    r"backward_\w+?_(?P<variant>[a-z]+)_(?P<dtype>fp16|bf16)_d(?P<d>\d+)_dv(?P<dv>\d+)_"
)


def kernels():
    """(variant, dtype, d, dv) of every row, each once."""
    names = [row["name"] for row in json.loads(_library.rows_json())]
    found = {match.groups() for name in names if (match := NAME.match(name))}
    return sorted((v, t, int(d), int(dv)) for v, t, d, dv in found)


def test_there_are_rows():
    assert len(kernels()) >= 4


@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: "-".join(map(str, kernel)))
def test_row(kernel, device, monkeypatch):
    monkeypatch.setenv("ANYFLASH_FREE_ORDER", "1")  # the plan takes turns where it is short
    variant, dtype, d, dv = kernel
    heads = {"heads": 4, "heads_k": 2}
    dense = {**heads, "batch": 2, "q": 150, "k": 201}
    packed = {**heads, "packed": [[70, 133], [0, 5], [65, 0], [129, 257]]}
    lines = [{**dense, "d": d, "dv": dv, **options} for options in OPTIONS[variant]]
    lines += [{**packed, "d": d, "dv": dv, **OPTIONS[variant][0]}]
    lines += [{**dense, "d": d - 8, "dv": dv - 16, **OPTIONS[variant][0]}]
    for number, line in enumerate(lines):
        case = case_of({"name": f"{kernel} {number}", **line})
        call = prepare_backward(case, DTYPES[dtype], device)
        for deterministic in (False, True):
            call.poison()
            result = call.run(anyflash, deterministic=deterministic)
            violation = worst_gradient_violation(
                result, call.forward.inputs, call.cotangents, DTYPES[dtype]
            )
            assert violation is None, f"{line}, deterministic {deterministic}: {violation}"
            assert call.untouched(), f"{line}: memory around a gradient was written"


@pytest.mark.gpu
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_many_blocks_add_to_one_dq_in_order(d, causal, device, monkeypatch):
    """Far more key blocks than run at a time, so that the order is put to the test."""
    monkeypatch.setenv("ANYFLASH_FREE_ORDER", "1")
    torch.manual_seed(0)
    q, dout = torch.randn(2, 2, 4096, 16, d, device=device, dtype=torch.bfloat16)
    k, v = torch.randn(2, 2, 4096, 4, d, device=device, dtype=torch.bfloat16)
    o, lse = anyflash.attention(q, k, v, causal=causal, return_lse=True)

    def gradients(deterministic):
        arguments = (dout, q, k, v, o, lse)
        return anyflash.attention_backward(*arguments, causal=causal, deterministic=deterministic)

    first, free = gradients(True), gradients(False)
    for _ in range(5):
        for x, y in zip(first, gradients(True)):
            assert torch.equal(x, y)
        for x, y in zip(free[1:], gradients(False)[1:]):  # dK and dV: always
            assert torch.equal(x, y)
    for x, y in zip(first[1:], free[1:]):
        assert torch.equal(x, y)
    torch.testing.assert_close(first[0], free[0], rtol=2e-2, atol=1e-3)
