"""README's tables say what the recorded runs measured, and nothing else."""

from __future__ import annotations

import json

import gpu_record
import gpu_tables
import pytest
import update_tables

CELL = {
    "d": 64,
    "dv": 64,
    "heads": 32,
    "heads_k": 32,
    "causal": False,
    "seqlen": 512,
    "batch": 32,
    "dtype": "bf16",
    "layout": "dense",
    "options": {},
    "ours": 300.4,
    "peers": {"fa2": 200.0},
    "unit": "TFLOP/s",
}
SECTION = {
    "op": "fwd",
    "family": "sm80",
    "image": "sm_90",
    "gpu": "NVIDIA H100",
    "driver": "580.1",
    "date": "2026-11-22",
}
README = "".join(f"<!-- table:{n} -->\nold\n<!-- /table:{n} -->\n" for n in update_tables.TABLES)


@pytest.fixture()
def root(tmp_path):
    (tmp_path / "tests" / "device").mkdir(parents=True)
    (tmp_path / "bench").mkdir()
    return tmp_path


def record(root, *cells, **changes):
    sections = [{**SECTION, "bench": list(cells), **changes}]
    (root / gpu_record.NAME).write_text(json.dumps({"sections": sections}))


def test_nothing_measured(root):
    text = update_tables.updated(README, root)
    assert text.count(update_tables.NOT_YET) == len(update_tables.TABLES) and "old" not in text
    record(root)
    assert update_tables.updated(README, root) == text


def hopper(root, *cells):
    record(root, *cells, image="sm_90a", family="sm90")


def test_grid_beside_all_peers(root):
    hopper(
        root,
        {**CELL, "peers": {"fa2": 100.0, "cudnn": 150.2}},
        {**CELL, "seqlen": 1024, "peers": {"fa2": 150.2, "fa4": 300.4}},
        {**CELL, "deterministic": True, "peers": {"plain": 310.0}},
        {**CELL, "d": 96, "part": "extra"},
    )
    lines = gpu_tables.peers_table(root).splitlines()
    assert "image sm_90a" in lines[0]
    assert "2.00x cuDNN (1 cells), 1.00x FlashAttention-4 (1 cells)" in lines[0]
    assert lines[2:] == [
        "| d | mask |  | 512 | 1k | geometric mean |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 64 | full | ours | 300 | 300 |  |",
        "|  |  | cuDNN | 150 (2.00x) |  | 2.00x |",
        "|  |  | FlashAttention-4 |  | 300 (1.00x) | 1.00x |",
        "|  |  | FlashAttention-2 | 100 (3.00x) | 150 (2.00x) | 2.45x |",
    ]


def test_other_problems(root):
    assert gpu_tables.extra_table(root) == update_tables.NOT_YET
    extra = {**CELL, "part": "extra"}
    hopper(
        root,
        CELL,
        {**extra, "d": 192, "dv": 128, "peers": {"cudnn": 150.2}},
        {**extra, "heads_k": 8, "seqlen": 8192, "peers": {}},
        {**extra, "options": {"window": [1024, 0]}, "causal": True},
        {
            **extra,
            "options": {"lengths": "log-normal"},
            "layout": "packed",
            "peers": {"fa2": 100.0, "dense": 600.8},
        },
    )
    lines = gpu_tables.extra_table(root).splitlines()
    packed = "d 64, 32 packed sequences, log-normal lengths of this mean"
    assert lines[2:] == [
        "|  | mask | 512 | 8k |",
        "| --- | --- | --- | --- |",
        "| d 192, values of 128 | full | 300 (2.00x cuDNN) |  |",
        "| d 64, 32 heads over 8 | full |  | 300 |",
        "| d 64, window of 1024 | causal | 300 (1.50x FlashAttention-2) |  |",
        f"| {packed} | full | 300 (3.00x FlashAttention-2, 0.50x dense) |  |",
    ]


def test_cycles(root):
    counted = {
        "part": "cycles",
        "floor": 50_000,
        "unit": "cycles",
        "ours": 100_000,
        "peers": {"cudnn": 200_000},
        "clock": {"ours": 1.7, "cudnn": 1.75},
    }
    hopper(root, CELL, {**CELL, **counted})
    lines = gpu_tables.cycles_table(root).splitlines()
    assert "counted at 1.70 to 1.75 GHz" in lines[0]
    assert lines[-2:] == [
        "| 64 | full | ours | 100 (50%) |",
        "| 64 | full | cuDNN | 200 (25%) |",
    ]


def test_gpu_grid(root):
    causal = {**CELL, "causal": True, "seqlen": 16384, "ours": 100.0, "peers": {"fa2": 125.0}}
    record(root, CELL, causal, {**CELL, "seqlen": 1000, "peers": {"fa2": 300.4}})
    lines = gpu_tables.gpu_table(root).splitlines()
    assert "NVIDIA H100" in lines[0] and "geometric mean 1.06" in lines[0]
    assert lines[2:] == [
        "| dtype | d | mask | 512 | 1000 | 16k |",
        "| --- | --- | --- | --- | --- | --- |",
        "| bf16 | 64 | full | 300 (1.50x) | 300 (1.00x) |  |",
        "| bf16 | 64 | causal |  |  | 100 (0.80x) |",
    ]


def test_options_and_other_work_are_not_in_the_grid(root):
    plain = {"plain": 200.0, "fa2": 100.0}
    softcap = {**CELL, "options": {"softcap": 30.0}, "ours": 160.0, "peers": plain}
    packed = {**CELL, "layout": "packed", "ours": 200.0, "peers": plain}
    gqa = {**CELL, "heads_k": 8, "ours": 250.0, "peers": plain}
    host = {**CELL, "options": {"measured": "host time per call"}, "unit": "us"}
    record(root, softcap, packed, gqa, host)
    assert gpu_tables.gpu_table(root) == update_tables.NOT_YET
    assert gpu_tables.option_table(root).splitlines()[2:] == [
        "|  | d 64, full |",
        "| --- | --- |",
        "| softcap | +25.0 % |",
        "| packed sequences | +0.0 % |",
        "| GQA, 4 query heads a key head | -20.0 % |",
    ]


def test_other_operations_have_no_table(root):
    record(root, CELL, op="bwd")
    assert gpu_tables.gpu_table(root) == update_tables.NOT_YET


def test_native_images_apart_from_the_others(root):
    record(root, CELL, image="compute_80 PTX")
    assert gpu_tables.gpu_table(root) == update_tables.NOT_YET
    assert "compiled by the driver" in gpu_tables.gpu_table(root, native=False)


@pytest.mark.parametrize("op", ["forward", "backward"])
def test_cpu_grid(root, op):
    cell = {
        "dtype": "float32",
        "d": 64,
        "causal": True,
        "seqlen": 2048,
        "ours": 201.6,
        "ratio": 1.3,
    }
    report = {
        "cpu": "a CPU",
        "threads": 2,
        "torch": "2.13.0",
        "date": "2026-11-22",
        "geomean": 1.3,
        "cells": [cell],
    }
    path = root / update_tables.CPU[op]
    path.write_text(json.dumps(report))
    lines = update_tables.cpu_table(root, op).splitlines()
    assert lines[0].startswith(f"a CPU, 2 threads, torch 2.13.0, 2026-11-22: {op}, batch 1")
    assert "mean 1.30" in lines[0]
    assert lines[-1] == "| float32 | 64 | causal | 202 (1.30x) |"
    wider = {**report, "isa": "avx512", "geomean": 2.1}
    path.with_stem(path.stem + "_avx512").write_text(json.dumps(wider))
    both = update_tables.cpu_table(root, op).splitlines()
    assert both[: len(lines)] == lines
    assert both[len(lines) + 1].startswith("a CPU (avx512), 2 threads")


def test_a_disturbed_run_says_so():
    quiet = {"ours": 100.0, "ours_best": 120.0}
    assert update_tables.disturbance([quiet, {"ours": 100.0}]) == ""
    busy = {"ours": 20.0, "ours_best": 130.0}
    assert "up to 6.5 times" in update_tables.disturbance([quiet, busy])


def test_a_readme_without_a_place_is_an_error(root):
    with pytest.raises(SystemExit, match="not one place for the table gpu"):
        update_tables.updated("no markers", root)


def test_readme_is_current():
    text = (update_tables.ROOT / "README.md").read_text(encoding="utf-8")
    assert update_tables.updated(text, update_tables.ROOT) == text


def test_training(root):
    """A line for each attention and place; one that ran out of memory says so."""
    (root / "docs").mkdir()
    report = {
        "hardware": "a GPU",
        "remark": "others work here",
        "date": "2026-11-22",
        "versions": {"torch": "2.13.0"},
        "settings": {"length": 8192, "dtype": "torch.bfloat16"},
        "summary": [
            {
                "attention": "anyflash",
                "loss": 1.2345,
                "seconds": 12.4,
                "peak_bytes": 3 * 2**30,
                "stopped": "",
            },
            {"attention": "standard", "stopped": "CUDA out of memory"},
        ],
    }
    (root / update_tables.TRAIN["GPU"]).write_text(json.dumps(report))
    lines = update_tables.train_table(root).splitlines()
    assert lines[0] == "a GPU, bfloat16, torch 2.13.0, 2026-11-22 (others work here)"
    place = "GPU, 8192 characters a sequence"
    assert lines[-2:] == [
        f"| {place} | anyflash | 1.234 | 12 s | 3,072 MB |",
        f"| {place} | standard | CUDA out of memory |  |  |",
    ]


def test_agreement(root):
    assert update_tables.agreement_table(root) == update_tables.NOT_YET
    report = {
        "hardware": "x86_64 CPU",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "date": "2026-11-22",
        "minilm": 3.1e-7,
        "models": [
            {
                "model": "Llama",
                "logits": 6.6e-7,
                "gradients": 1.4e-6,
                "same_tokens": 108,
                "tokens": 108,
            },
            {"model": "BERT", "logits": 6.6e-7, "gradients": 1.1e-6},
        ],
    }
    (root / update_tables.AGREEMENT).write_text(json.dumps(report))
    lines = update_tables.agreement_table(root).splitlines()
    assert "transformers 5.23.0" in lines[0] and "3e-07 at most" in lines[-1]
    assert "| Llama | 7e-07 | 1e-06 | 108 of 108 |" in lines
    assert "| BERT | 7e-07 | 1e-06 |  |" in lines
