"""Forward speed on the CPU: ours and torch's `scaled_dot_product_attention` (its flash path) in one
run, on the same threads.

usage: python bench/cpu_forward.py [--threads N] [--seconds S] [--out FILE] [--options]

The grid: batch 1, hidden 1024, {float32, bfloat16} x d {64, 128} x {full, causal} x 512 to 4096.
Both get the same tensors, in torch's favourite memory layout ([B, H, N, d], contiguous).

A shared machine changes its speed from one second to the next, so the two take turns call by call
within a cell, in changing order. A cell's result is the median of the ratios of neighbouring
calls: both calls of a pair saw the same neighbours. Medians and the best of each are beside it.

--options measures what each option costs over the plain kernel, at 2048 tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Callable

import anyflash
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

METHOD = (
    "calls taken in turns, in changing order; ours, torch: medians; ratio: median of the ratios of "
    "neighbouring calls; [B, H, N, d] contiguous tensors for both"
)
HIDDEN = 1024
LENGTHS = (512, 1024, 2048, 4096)

Run = Callable[[], Any]


def pairs(first: Run, second: Run, seconds: float) -> list[tuple[float, float]]:
    """Seconds of a call of each, taken in turns for `seconds` and at least seven times."""
    times: list[tuple[float, float]] = []
    first(), second()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 7:
        if len(times) % 2:
            b, a = timed(second), timed(first)
        else:
            a, b = timed(first), timed(second)
        times.append((a, b))
    return times


def timed(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def tensors(dtype: torch.dtype, d: int, seqlen: int) -> list[torch.Tensor]:
    """q, k, v [1, H, N, d]."""
    generator = torch.Generator().manual_seed(seqlen + d)
    shape = (1, HIDDEN // d, seqlen, d)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


def ours(q: Any, k: Any, v: Any, **options: Any) -> Run:
    return partial(anyflash.attention, *(x.transpose(1, 2) for x in (q, k, v)), **options)


def torch_flash(q: Any, k: Any, v: Any, causal: bool) -> Run:
    def run() -> Any:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return run


def cell(dtype: torch.dtype, d: int, causal: bool, seqlen: int, seconds: float) -> dict[str, Any]:
    q, k, v = tensors(dtype, d, seqlen)
    candidates = ours(q, k, v, causal=causal), torch_flash(q, k, v, causal)
    difference = (candidates[0]().transpose(1, 2).float() - candidates[1]().float()).abs().max()
    assert difference < (1e-4 if dtype == torch.float32 else 0.05), "results differ"
    times = pairs(*candidates, seconds)
    flops = 4 * HIDDEN * seqlen * seqlen / (2 if causal else 1)

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


def grid(seconds: float) -> Iterator[dict[str, Any]]:
    dtypes = (torch.float32, torch.bfloat16)
    for dtype, d, causal, seqlen in product(dtypes, (64, 128), (False, True), LENGTHS):
        yield cell(dtype, d, causal, seqlen, seconds)


def option_costs(seconds: float, d: int = 64, seqlen: int = 2048) -> Iterator[dict[str, Any]]:
    """Time of each option over that of the same work without it."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = tensors(dtype, d, seqlen)
        slopes = torch.linspace(0.01, 0.5, q.shape[1])
        few = [x[:, : x.shape[1] // 4] for x in (k, v)]
        for name, run in {
            "softcap": ours(q, k, v, softcap=30.0),
            "alibi": ours(q, k, v, alibi_slopes=slopes),
            "window": ours(q, k, v, window=(seqlen - 2, seqlen - 2)),
            "gqa 4": ours(q, *few),
        }.items():
            times = pairs(run, ours(q, k, v), seconds)
            yield {
                "dtype": str(dtype).removeprefix("torch."),
                "d": d,
                "seqlen": seqlen,
                "option": name,
                "cost": round(statistics.median(a / b for a, b in times) - 1, 3),
            }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()


def geometric_mean(ratios: list[float]) -> float:
    return round(math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios)), 3)


def summary(cells: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = [line["ratio"] for line in cells]
    return {"geomean": geometric_mean(ratios), "worst": min(ratios)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=3.0, help="of each cell")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--options", action="store_true", help="also what each option costs")
    arguments = parser.parse_args()
    os.environ["ANYFLASH_NUM_THREADS"] = str(arguments.threads)
    torch.set_num_threads(arguments.threads)

    cells = []
    for line in grid(arguments.seconds):
        cells.append(line)
        mask = "causal" if line["causal"] else "full"
        print(
            f"{line['dtype']:9} d {line['d']:3} {mask:6} {line['seqlen']:5}"
            f"  ours {line['ours']:6.1f}  torch {line['torch']:6.1f} GFLOP/s  {line['ratio']:5.2f}x"
            f"  (best {line['ours_best']:6.1f}, {line['torch_best']:6.1f})",
            flush=True,
        )
    report = {
        "method": METHOD,
        "cpu": processor(),
        "threads": arguments.threads,
        "load_average": round(os.getloadavg()[1], 1),  # above `threads`: others ran beside it
        "date": date.today().isoformat(),
        "anyflash": anyflash.__version__,
        "torch": torch.__version__,
        **summary(cells),
        "cells": cells,
    }
    if arguments.options:
        report["options"] = []
        for line in option_costs(arguments.seconds):
            report["options"].append(line)
            print(f"{line['dtype']:9} {line['option']:8} {100 * line['cost']:+6.1f} %", flush=True)
    print(f"geometric mean {report['geomean']}x, worst cell {report['worst']}x")
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
