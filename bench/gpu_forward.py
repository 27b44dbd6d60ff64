"""Forward speed on a GPU: ours and its peers in one run; medians.

usage: python bench/gpu_forward.py [--grid] [--host] [--options] [--extra] [--cycles]
         [--peers cudnn,fa4,fa2] [--out cells.jsonl] [--seconds S]

--grid     d 64, 128, 256 x full, causal x 512 to 16k: 16k tokens, hidden 2048, bf16, in TFLOP/s
--host     microseconds of host time per call, of a problem too small to keep the GPU busy
--options  what window, softcap, ALiBi, packed sequences and GQA cost over the plain kernel at 4k;
           the window covers every key but one, so that the work is the same
--extra    GQA at 8k, d 96, d 192 with values of 128, a window of 1024 at 16k and 64k, packed
           sequences of log-normal lengths; beside cuDNN, or FlashAttention-2 where that has it
--cycles   cycles of the GPU at 4k and 16k, by Nsight Compute (gpu_cycles.py)

Each cell is a line of JSON, written as soon as it is measured. The candidates of a cell take turns,
in changing order, so that clocks and heat treat them alike. Peers: cuDNN and FlashAttention-2
through torch, FlashAttention-4 where it is installed (pip install flash-attn-4[cu13]); one that
does not take a problem, or computes something else, is left out of the cell.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial

import torch
from gpu_bench import Cell, Job, cell, extra, grid, options, run_parts
from gpu_cycles import cycles
from gpu_peers import ours
from gpu_problem import Run, dense
from torch.nn.attention import SDPBackend, sdpa_kernel


def host(settings: argparse.Namespace) -> Iterator[Job]:
    yield host_cell


def host_cell(calls: int = 200, rounds: int = 15) -> Cell:
    """Host time of a call that gives the GPU next to nothing to do."""
    p = dense(16, 64, False, heads=1, batch=1)
    q, k, v = (x.transpose(1, 2) for x in (p.q, p.k, p.v))
    candidates: dict[str, Run] = {
        "ours": ours(p),
        "fa2": partial(torch.nn.functional.scaled_dot_product_attention, q, k, v),
    }
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.no_grad():
        for _ in range(rounds):
            for name, run in candidates.items():
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    run()
                samples[name].append((time.perf_counter() - start) / calls * 1e6)
    times = {name: round(statistics.median(values), 2) for name, values in samples.items()}
    line = cell(p, {"ours": 1.0}, options={"measured": "host time per call"})
    return {**line, "ours": times["ours"], "peers": {"fa2": times["fa2"]}, "unit": "us"}


def main() -> int:
    parts = {
        "grid": partial(grid, False),
        "host": host,
        "options": partial(options, False),
        "extra": partial(extra, False),
        "cycles": partial(cycles, False),
    }
    return run_parts(__doc__, parts)


if __name__ == "__main__":
    sys.exit(main())
