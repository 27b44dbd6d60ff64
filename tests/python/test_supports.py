"""supports() and explain(): plans of every case on every GPU generation, without a GPU."""

from __future__ import annotations

import json

import anyflash
import numpy as np
import pytest
from anyflash import _library
from case_list import load_cases

GENERATIONS = [80, 86, 87, 89, 90, 100, 103, 120, 121]
SHARED_KIB = {
    80: 163,
    86: 99,
    87: 163,
    89: 99,
    90: 227,
    100: 227,
    103: 227,
    120: 99,
    121: 99,
}
CASES = {case.name: case for case in load_cases("device")}
X = (1, 8192, 16, 128)


def question(case, **target):
    """The arguments of `supports` for a case, as shapes."""
    arguments = {
        "q": case.shape_q,
        "k": case.shape_k,
        "v": case.shape_v,
        "causal": case.causal,
        "window": case.window,
        "scale": case.scale,
        "softcap": case.softcap,
        **target,
    }
    if case.alibi is not None:
        arguments["alibi_slopes"] = (case.heads,) if case.alibi == "h" else (case.batch, case.heads)
    if case.packed is not None:
        arguments["cu_seqlens_q"] = arguments["cu_seqlens_k"] = (case.batch + 1,)
        arguments.update(max_seqlen_q=case.q, max_seqlen_k=case.k)
        for name in ("seqused_q", "seqused_k"):
            if getattr(case, name) is not None:
                arguments[name] = (case.batch,)
    return arguments


def needs_general(case):
    """Restated from the table's own words: what the plain variant leaves out."""
    return (
        bool(case.softcap)
        or case.scale <= 0
        or case.alibi is not None
        or case.d % 8 != 0
        or case.dv % 8 != 0
    )


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("name", CASES)
def test_every_case_on_every_generation(name, generation):
    case = CASES[name]
    answer = anyflash.supports(**question(case, dtype="bfloat16", device=f"sm_{generation}"))
    rows = json.loads(_library.rows_json())
    served = max(row_bucket(row)[0] for row in rows)
    if max(case.d, case.dv) > served:
        assert not answer
        assert answer.reason.startswith("asked: forward of bfloat16 with head dims")
        return
    assert answer, answer.reason
    plan = answer.plan
    assert plan.device.compute_capability == generation
    assert plan.device.shared_bytes == SHARED_KIB[generation] * 1024
    if 0 in (case.batch, case.q, case.heads):
        assert plan.launch_count == 0
        return
    assert plan.launch_count == 1
    launch = plan.launches[0]
    blocks = -(-case.q // plan.Br) * case.heads * case.batch
    row = rows[launch.row]["name"]
    if "_sm90_" in row:  # thread blocks that stay
        blocks = min(blocks, plan.device.multiprocessors)
    assert tuple(launch.grid) == (blocks, 1, 1)
    assert launch.shared_bytes <= plan.device.shared_bytes
    assert launch.threads % 32 == 0
    assert ("general" if needs_general(case) else "plain") in row, row
    assert "bf16" in row


def row_bucket(row):
    """(d, dv) of a row."""
    words = row["name"].split("_")
    d = next(int(word[1:]) for word in words if word[0] == "d" and word[1:].isdecimal())
    dv = next(int(word[2:]) for word in words if word.startswith("dv"))
    return d, dv


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_every_case_on_the_cpu(name, dtype):
    answer = anyflash.supports(**question(CASES[name], dtype=dtype, device="cpu"))
    assert answer, answer.reason
    assert answer.reason == ""


def test_equal_questions_have_equal_plans():
    first = anyflash.supports(X, X, X, causal=True, dtype="float16", device="sm_90").plan
    second = anyflash.supports(X, X, X, window=(9000, 0), dtype="float16", device="sm_90").plan
    other = anyflash.supports(X, X, X, dtype="bfloat16", device="sm_90").plan
    assert bytes(first) == bytes(second)
    assert bytes(first) != bytes(other)


REFUSALS = [
    (
        {"dtype": "float32", "device": "sm_90"},
        "asked: forward of float32 on a GPU (sm_90); available: float16 and bfloat16 there, "
        "float32 on the CPU; missing: kernels for it: convert q, k, v or move them to the CPU",
    ),
    (
        {"dtype": "float64", "device": "cpu"},
        "asked: forward of float64; available: float32, float16, bfloat16 on the CPU; missing: a "
        "tiled algorithm in double (the reference takes float64)",
    ),
    (
        {"dtype": "bfloat16", "device": "sm_75"},
        "asked: a GPU of compute capability 7.5; available: 8.0 and newer; missing: kernels for "
        "older GPUs",
    ),
    (
        {
            "dtype": "bfloat16",
            "device": "sm_90",
            "q": (2**22, 64, 2**11, 128),
            "k": (2**22, 64, 1, 128),
            "v": (2**22, 64, 1, 128),
        },
        "asked: 1 query blocks x 2048 heads x batch 4194304; available: at most 2^31 - 1 blocks "
        "a launch; missing: a larger grid: split the batch",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS)
def test_refusals(changes, message):
    answer = anyflash.supports(**{"q": X, "k": X, "v": X, **changes})
    assert not answer
    assert answer.reason == message
    assert answer.plan is None
    with pytest.raises(NotImplementedError) as caught:
        anyflash.explain(**{"q": X, "k": X, "v": X, **changes})
    assert str(caught.value) == message


def test_questions_without_an_answer_are_errors():
    with pytest.raises(TypeError, match=r"^q is a shape; dtype= and device= must be given with it"):
        anyflash.supports(X, X, X)
    with pytest.raises(TypeError, match=r"^q is a shape; dtype= and device= must be given with it"):
        anyflash.explain(X, X, X, dtype="float16")
    with pytest.raises(ValueError, match="device is 'gpu'; it must be"):
        anyflash.supports(X, X, X, dtype="float16", device="gpu")
    with pytest.raises(TypeError, match="dtype is 'int8'; it must be float16"):
        anyflash.supports(X, X, X, dtype="int8", device="cpu")


def test_tensors_may_ask_about_another_device():
    q = np.zeros((1, 300, 4, 128), np.float16)
    here = anyflash.supports(q, q, q)
    there = anyflash.supports(q, q, q, device="sm_86")
    assert here.plan.device.type == 1
    assert there.plan.device.compute_capability == 86
    odd = np.zeros(1 + q.size, np.float16)[1:].reshape(q.shape)  # starts on 2 bytes
    assert "general" in anyflash.explain(odd, odd, odd, device="sm_86")
    assert "general" not in anyflash.explain(q, q, q, device="sm_86")


def test_dtypes_may_be_objects():
    assert anyflash.supports(X, X, X, dtype=np.float16, device="sm_80")
    assert anyflash.supports(X, X, X, dtype=np.dtype("float16"), device="sm_80")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    assert anyflash.supports(X, X, X, dtype=torch.bfloat16, device="sm_80")
    assert anyflash.supports(X, X, X, dtype=torch.float32, device=torch.device("cpu"))


def test_support_prints_and_compares():
    answer = anyflash.supports(X, X, X, dtype="float16", device="cpu")
    assert bool(answer) is True
    assert answer.supported is True
    assert "splits=1, launches=['row -1 grid" in repr(answer)
    refusal = anyflash.supports(X, X, X, dtype="float32", device="sm_90")
    assert "float32 on a GPU" in repr(refusal)


def test_explain_has_every_part():
    text = anyflash.explain(
        X,
        X,
        X,
        causal=True,
        softcap=30.0,
        return_lse=True,
        dtype="bfloat16",
        device="sm_90",
    )
    pairs = 16 * 8192 * 8193 // 2
    for part in (
        "forward, bfloat16, dense: batch 1, seqlen_q 8192, seqlen_k 8192, heads 16 over 16",
        "mask causal",
        "softcap 30",
        "sm_90, 132 multiprocessors, 227 KiB",
        "forward_sm90_general_bf16_d128_dv128",
        "general rather than plain: softcap",
        "bytes of shared memory each",
        "workspace  0 bytes",
        f"{pairs} visible pairs",
        "274.9 GFLOP",
        "on an H100 SXM",
    ):
        assert part in text, text
    floor = 4 * 128 * pairs / 989e12
    assert f"floor      {floor * 1e6:.3g} us" in text


def test_explain_counts_packed_sequences_on_the_cpu():
    q = np.zeros((5, 1, 8), np.float32)
    lengths = np.array([0, 2, 5], np.int32)
    text = anyflash.explain(q, q, q, lengths, lengths, 3, 3, causal=True)
    assert f"({3 + 6} visible pairs" in text
    text = anyflash.explain(
        q.astype(np.float16),
        *[q.astype(np.float16)] * 2,
        lengths,
        lengths,
        3,
        3,
        device="sm_90",
    )
    assert "at most" in text
