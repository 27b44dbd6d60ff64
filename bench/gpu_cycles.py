"""Cycles of the GPU for one call, ours and cuDNN's, as Nsight Compute counts them.

usage: python bench/gpu_forward.py --cycles, python bench/gpu_backward.py --cycles

Cycles say what the kernels do whatever clock heat and power allow; the clock that they ran at is
given with them, and nothing sets it. The floor: 4096 dense bf16 flops a clock and multiprocessor,
on Hopper. A call is the sum of its kernels, one after the other. Without Nsight Compute, or the
right to read the counters, there are no cells.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_peers import complain, takers
from gpu_problem import HEAD_DIMS, MASKS, dense

SEQLENS = (4096, 16384)
FLOPS_A_CLOCK = 4096  # dense bf16, of one multiprocessor
CYCLES, TIME = "sm__cycles_elapsed.max", "gpu__time_duration.sum"
MARK = "spin_kernel"  # what torch.cuda._sleep launches, in front of each call
LIMIT = 120  # seconds

Counts = dict[str, float]


def cycles(backward: bool, settings: argparse.Namespace) -> Iterator[partial[dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        calls = Path(folder) / "calls.jsonl"
        output = profile(backward, calls)
        named = [json.loads(line) for line in calls.read_text().splitlines()]
    counts = counts_of_calls(output)
    if not named or len(counts) < len(named):
        complain(f"no cycles, {len(counts)} of {len(named)} calls counted: {output[-1500:]}")
        return
    for line in cells(named, counts):
        yield partial(dict, line)


def profile(backward: bool, calls: Path) -> str:
    """What Nsight Compute prints of a run of this script, which writes down what it calls."""
    calls.touch()
    command = [shutil.which("ncu") or "/usr/local/cuda/bin/ncu", "--csv", "--print-units", "base"]
    command += ["--metrics", f"{CYCLES},{TIME}", "--clock-control", "none"]
    command += ["--cache-control", "none", "--profile-from-start", "off"]
    command += ["--target-processes", "all", sys.executable, __file__]
    command += [str(calls), "backward" if backward else "forward"]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT + 30
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stdout


def counts_of_calls(output: str) -> list[Counts]:
    """Cycles and nanoseconds of each call: the kernels between two marks."""
    rows = csv.DictReader(line for line in output.splitlines() if line.startswith('"'))
    calls: list[Counts] = []
    mark = None
    for row in rows:
        kernel, metric = row.get("Kernel Name") or "", row.get("Metric Name") or ""
        if MARK in kernel:
            if row["ID"] != mark:
                mark = row["ID"]
                calls.append({CYCLES: 0.0, TIME: 0.0})
        elif calls and metric in calls[-1]:
            calls[-1][metric] += float(row["Metric Value"].replace(",", ""))
    return calls


def cells(named: list[dict[str, Any]], counts: list[Counts]) -> Iterator[dict[str, Any]]:
    """A cell of the record for each problem, of the calls of everybody who took it."""
    found: dict[str, dict[str, Counts]] = {}
    for call, count in zip(named, counts):
        found.setdefault(json.dumps(call["problem"]), {})[call["name"]] = count
    for problem, by_name in found.items():
        needed = {name: round(count[CYCLES]) for name, count in by_name.items()}
        clock = {
            name: round(count[CYCLES] / count[TIME], 3)
            for name, count in by_name.items()
            if count[TIME]
        }
        result = {"ours": needed.pop("ours"), "peers": needed, "unit": "cycles", "clock": clock}
        yield {**json.loads(problem), **result}


def called(calls: Path, backward: bool) -> None:
    """The profiled program: each call once, behind a mark; kernels are compiled before.

    It ends itself in time, so that the profiler still reports what was called.
    """
    signal.alarm(LIMIT)
    units = torch.cuda.get_device_properties(0).multi_processor_count
    for d in HEAD_DIMS:
        for causal in MASKS:
            for seqlen in SEQLENS:
                p = dense(seqlen, d, causal, backward)
                floor = round(p.flops() / FLOPS_A_CLOCK / units)
                problem = {**p.described(), "part": "cycles", "floor": floor}
                for name, run in takers(p, ("cudnn",)).items():
                    torch.cuda.synchronize()
                    torch.cuda.profiler.start()
                    torch.cuda._sleep(1)
                    run()
                    torch.cuda.synchronize()
                    torch.cuda.profiler.stop()
                    with calls.open("a") as file:
                        file.write(json.dumps({"problem": problem, "name": name}) + "\n")


if __name__ == "__main__":
    called(Path(sys.argv[1]), sys.argv[2] == "backward")
