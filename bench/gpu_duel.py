"""Several installations take turns on one GPU, cell by cell: what a change gives.

usage: python bench/gpu_duel.py --cells d128/causal/512,packed128/full before after cudnn

before, after: folders into which a wheel was installed (pip install --target); cudnn: through the
first of them. Cells: d or dxdv, mask, length, perhaps /backward; packed: 64 sequences of log-normal
lengths, mean 1k. Each installation has a process of its own, so that a cell's rounds follow one
another within a second: between two runs the clock alone may differ by more than a change gives.
Prints TFLOP/s, the median of the rounds (in brackets: over the first).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu_problem import Problem

SECONDS = 0.02  # of one round


def work(name: str) -> None:
    """One installation: answers each cell that it reads with its TFLOP/s."""
    import gpu_bench
    from gpu_peers import cudnn, measured, ours

    answered = ""
    for line in sys.stdin:
        if line != answered:
            problem = problem_of(line.strip())
            run = measured(problem, (cudnn if name == "cudnn" else ours)(problem))
            answered = line
        seconds = gpu_bench.measure({name: run}, SECONDS)[name]
        print(problem.flops() / seconds / 1e12, flush=True)


def problem_of(cell: str) -> Problem:
    from gpu_problem import dense, log_normal_lengths, packed

    columns, mask, *more = cell.split("/")
    causal, backward = mask == "causal", "backward" in more
    if columns.startswith("packed"):
        d = int(columns.removeprefix("packed"))
        return packed(log_normal_lengths(), d, causal, backward)
    d, dv = (columns.removeprefix("d").split("x") * 2)[:2]
    return dense(int(more[0]), int(d), causal, backward, dv=int(dv))


def start(name: str, first: str) -> subprocess.Popen[str]:
    path = first if name == "cudnn" else name
    return subprocess.Popen(
        [sys.executable, __file__, "--work", name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def ask(process: subprocess.Popen[str], cell: str) -> float:
    assert process.stdin and process.stdout
    process.stdin.write(cell + "\n")
    process.stdin.flush()
    return float(process.stdout.readline() or "nan")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", default="d128/causal/4096", help="separated by commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*", help="folders, or cudnn")
    options = parser.parse_args()
    if options.work:
        return work(options.work)
    workers = {name: start(name, options.names[0]) for name in options.names}
    for cell in options.cells.split(","):
        got: dict[str, list[float]] = {name: [] for name in workers}
        for _ in range(options.rounds):
            for name, process in workers.items():
                got[name].append(ask(process, cell))
        medians = {name: statistics.median(times) for name, times in got.items()}
        first = medians[options.names[0]]
        print(f"{cell:24}", *(f"{n} {x:.0f} ({x / first:.3f})" for n, x in medians.items()))
    for process in workers.values():
        process.communicate()


if __name__ == "__main__":
    main()
