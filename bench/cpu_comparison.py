"""What cpu_forward.py and cpu_backward.py share: ours against torch's
`scaled_dot_product_attention` (its flash path) on a CPU, in one run, on the same threads.

The grid: batch 1, hidden 1024, {float32, bfloat16} x d {64, 128} x {full, causal} x 512 to 4096.
Both get the same tensors, in torch's favourite memory layout ([B, H, N, d], contiguous).

A shared machine changes its speed from one second to the next, so the two take turns call by call
within a cell, in changing order. A cell's result is the median of the ratios of neighbouring
calls: both calls of a pair saw the same neighbours. Medians and the best of each are beside it.

Before each call there is a pause: torch's OpenMP threads go on spinning for a while after a call,
and would take a core from whoever comes next (ours do not spin). Where ours follows torch at once,
short calls do pay for that, unless OMP_WAIT_POLICY=passive.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any, Callable

import anyflash
import torch
from anyflash.cli.facts import environment
from torch.nn.attention import SDPBackend, sdpa_kernel

METHOD = (
    "calls taken in turns, in changing order, 10 ms after each other; ours, torch: medians; ratio: "
    "median of the ratios of neighbouring calls; [B, H, N, d] contiguous tensors for both"
)
PAUSE_SECONDS = 0.01
HIDDEN = 1024
LENGTHS = (512, 1024, 2048, 4096)

Run = Callable[[], Any]


@dataclass
class Comparison:
    """One operation: its products, and a call of each contestant on q, k, v [1, H, N, d]."""

    products: int  # of N x N x d numbers
    contestants: Callable[..., tuple[Run, Run]]  # (q, k, v, causal) -> ours, torch's
    difference: Callable[[Any, Any], float]  # the largest, of what the two return


def pairs(first: Run, second: Run, seconds: float) -> list[tuple[float, float]]:
    """Seconds of a call of each, taken in turns for `seconds` and at least seven times; three times
    where that would take more than ten times `seconds`."""
    times: list[tuple[float, float]] = []
    first(), second()
    start = time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds or len(times) < 7:
        if passed > 10 * seconds and len(times) >= 3:
            break
        if len(times) % 2:
            b, a = timed(second), timed(first)
        else:
            a, b = timed(first), timed(second)
        times.append((a, b))
    return times


def timed(run: Run) -> float:
    time.sleep(PAUSE_SECONDS)
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def tensors(dtype: torch.dtype, d: int, seqlen: int) -> list[torch.Tensor]:
    """q, k, v [1, H, N, d]."""
    generator = torch.Generator().manual_seed(seqlen + d)
    shape = (1, HIDDEN // d, seqlen, d)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


def torch_flash(q: Any, k: Any, v: Any, causal: bool) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


def cell(
    comparison: Comparison, dtype: torch.dtype, d: int, causal: bool, seqlen: int, seconds: float
) -> dict[str, Any]:
    contestants = comparison.contestants(*tensors(dtype, d, seqlen), causal)
    difference = comparison.difference(*(run() for run in contestants))
    assert difference < (1e-4 if dtype == torch.float32 else 0.05), "results differ"
    times = pairs(*contestants, seconds)
    flops = 2 * comparison.products * HIDDEN * seqlen * seqlen / (2 if causal else 1)

    def speed(which: int, statistic: Callable[[Any], float]) -> float:
        return round(flops / statistic(pair[which] for pair in times) / 1e9, 1)

    return {
        "dtype": str(dtype).removeprefix("torch."),
        "d": d,
        "causal": causal,
        "seqlen": seqlen,
        "unit": "GFLOP/s",
        "ours": speed(0, statistics.median),
        "torch": speed(1, statistics.median),
        "ours_best": speed(0, min),
        "torch_best": speed(1, min),
        "ratio": round(statistics.median(b / a for a, b in times), 3),
        "calls": len(times),
    }


def grid(comparison: Comparison, seconds: float) -> Iterator[dict[str, Any]]:
    dtypes = (torch.float32, torch.bfloat16)
    for dtype, d, causal, seqlen in product(dtypes, (64, 128), (False, True), LENGTHS):
        yield cell(comparison, dtype, d, causal, seqlen, seconds)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = [line["ratio"] for line in cells]
    return {"geomean": round(statistics.geometric_mean(ratios), 3), "worst": min(ratios)}


def parser(description: str | None, out: Path) -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    result.add_argument("--seconds", type=float, default=3.0, help="of each cell")
    result.add_argument("--out", type=Path, default=out)
    return result


def measure(comparison: Comparison, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the grid, showing each cell as it comes. Returns the report."""
    os.environ["ANYFLASH_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)
    cells = []
    for line in grid(comparison, arguments.seconds):
        cells.append(line)
        mask = "causal" if line["causal"] else "full"
        print(
            f"{line['dtype']:9} d {line['d']:3} {mask:6} {line['seqlen']:5}"
            f"  ours {line['ours']:6.1f}  torch {line['torch']:6.1f} GFLOP/s  {line['ratio']:5.2f}x"
            f"  (best {line['ours_best']:6.1f}, {line['torch_best']:6.1f})",
            flush=True,
        )
    return {
        "method": METHOD,
        "cpu": processor(),
        "isa": environment()["cpu"]["isa"],
        "threads": arguments.threads,
        "load_average": round(os.getloadavg()[1], 1),  # above `threads`: others ran beside it
        "date": date.today().isoformat(),
        "anyflash": anyflash.__version__,
        "torch": torch.__version__,
        **summary(cells),
        "cells": cells,
    }


def write(report: dict[str, Any], out: Path) -> None:
    print(f"geometric mean {report['geomean']}x, worst cell {report['worst']}x")
    out.write_text(json.dumps(report, indent=1) + "\n")
