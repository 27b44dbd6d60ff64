"""python -m anyflash bench: what it measures, on small problems; never how fast."""

from __future__ import annotations

import argparse
import importlib.util
import json

import numpy as np
import pytest
from anyflash.cli import bench, bench_backends, bench_host, main
from anyflash.cli.bench_backends import OURS, SDPA, STANDARD, Cell, NumpyCpu, OutOfMemory

SMALL = ["bench", "--device", "cpu", "--d", "32", "--heads", "2", "--seconds", "0.1"]


def options(*words):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """However busy the machine is, no size is left out."""
    monkeypatch.setattr(bench, "STARTING_SECONDS", 600.0)


@pytest.fixture
def numpy_only(monkeypatch):
    """As if torch were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        bench_backends.importlib.util, "find_spec", lambda name: name != "torch" and find(name)
    )


def test_default_grid_on_the_cpu():
    cells = bench.grid(options(), NumpyCpu())
    assert len(cells) == 16
    assert {(cell.d, cell.heads) for cell in cells} == {(64, 16), (128, 8)}
    assert {cell.seqlen for cell in cells} == {512, 1024, 2048, 4096}
    assert {cell.batch for cell in cells} == {1} and {cell.dtype for cell in cells} == {"float32"}


def test_grid_of_options():
    words = [
        "--d",
        "40",
        "--heads",
        "3",
        "--seqlens",
        "100",
        "300",
        "--tokens",
        "600",
        "--causal",
        "--dtype",
        "float16",
    ]
    cells = bench.grid(options(*words), NumpyCpu())
    expected = [Cell(40, 3, n, 600 // n, True, "float16") for n in (100, 300)]
    assert cells == expected


def test_default_grid_on_a_gpu():
    backend = NumpyCpu()
    backend.on_gpu = True
    cells = bench.grid(options("--full"), backend)
    assert {cell.seqlen * cell.batch for cell in cells} == {16384}
    assert {cell.d * cell.heads for cell in cells} == {2048}
    assert {cell.dtype for cell in cells} == {"bfloat16"}


def test_flops():
    assert Cell(64, 2, 100, 3, False, "float32").flops == 4 * 3 * 2 * 100 * 100 * 64
    assert Cell(64, 2, 100, 3, True, "float32").flops == 2 * 3 * 2 * 100 * 100 * 64


@pytest.mark.parametrize(
    "words, says",
    [
        (["--d", "0"], "--d 0: at least 1"),
        (["--d", "512"], "--d 512: at most 256"),
        (["--seqlens", "-4"], "--seqlens -4"),
        (["--json", "/nowhere/x.json"], "cannot write /nowhere/x.json"),
        (["--dtype", "bfloat16"], "--dtype bfloat16: NumPy on the CPU has float32, float16"),
    ],
)
def test_mistakes(words, says, capsys, numpy_only):
    assert main(["bench", "--device", "cpu", *words]) == 2
    said = capsys.readouterr()
    assert says in said.err and "Traceback" not in said.err


def test_wants_a_gpu_where_there_is_none(capsys, monkeypatch):
    monkeypatch.setattr(bench_backends, "gpus", lambda: [])
    assert main(["bench", "--device", "cuda"]) == 1
    assert "no GPU here" in capsys.readouterr().err


def test_plot_without_matplotlib_says_so_at_once(capsys, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert main([*SMALL, "--plot", "x.png"]) == 1
    assert "`pip install anyflash[bench]`" in capsys.readouterr().err


def check_report(report, contestants):
    for entry in report["bench"]:
        assert entry["ours"] > 0 and entry["unit"] == "GFLOP/s"
        assert set(entry["peers"]) == contestants
        assert set(entry["seconds"]) == {OURS, *contestants}
        assert all(difference < 1e-5 for difference in entry["difference"].values())


def test_numpy(tmp_path, capsys, numpy_only):
    path = tmp_path / "bench.json"
    assert main([*SMALL, "--seqlens", "33", "70", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "NumPy" in out and "x standard" in out and "largest difference" in out
    report = json.loads(path.read_text())
    assert len(report["bench"]) == 4 and report["device"] == "cpu" and report["hardware"]
    check_report(report, {STANDARD})


def test_numpy_in_half_precision(capsys, numpy_only):
    assert main([*SMALL, "--seqlens", "64", "--dtype", "float16", "--causal"]) == 0
    assert "float16" in capsys.readouterr().out


def test_torch(tmp_path):
    pytest.importorskip("torch", reason="torch is not installed")
    path = tmp_path / "bench.json"
    assert main([*SMALL, "--seqlens", "40", "--json", str(path)]) == 0
    check_report(json.loads(path.read_text()), {STANDARD, "torch SDPA"})


class Fake(NumpyCpu):
    """Counts calls instead of timing them; `full` do not fit."""

    def __init__(self, full=()):
        self.full = full
        self.order = []

    def calls(self, cell):
        return {name: lambda name=name: self.order.append(name) for name in (OURS, STANDARD)}

    def refuse(self, name, cell):
        if name in self.full:
            raise OutOfMemory("needs 9 GB, 1 GB are free")

    def difference(self, name, a, b):
        return 0.0

    def seconds(self, call):
        call()
        return 0.5


CELL = Cell(64, 2, 128, 1, False, "float32")


def test_contestants_take_turns():
    backend = Fake()
    result = bench.measure(backend, CELL, 10.0)
    assert result.seconds == {OURS: 0.5, STANDARD: 0.5}
    assert result.ratio(STANDARD) == 1.0
    timed = backend.order[4:]  # after two calls of each that are not counted
    assert timed[:4] == [OURS, STANDARD] * 2 and len(timed) <= 2 * bench.MOST_ROUNDS


def test_it_stops_when_the_time_is_over(monkeypatch):
    """Short sequences first; what was measured comes in the order that was asked for."""
    cells = [Cell(64, 2, n, 1, causal, "float32") for causal in (False, True) for n in (256, 128)]
    backend = Fake()
    monkeypatch.setattr(bench, "STARTING_SECONDS", 5.0)
    monkeypatch.setattr(bench.time, "monotonic", lambda: 5.0 * len(backend.order))
    everything = bench.measure_all(backend, cells, 1e9)
    assert [result.cell for result in everything] == cells
    some = bench.measure_all(backend, cells, 10.0)
    assert [result.cell for result in some] == [cells[1]]


def test_out_of_memory_is_a_result():
    backend = Fake(full=(STANDARD,))
    result = bench.measure(backend, CELL, 0.1)
    assert set(result.seconds) == {OURS} and result.ratio(STANDARD) is None
    text = bench.show([result], backend)
    assert "out of memory" in text and "standard: needs 9 GB, 1 GB are free" in text
    (entry,) = bench.to_json([result], backend, "")["bench"]
    assert entry["peers"] == {} and entry["out_of_memory"] == result.out_of_memory


def test_standard_attention_that_cannot_fit_is_not_tried(monkeypatch):
    monkeypatch.setattr(bench_backends, "available", lambda: 2**30)
    large = Cell(64, 16, 16384, 1, False, "float32")
    with pytest.raises(OutOfMemory, match="needs 48 GB, 1 GB are free"):
        NumpyCpu().refuse(STANDARD, large)
    NumpyCpu().refuse(OURS, large)
    monkeypatch.setattr(bench_backends, "available", lambda: None)
    NumpyCpu().refuse(STANDARD, large)


def test_peak_memory_is_seen():
    """The standard attention's score matrices show; a call that keeps little does not."""
    large, result = bench_backends._resident_growth(lambda: float(np.ones(2**23).sum()))
    if large is None:
        pytest.skip("this machine's system does not tell the resident memory")
    assert result == 2**23
    assert 2**26 * 0.9 < large < 2**26 * 1.5
    small, _ = bench_backends._resident_growth(lambda: np.ones(2**10))
    assert small < 2**24


def test_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    plain, full = Fake(), Fake(full=(STANDARD,))
    results = [
        bench.measure(plain, CELL, 0.01),
        bench.measure(full, Cell(64, 2, 256, 1, False, "float32"), 0.01),
    ]
    from anyflash.cli.bench_plot import plot

    path = tmp_path / "plot.png"
    plot(bench.to_json(results, plain, "a machine"), path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# --host


def test_host(tmp_path, capsys):
    pytest.importorskip("torch", reason="torch is not installed")
    file = tmp_path / "host.json"
    words = ["bench", "--host", "--device", "cpu", "--seconds", "0.1", "--json", str(file)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "on the CPU, for want of a GPU: batch 1, 1 tokens, 1 heads" in out
    assert "the backward alone" in out
    times = json.loads(file.read_text())["microseconds"]
    assert set(times) == {OURS, SDPA, bench_host.EMPTY}
    for row in times.values():
        assert set(row) == set(bench_host.COLUMNS)
        assert all(value > 0 for value in row.values())


def test_host_leaves_out_what_is_refused():
    torch = pytest.importorskip("torch", reason="torch is not installed")

    def refuses_gradients(q, k, v):
        if q.requires_grad:
            raise NotImplementedError
        return q

    calls = bench_host._columns(refuses_gradients, [torch.ones(1)] * 3)
    assert list(calls) == ["forward"]


def test_host_needs_torch(capsys, numpy_only):
    assert main(["bench", "--host", "--device", "cpu"]) == 1
    assert "--host needs torch" in capsys.readouterr().err
