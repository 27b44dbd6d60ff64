"""supports() and explain(): plans of every case on every GPU generation, without a GPU."""

from __future__ import annotations

import json

import anyflash
import numpy as np
import pytest
from anyflash import _call, _library
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
    blocks_of_head = -(-case.q // plan.Br)
    blocks = blocks_of_head * case.heads * case.batch
    row = rows[launch.row]["name"]
    if "_sm90_" in row:
        blocks = staying_blocks(blocks, blocks_of_head, plan.device.multiprocessors)
    assert tuple(launch.grid) == (blocks, 1, 1)
    assert launch.shared_bytes <= plan.device.shared_bytes
    assert launch.threads % 32 == 0
    assert ("general" if needs_general(case) else "plain") in row, row
    assert "bf16" in row


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("name", CASES)
def test_the_backward_of_every_case_on_every_generation(name, generation):
    case = CASES[name]
    target = {"dtype": "float16", "device": f"sm_{generation}"}
    answer = anyflash.supports(**question(case, **target), backward=True)
    rows = json.loads(_library.rows_json())
    if max(case.d, case.dv) > max(row_bucket(row)[0] for row in rows):
        assert answer.reason.startswith("asked: backward of float16 with head dims")
        return
    if case.heads == 0 and case.batch and case.k and case.heads_k:
        assert "without a query head" in answer.reason
        return
    assert answer, answer.reason
    plan = answer.plan
    assert plan.op == _library.BACKWARD
    if case.batch == 0 or not (case.q and case.heads or case.k):
        assert plan.launch_count == 0
        return
    launches = plan.launches[: plan.launch_count]
    names = {rows[launch.row]["name"] for launch in launches}
    assert len(names) == 1
    (row,) = names
    # Before, the products, after. Where queries see few keys, Hopper's kernel does what is after.
    keys = sum(k for _, k in case.packed) / len(case.packed) if case.packed else case.k
    finishes = "_sm90_plain_" in row and keys < 4096
    assert [launch.entry for launch in launches] == ([1, 0] if finishes else [1, 0, 2])
    assert row.startswith("backward_") and "_fp16_" in row
    assert ("general" if needs_general(case) else "plain") in row, row
    assert (plan.workspace_bytes > 0) == ("_sm90_" in row or case.q * case.heads > 0)  # its counter


def staying_blocks(tiles, tiles_of_head, multiprocessors):
    """One a multiprocessor; one fewer where each had the same place in every head, if no later."""
    if tiles <= multiprocessors:
        return tiles
    rounds, rounds_of_fewer = (-(-tiles // n) for n in (multiprocessors, multiprocessors - 1))
    same_place = tiles_of_head > 1 and multiprocessors % tiles_of_head == 0
    return multiprocessors - (same_place and rounds == rounds_of_fewer)


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


def test_a_refusal_of_the_backward():
    x = (1, 64, 4, 64)
    answer = anyflash.supports(x, x, x, dtype="float32", device="sm_90", backward=True)
    assert not answer and answer.reason.startswith("asked: backward of float32 on a GPU (sm_90);")


def test_the_plan_of_a_backward_is_that_of_the_call():
    q, k = np.zeros((2, 65, 4, 40), np.float32), np.zeros((2, 130, 2, 40), np.float32)
    o, lse = anyflash.attention(q, k, k, return_lse=True)
    options = (None, None, 0, 0, None, None, True, (9, 0), None, 0.0, None, None)
    gradients = (q.copy(), k.copy(), k.copy())
    arguments = _call.BackwardArguments.of(o, q, k, k, o, lse, None, *options, *gradients)
    made = _library.make_plan(_call._BackwardCall(arguments).problem(), None)
    asked = anyflash.supports(q, k, k, causal=True, window=(9, 0), backward=True)
    assert bytes(asked.plan) == bytes(made)


def test_torchs_switch_is_asked_for_the_backward():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    q = torch.zeros(1, 64, 4, 64, dtype=torch.float16)
    asked = {"device": "sm_90", "backward": True}
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert "dQ deterministic" in anyflash.explain(q, q, q, **asked)
        assert "dQ deterministic" not in anyflash.explain(q, q, q, deterministic=False, **asked)
    finally:
        torch.use_deterministic_algorithms(before)


def test_questions_without_an_answer_are_errors():
    with pytest.raises(TypeError, match=r"^q is a shape; dtype= and device= must be given with it"):
        anyflash.supports(X, X, X)
    with pytest.raises(TypeError, match=r"^q is a shape; dtype= and device= must be given with it"):
        anyflash.explain(X, X, X, dtype="float16")
    with pytest.raises(ValueError, match="device is 'gpu'; it must be"):
        anyflash.supports(X, X, X, dtype="float16", device="gpu")
    with pytest.raises(TypeError, match="dtype is 'int8'; it must be float16"):
        anyflash.supports(X, X, X, dtype="int8", device="cpu")
    with pytest.raises(TypeError, match="backward is 'dq'; it must be True or False"):
        anyflash.supports(X, X, X, dtype="float16", device="cpu", backward="dq")


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


def test_explain_of_the_backward():
    asked = {"causal": True, "dtype": "bfloat16", "device": "sm_90", "backward": True}
    text = anyflash.explain(X, X, X, deterministic=True, **asked)
    pairs = 16 * 8192 * 8193 // 2
    for part in (
        "backward, bfloat16, dense: batch 1, seqlen_q 8192",
        "dQ deterministic",
        "backward_sm90_plain_bf16_d128_dv128",
        "before     ",
        f"{pairs} visible pairs",
    ):
        assert part in text, text
    floor = 2 * 5 * 128 * pairs / 989e12  # five products
    assert f"floor      {floor * 1e6:.3g} us" in text
    assert "after      " not in text  # whoever adds to dQ last finishes it
    assert "after      " in anyflash.explain(X, X, X, **asked)


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
