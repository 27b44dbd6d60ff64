"""Backward speed on a GPU: ours and its peers in one run; medians.

usage: python bench/gpu_backward.py [--grid] [--options] [--deterministic] [--extra] [--cycles]
         [--peers cudnn,fa4,fa2] [--out cells.jsonl] [--seconds S]

--deterministic  what dQ that is the same from run to run costs, at 1k, 4k and 16k
--grid, --options, --extra, --cycles, and the method: as gpu_forward.py

All sides are torch.autograd.grad of an output that was computed before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial

from gpu_bench import Cell, Job, cell, extra, grid, measure, options, run_parts
from gpu_cycles import cycles
from gpu_peers import measured, ours
from gpu_problem import HEAD_DIMS, MASKS, dense


def deterministic(settings: argparse.Namespace) -> Iterator[Job]:
    for d in HEAD_DIMS:
        for causal in MASKS:
            for seqlen in (1024, 4096, 16384):
                yield partial(deterministic_cell, seqlen, d, causal, settings.seconds)


def deterministic_cell(seqlen: int, d: int, causal: bool, seconds: float) -> Cell:
    p = dense(seqlen, d, causal, backward=True)
    runs = {"ours": ours(p, deterministic=True), "plain": ours(p)}
    times = measure({name: measured(p, run) for name, run in runs.items()}, seconds)
    return cell(p, times, deterministic=True)


def main() -> int:
    parts = {
        "grid": partial(grid, True),
        "options": partial(options, True),
        "deterministic": deterministic,
        "extra": partial(extra, True),
        "cycles": partial(cycles, True),
    }
    return run_parts(__doc__, parts)


if __name__ == "__main__":
    sys.exit(main())
