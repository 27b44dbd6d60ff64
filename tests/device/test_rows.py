"""Every row of the table, at its own head dims and just below: the tests that a new row gets by
being in the table."""

from __future__ import annotations

import json
import re

import pytest

torch = pytest.importorskip("torch", reason="the device tests need torch")
anyflash = pytest.importorskip("anyflash", reason="anyflash is not installed")

from accuracy import worst_violation
from anyflash import _library
from case_list import case_of
from case_tensors import prepare

NAME = re.compile(
    r"forward_\w+?_(?P<variant>[a-z]+)_(?P<dtype>fp16|bf16)_d(?P<d>\d+)_dv(?P<dv>\d+)_"
)
DTYPES = {"fp16": "float16", "bf16": "bfloat16"}
# What makes the plan take the variant; the first entry of each also runs packed.
OPTIONS = {
    "plain": [{"causal": True}, {}, {"window": [70, 9]}],
    "general": [{"softcap": 20, "causal": True}, {"alibi": "bh"}, {"layout": "odd"}],
}


def kernels():
    """(variant, dtype, d, dv) of every forward row, each once."""
    names = [row["name"] for row in json.loads(_library.rows_json())]
    found = {match.groups() for name in names if (match := NAME.match(name))}
    return sorted((v, t, int(d), int(dv)) for v, t, d, dv in found)


def test_there_are_rows():
    assert len(kernels()) >= 4


@pytest.mark.parametrize("kernel", kernels(), ids=lambda kernel: "-".join(map(str, kernel)))
def test_row(kernel, device):
    variant, dtype, d, dv = kernel
    heads = {"heads": 4, "heads_k": 2}
    dense = {**heads, "batch": 2, "q": 150, "k": 201}
    packed = {**heads, "packed": [[70, 133], [0, 5], [65, 0], [129, 257]]}
    lines = [{**dense, "d": d, "dv": dv, **options} for options in OPTIONS[variant]]
    lines += [{**packed, "d": d, "dv": dv, **OPTIONS[variant][0]}]
    lines += [{**dense, "d": d - 8, "dv": dv - 16, **OPTIONS[variant][0]}]
    for number, line in enumerate(lines):
        call = prepare(case_of({"name": f"{kernel} {number}", **line}), DTYPES[dtype], device)
        result = call.run(anyflash.attention, anyflash.attention_varlen)
        violation = worst_violation(result, call.inputs, DTYPES[dtype])
        assert violation is None, f"{line}: {violation}"
        assert call.untouched(), f"{line}: memory around the output was written"
