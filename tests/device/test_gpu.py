"""What only a GPU can show: streams, graphs, tensors over 2^31 elements, other libraries."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from functools import partial

import pytest

torch = pytest.importorskip("torch", reason="the device tests need torch")
anyflash = pytest.importorskip("anyflash", reason="anyflash is not installed")

from accuracy import Result, worst_violation
from case_list import Inputs, case_of

pytestmark = pytest.mark.gpu


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda", dtype=dtype)


def violation_of(o, lse, q, k, v, **options):
    """The rule for one dense problem on the GPU."""
    line = {"name": "x", "d": q.shape[3], "batch": q.shape[0], "q": q.shape[1], "k": k.shape[1]}
    case = case_of({**line, "heads": q.shape[2], "heads_k": k.shape[2], **options})
    inputs = Inputs(case, q.float(), k.float(), v.float(), None, None, None, None, None)
    return worst_violation(Result(o, lse), inputs, str(q.dtype).partition(".")[2])


def test_work_runs_on_the_current_stream():
    q, k, v = (randn(1, 4096, 16, 64) for _ in range(3))
    expected = anyflash.attention(q, k, v)
    stream = torch.cuda.Stream()
    late = torch.zeros_like(q)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(q)
        result = anyflash.attention(late, k, v)
    stream.synchronize()
    assert torch.equal(result, expected)


def test_nothing_waits_for_the_gpu():
    q, k, v = (randn(1, 512, 4, 64) for _ in range(3))
    anyflash.attention(q, k, v)
    done = torch.cuda.Event()
    torch.cuda._sleep(500_000_000)
    anyflash.attention(q, k, v)
    done.record()
    assert not done.query(), "the call came back after the GPU was done: it waited"
    torch.cuda.synchronize()


def test_cuda_graph_replays_with_new_inputs():
    q, k, v = (randn(2, 300, 8, 128) for _ in range(3))
    anyflash.attention(q, k, v, causal=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = anyflash.attention(q, k, v, causal=True)
    for x in (q, k, v):
        x.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(o, anyflash.attention(q, k, v, causal=True))


@pytest.mark.parametrize("d", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("count", "longest"), [(90, 300), (30, 900)])
def test_many_short_packed_sequences_give_the_same_bits(d, causal, count, longest):
    """Tile after tile with little work in each: what is loaded ahead must not arrive too early."""
    random = torch.Generator().manual_seed(d)
    for _ in range(16):
        lengths = torch.randint(0, longest, (count,), generator=random)
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().cuda()
        q, k, v, dout = (randn(int(lengths.sum()), 16, d) for _ in range(4))
        sequences = (ends, ends, int(lengths.max()), int(lengths.max()))
        forward = partial(anyflash.attention_varlen, q, k, v, *sequences, causal=causal)
        o, lse = forward(return_lse=True)
        backward = partial(
            *(anyflash.attention_backward, dout, q, k, v, o, lse, *sequences),
            causal=causal,
            deterministic=True,
        )
        gradients = backward()
        for _ in range(2):
            again = forward(return_lse=True)
            assert torch.equal(again[0], o) and torch.equal(again[1], lse)
        assert all(torch.equal(x, y) for x, y in zip(backward(), gradients))


def test_threads_with_streams_of_their_own():
    inputs = [[randn(1, 200 + 10 * i, 4, 64) for _ in range(3)] for i in range(4)]
    expected = [anyflash.attention(*x) for x in inputs]
    torch.cuda.synchronize()
    wrong = []

    def work(i):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                o = anyflash.attention(*inputs[i])
                torch.cuda.current_stream().synchronize()
                if not torch.equal(o, expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_more_than_2_to_31_elements():
    batch, n, d = 8200, 2048, 128
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    q, k, v = (torch.empty(batch, n, 1, d, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    for x in (q, k, v):
        assert x.numel() > 2**31
        for part in x.split(512):
            part.normal_()
    o, lse = anyflash.attention(q, k, v, causal=True, return_lse=True)
    for b in (0, 4095, batch - 1):
        at = slice(b, b + 1)
        assert violation_of(o[at], lse[at], q[at], k[at], v[at], causal=True) is None


def test_row_stride_over_2_to_31():
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free GPU memory")
    n, d, row = 3, 64, 2**31 + 8
    storage = torch.zeros((n - 1) * row + d, device="cuda", dtype=torch.bfloat16)
    k = storage.as_strided((1, n, 1, d), (0, row, d, 1))
    k.normal_()
    q, v = randn(1, 5, 1, d), randn(1, n, 1, d)
    o, lse = anyflash.attention(q, k, v, return_lse=True)
    assert violation_of(o, lse, q, k, v) is None


def test_several_gpus_in_one_process():
    """Tensors decide where the work runs, not the current device, which stays what it was."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = [randn(2, 300, 4, 128) for _ in range(3)]
    expected = anyflash.attention(*inputs, causal=True)
    results: dict[int, list[object]] = {0: [], 1: []}

    def work(index: int) -> None:
        q, k, v = (x.to(f"cuda:{index}") for x in inputs)
        for _ in range(20):
            results[index].append(anyflash.attention(q, k, v, causal=True))

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    on_second = anyflash.attention(*(x.to("cuda:1") for x in inputs), causal=True)
    assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(1)
    for index, outputs in results.items():
        assert len(outputs) == 20
        for o in [*outputs, on_second]:
            assert torch.equal(o.cpu(), expected.cpu())
        assert all(o.device.index == index for o in outputs)


def test_cupy_in_cupy_out():
    cupy = pytest.importorskip("cupy")
    q, k, v = (randn(1, 130, 2, 64, dtype=torch.float16) for _ in range(3))
    o = anyflash.attention(*(cupy.from_dlpack(x) for x in (q, k, v)), causal=True)
    assert isinstance(o, cupy.ndarray)
    assert torch.equal(torch.from_dlpack(o), anyflash.attention(q, k, v, causal=True))


def test_float32_is_refused_with_the_reason():
    x = randn(1, 16, 1, 64, dtype=torch.float32)
    with pytest.raises(NotImplementedError, match=r"float32|fp32"):
        anyflash.attention(x, x, x)


def test_devices_do_not_mix():
    x = randn(1, 16, 1, 64)
    with pytest.raises((TypeError, ValueError)):
        anyflash.attention(x, x.cpu(), x)


def test_nan_past_the_used_rows_stays_out():
    q = randn(64, 2, 64)
    k, v = randn(100, 2, 64), randn(100, 2, 64)
    k[70:], v[70:] = float("nan"), float("nan")
    lengths_q = torch.tensor([0, 64], dtype=torch.int32, device="cuda")
    lengths_k = torch.tensor([0, 100], dtype=torch.int32, device="cuda")
    used = torch.tensor([70], dtype=torch.int32, device="cuda")
    o = anyflash.attention_varlen(q, k, v, lengths_q, lengths_k, 64, 100, seqused_k=used)
    assert bool(o.isfinite().all())


COMPILE_IN_A_CALL = """
import torch, anyflash
q, k, v = (torch.randn(1, 70, 2, 64, device="cuda", dtype=torch.float16) for _ in range(3))
o = anyflash.attention(q, k, v)
expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
print((o - expected.transpose(1, 2)).abs().max().item() < 0.01)
"""


def test_a_kernel_that_is_not_in_the_package_is_compiled_in_the_call(tmp_path):
    """In a process of its own: the notice is given from inside a call."""
    places = {"ANYFLASH_KERNELS": tmp_path / "none", "ANYFLASH_CACHE_DIR": tmp_path / "cache"}
    environment = {**os.environ, **{name: str(path) for name, path in places.items()}}
    command = [sys.executable, "-c", COMPILE_IN_A_CALL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    if "no fitting libnvrtc" in done.stderr:
        pytest.skip("no libnvrtc that fits this GPU")
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr
    assert "compiling" in done.stderr
