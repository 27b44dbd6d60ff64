"""The benchmarks of the GPU, on the CPU: what they compute, name and count; never how fast."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial

import gpu_record
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("anyflash", reason="anyflash is not installed")
sys.path.insert(0, str(gpu_record.ROOT / "bench"))
import gpu_bench
import gpu_cycles
import gpu_peers
import gpu_problem
from gpu_problem import Problem, dense, log_normal_lengths, packed

SETTINGS = argparse.Namespace(seconds=0.0, peers=["cudnn", "fa2"])


def call_all(runs, seconds):
    for run in runs.values():
        run()
    return dict.fromkeys(runs, 1e-6)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """Small problems here, by peers that work here, timed by nobody."""

    def sdpa(p: Problem):
        if p.packed or p.window:
            raise NotImplementedError("dense ones only")
        views = [x.transpose(1, 2) for x in (p.q, p.k, p.v)]
        attention = torch.nn.functional.scaled_dot_product_attention
        return lambda: attention(*views, is_causal=p.causal, enable_gqa=True).transpose(1, 2)

    def tensors(rows, q, k, v, backward=False):
        make = partial(torch.randn, dtype=torch.float32, requires_grad=backward)
        return make(*rows, *q), make(*rows, *k), make(*rows, *v)

    monkeypatch.setattr(gpu_problem, "tensors", tensors)
    monkeypatch.setattr(gpu_problem, "TOKENS", 128)
    monkeypatch.setattr(gpu_problem, "HIDDEN", 32)
    monkeypatch.setattr(gpu_bench, "measure", call_all)
    monkeypatch.setitem(gpu_peers.PEERS, "cudnn", sdpa)
    monkeypatch.setitem(gpu_peers.PEERS, "fa2", lambda p: lambda: p.q + 1)
    gpu_peers.complain.cache_clear()


@pytest.mark.parametrize("backward", [False, True])
def test_a_cell_of_the_grid(backward, capsys):
    cell = gpu_bench.grid_cell(64, 16, True, backward, SETTINGS)
    assert set(cell["peers"]) == {"cudnn"}
    assert "fa2: " in capsys.readouterr().err  # computes something else
    products = 5 if backward else 2
    assert cell["ours"] == round(products * 2 * 2 * 2 * 64 * 64 / 2 * 16 / 1e6, 1)
    assert (cell["batch"], cell["heads"], cell["deterministic"]) == (2, 2, not backward)
    jobs = list(gpu_bench.grid(backward, SETTINGS))
    assert len(jobs) == 36


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", gpu_bench.OPTIONS)
def test_a_cell_of_an_option(backward, name, monkeypatch):
    monkeypatch.setattr(gpu_problem, "HIDDEN", 64)
    monkeypatch.setattr(torch, "linspace", lambda *a, device, f=torch.linspace: f(*a))
    cell = gpu_bench.option_cell(name, 16, True, backward, 0.0, seqlen=64)
    assert cell["peers"] == {"plain": cell["ours"]}
    if name in ("window", "softcap", "alibi"):
        assert list(cell["options"]) == [name]
    else:
        assert cell["options"] == {}
    assert (cell["layout"] == "packed") == (name == "packed")
    assert (cell["heads_k"] == 1) == (name == "gqa")


def test_names_of_options_are_those_of_the_record():
    cell = gpu_bench.option_cell("window", 16, False, False, 0.0, seqlen=64)
    assert cell["options"] == {"window": [62, 62]}


@pytest.mark.parametrize("backward", [False, True])
def test_packed_sequences_beside_dense_ones(backward):
    lengths = log_normal_lengths(8, 64)
    cell = gpu_bench.extra_cell(lambda: packed(lengths, 16, True, backward), 0.0)
    assert list(cell["peers"]) == ["dense"]
    assert (cell["part"], cell["layout"], cell["seqlen"]) == ("extra", "packed", 64)
    assert cell["options"] == {"lengths": "log-normal"} and cell["batch"] == 8


def test_extra_cells_are_told_apart():
    """Without their tensors: shapes are enough."""
    makers = list(gpu_problem.extra_problems(False))
    assert len(makers) == 38
    keys = {json.dumps([make.func.__name__, make.args, make.keywords]) for make in makers}
    assert len(keys) == len(makers)
    small = partial(dense, 64, 16, False, dv=8, heads=4, heads_k=2, batch=1, window=8)
    cell = gpu_bench.extra_cell(small, 0.0)
    assert (cell["d"], cell["dv"], cell["heads"], cell["heads_k"]) == (16, 8, 4, 2)
    assert cell["options"] == {"window": [8, 8]} and cell["peers"] == {}


def test_lengths():
    lengths = log_normal_lengths()
    assert len(lengths) == 64 and sum(lengths) == 64 * 1024
    assert max(lengths) > 4 * 1024 and 0 < min(lengths) < 256
    assert lengths == log_normal_lengths()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_pairs_are_those_of_the_mask(causal, window):
    p = dense(12, 16, causal, batch=2, window=window)
    i, j = torch.arange(12)[:, None], torch.arange(12)
    seen = torch.ones(12, 12, dtype=torch.bool)
    if window is not None:
        seen = (j >= i - window) & (j <= i + (0 if causal else window))
    count = 2 * int(seen.sum())
    assert p.pairs() == (count / 2 if causal and window is None else count)


def test_a_failing_cell_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    out = tmp_path / "cells.jsonl"
    monkeypatch.setattr(sys, "argv", ["bench", "--a", "--out", str(out)])

    def part(settings):
        yield lambda: {"d": 1}
        yield lambda: 1 / 0
        yield lambda: {"d": 2}

    assert gpu_bench.run_parts("text", {"a": part, "b": part}) == 1
    assert [json.loads(line) for line in out.read_text().splitlines()] == [{"d": 1}, {"d": 2}]
    assert "ZeroDivisionError" in capsys.readouterr().err


NCU = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","at::cuda::<unnamed>::spin_kernel(long)","gpu__time_duration.sum","ns","1,024"
"0","7","at::cuda::<unnamed>::spin_kernel(long)","sm__cycles_elapsed.max","cycle","1,500"
"1","7","void kernel_pre(P, ""x"")","gpu__time_duration.sum","ns","1,000"
"1","7","void kernel_pre(P, ""x"")","sm__cycles_elapsed.max","cycle","1,500"
"2","7","kernel","gpu__time_duration.sum","ns","3,000"
"2","7","kernel","sm__cycles_elapsed.max","cycle","4,500"
"3","7","at::cuda::<unnamed>::spin_kernel(long)","gpu__time_duration.sum","ns","1,024"
"3","7","at::cuda::<unnamed>::spin_kernel(long)","sm__cycles_elapsed.max","cycle","1,500"
"4","7","cudnn","gpu__time_duration.sum","ns","8,000"
"4","7","cudnn","sm__cycles_elapsed.max","cycle","8,000"
"""


def test_cycles(monkeypatch):
    calls = [{"problem": {"d": 64, "floor": 3000}, "name": name} for name in ("ours", "cudnn")]

    def profile(backward, path):
        path.write_text("".join(json.dumps(call) + "\n" for call in calls))
        return NCU

    monkeypatch.setattr(gpu_cycles, "profile", profile)
    (job,) = gpu_cycles.cycles(True, SETTINGS)
    assert job() == {
        "d": 64,
        "floor": 3000,
        "ours": 6000,
        "peers": {"cudnn": 8000},
        "unit": "cycles",
        "clock": {"ours": 1.5, "cudnn": 1.0},
    }


@pytest.mark.parametrize("output", ["==ERROR== ERR_NVGPUCTRPERM", NCU])
def test_no_cycles_without_the_right_to_count(output, monkeypatch, capsys):
    def profile(backward, path):
        path.write_text("")
        return output

    monkeypatch.setattr(gpu_cycles, "profile", profile)
    assert list(gpu_cycles.cycles(False, SETTINGS)) == []
    assert "no cycles" in capsys.readouterr().err


def test_no_cycles_without_the_profiler(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_cycles.shutil, "which", lambda name: str(tmp_path / "none"))
    output = gpu_cycles.profile(False, tmp_path / "calls.jsonl")
    assert "No such file" in output and gpu_cycles.counts_of_calls(output) == []
