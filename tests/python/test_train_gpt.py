"""examples/train_gpt.py at a tiny size: both attentions learn alike, and the report says so."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

EXAMPLE = Path(__file__).resolve().parent.parent.parent / "examples" / "train_gpt.py"
TINY = ["--length", "48", "--batch", "2", "--steps", "6", "--layers", "1"]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_gpt", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_gpt"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules["train_gpt"]


def test_as_a_user_runs_it(tmp_path):
    out = tmp_path / "curves.png"
    command = [sys.executable, str(EXAMPLE), *TINY, "--seeds", "2", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "largest difference of the two curves" in done.stdout
    assert out.read_bytes().startswith(b"\x89PNG")
    report = json.loads(out.with_suffix(".json").read_text())
    assert [line["attention"] for line in report["summary"]] == ["anyflash", "standard"]
    runs = {(run["attention"], run["seed"]): run["losses"] for run in report["runs"]}
    assert len(runs) == 4 and runs["anyflash", 0] != runs["anyflash", 1]
    for seed in range(2):
        ours, standard = (torch.tensor(runs[name, seed]) for name in ("anyflash", "standard"))
        torch.testing.assert_close(ours, standard, rtol=1e-3, atol=0)
        assert len(ours) == 6 and ours[-1] < ours[0]


def test_the_attentions_agree(example):
    q, k, v = (torch.randn(2, 9, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    results = []
    for attention in example.ATTENTIONS.values():
        o = attention(q, k, v)
        results.append([o, *torch.autograd.grad(o.square().sum(), (q, k, v))])
    for ours, standard in zip(*results):
        torch.testing.assert_close(ours, standard, rtol=1e-4, atol=1e-5)


def test_rotated_products_depend_on_the_distance(example):
    settings = example.Settings(
        length=12, batch=1, steps=1, layers=1, width=16, heads=1, key_heads=1
    )
    q, k = torch.randn(2, 16)
    rotation = example.rotations(settings)
    turned = [example.rotate(x.expand(1, 12, 1, 16), rotation)[0, :, 0] for x in (q, k)]
    products = turned[0] @ turned[1].T
    for distance in range(-11, 12):
        along = products.diagonal(distance)
        torch.testing.assert_close(along, along[:1].expand_as(along))
    assert abs(products[0, 0] - products[5, 0]) > 1e-3


def test_out_of_memory_is_reported(example, monkeypatch, tmp_path, capsys):
    def too_large(q, k, v):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 77 GiB")

    monkeypatch.setitem(example.ATTENTIONS, "standard", too_large)
    command = ["train_gpt.py", *TINY, "--seeds", "2", "--out", str(tmp_path / "curves.png")]
    monkeypatch.setattr(sys, "argv", command)
    assert example.main() == 0
    said = capsys.readouterr().out
    assert "CUDA out of memory" in said and "largest difference" not in said
    report = json.loads((tmp_path / "curves.json").read_text())
    anyflash_line, standard_line = report["summary"]
    assert anyflash_line["loss"] > 0 and standard_line["loss"] is None
    assert [run["stopped"] for run in report["runs"] if run["attention"] == "standard"] == [
        "CUDA out of memory"
    ] * 2


def test_the_gpu_preset_names_what_is_missing(example, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "--preset", "gpu"])
    with pytest.raises(SystemExit):
        example.main()
    assert "no GPU here" in capsys.readouterr().err
