"""What gpu_forward.py and gpu_backward.py have in common: how they measure, and most of what."""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Callable

import torch
from gpu_peers import PEERS, measured, ours, takers
from gpu_problem import (
    HEAD_DIMS,
    LENGTHS,
    MASKS,
    Problem,
    Run,
    as_much_dense,
    dense,
    extra_problems,
)

SAMPLE_SECONDS = 2e-3
OPTIONS = ("window", "softcap", "alibi", "packed", "gqa")

Cell = dict[str, Any]
Job = Callable[[], Cell]
Part = Callable[[argparse.Namespace], Iterator[Job]]


def measure(candidates: dict[str, Run], seconds: float) -> dict[str, float]:
    """Median seconds of one call of each candidate."""
    repeats = {name: _repeats(run) for name, run in candidates.items()}
    names = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[names[0]]) < 5:
        for name in names:
            samples[name].append(_timed(candidates[name], repeats[name]))
        names.reverse()
    time.sleep(0.1)  # let the chip cool between cells
    return {name: statistics.median(times) for name, times in samples.items()}


def _repeats(run: Run) -> int:
    """Calls that fill one sample, measured after a warm-up."""
    for _ in range(3):
        run()
    return max(1, round(SAMPLE_SECONDS / _timed(run, 3)))


def _timed(run: Run, repeats: int) -> float:
    run()  # the GPU is busy with it while the host prepares what is timed
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3 / repeats


def cell(p: Problem, times: dict[str, float], **more: Any) -> Cell:
    """A cell of the record, in TFLOP/s."""
    speeds = {name: round(p.flops() / seconds / 1e12, 1) for name, seconds in times.items()}
    found = {"ours": speeds.pop("ours"), "peers": speeds, "unit": "TFLOP/s"}
    return {**p.described(), **more, **found}


def grid(backward: bool, settings: argparse.Namespace) -> Iterator[Job]:
    for d in HEAD_DIMS:
        for causal in MASKS:
            for seqlen in LENGTHS:
                yield partial(grid_cell, seqlen, d, causal, backward, settings)


def grid_cell(
    seqlen: int, d: int, causal: bool, backward: bool, settings: argparse.Namespace
) -> Cell:
    p = dense(seqlen, d, causal, backward)
    return cell(p, measure(takers(p, settings.peers), settings.seconds))


def options(backward: bool, settings: argparse.Namespace) -> Iterator[Job]:
    for d in HEAD_DIMS:
        for causal in MASKS:
            for name in OPTIONS:
                yield partial(option_cell, name, d, causal, backward, settings.seconds)


def option_cell(
    name: str, d: int, causal: bool, backward: bool, seconds: float, seqlen: int = 4096
) -> Cell:
    """The same work with an option and without."""
    plain = p = dense(seqlen, d, causal, backward)
    asked: dict[str, Any] = {}
    more: dict[str, Any] = {}
    if name == "window":
        reach = seqlen - 2
        p = replace(p, window=(reach, 0 if causal else reach))
    elif name == "softcap":
        asked = {"softcap": 30.0}
        more = {"options": asked}
    elif name == "alibi":
        asked = {"alibi_slopes": torch.linspace(0.01, 0.5, p.q.shape[2], device="cuda")}
        more = {"options": {"alibi": "h"}}
    elif name == "packed":
        q, k, v = (x.detach().flatten(0, 1).requires_grad_(backward) for x in (p.q, p.k, p.v))
        p = replace(p, q=q, k=k, v=v, packed=p.lengths)
    else:
        p = dense(seqlen, d, causal, backward, heads_k=p.q.shape[2] // 4)
    times = measure(
        {"ours": measured(p, ours(p, **asked)), "plain": measured(plain, ours(plain))}, seconds
    )
    if name == "window":  # that of the plain kernel, which sees one key more
        return {**cell(plain, times), "options": p.described()["options"]}
    return cell(p, times, **more)


def extra(backward: bool, settings: argparse.Namespace) -> Iterator[Job]:
    for make in extra_problems(backward):
        yield partial(extra_cell, make, settings.seconds)


def extra_cell(make: Callable[[], Problem], seconds: float) -> Cell:
    """Beside cuDNN, or FlashAttention-2 where torch does not give it to cuDNN."""
    p = make()
    runs = takers(p, ("cudnn", "fa2"), most=1)
    if not p.packed:
        return cell(p, measure(runs, seconds), part="extra")
    even = as_much_dense(p)
    times = measure({**runs, "dense": measured(even, ours(even))}, seconds)
    times["dense"] *= p.flops() / even.flops()
    return cell(p, times, part="extra")


def run_parts(text: str, parts: dict[str, Part]) -> int:
    """Measures the parts that are asked for; each cell is written at once, as a line of JSON."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in parts:
        parser.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--out", type=Path, help="append each cell as a line of JSON")
    parser.add_argument("--seconds", type=float, default=0.4, help="measuring time of a cell")
    parser.add_argument("--peers", default=",".join(PEERS), help="of the grid")
    settings = parser.parse_args()
    settings.peers = [name for name in settings.peers.split(",") if name]
    failures = 0
    for name, part in parts.items():
        for job in part(settings) if getattr(settings, name) else ():
            try:
                line = json.dumps(job())
            except Exception:  # the other cells are measured all the same
                traceback.print_exc()
                failures += 1
                continue
            print(line, flush=True)
            if settings.out:
                with settings.out.open("a") as file:
                    file.write(line + "\n")
    if failures:
        print(f"{failures} cells failed", flush=True)
    return 1 if failures else 0
