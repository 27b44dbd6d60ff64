"""``python -m anyflash bench``: anyflash against the standard attention and torch's, speed and
memory."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from anyflash.cli.bench_backends import (
    OURS,
    SDPA,
    STANDARD,
    Backend,
    Cell,
    OutOfMemory,
    choose,
    versions,
)
from anyflash.cli.console import Progress, UserError, megabytes, table
from anyflash.cli.facts import busy, require_library

MOST_ROUNDS = 50
STARTING_SECONDS = 5.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="default: bfloat16 on a GPU, float32 on the CPU",
    )
    parser.add_argument(
        "--d", type=int, nargs="+", default=[64, 128], help="head dims (default 64 128)"
    )
    parser.add_argument(
        "--seqlens",
        type=int,
        nargs="+",
        help="sequence lengths (default 512 to 16384 on a GPU, 512 to 4096 on the CPU)",
    )
    width = parser.add_mutually_exclusive_group()
    width.add_argument(
        "--hidden", type=int, help="heads x d (default 2048 on a GPU, 1024 on the CPU)"
    )
    width.add_argument("--heads", type=int, help="heads, instead of --hidden")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--tokens", type=int, help="batch x seqlen (default on a GPU: 16384)")
    size.add_argument(
        "--batch", type=int, help="batch, instead of --tokens (default on the CPU: 1)"
    )
    mask = parser.add_mutually_exclusive_group()
    mask.add_argument(
        "--causal", dest="masks", action="store_const", const=(True,), help="only causal"
    )
    mask.add_argument(
        "--full", dest="masks", action="store_const", const=(False,), help="only without a mask"
    )
    mask.add_argument(
        "--both", dest="masks", action="store_const", const=(False, True), help="both (the default)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=25.0,
        help="time to measure for; no size is begun after twice of it (default 25)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    parser.add_argument(
        "--plot", metavar="FILE", help="draw the results into this PNG file (needs matplotlib)"
    )
    parser.add_argument(
        "--host",
        action="store_true",
        help="what a call costs on the host instead: Python, autograd and the launch (needs torch)",
    )
    parser.set_defaults(masks=(False, True))


@dataclass
class Result:
    """A cell's outcome; by contestant: median seconds, TFLOP/s, peak bytes, or why there is none
    of them."""

    cell: Cell
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int | None] = field(default_factory=dict)
    difference: dict[str, float] = field(default_factory=dict)
    out_of_memory: dict[str, str] = field(default_factory=dict)

    def flops(self, name: str) -> float | None:
        """FLOP/s of a contestant."""
        return self.cell.flops / self.seconds[name] if name in self.seconds else None

    def ratio(self, name: str) -> float | None:
        """How many times faster anyflash is than this contestant."""
        if name not in self.seconds or OURS not in self.seconds:
            return None
        return self.seconds[name] / self.seconds[OURS]


def run(arguments: argparse.Namespace) -> int:
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: `pip install anyflash[bench]`", exit_code=1)
    for path in filter(None, (arguments.json, arguments.plot)):
        if not Path(path).resolve().parent.is_dir():
            raise UserError(
                f"cannot write {path}: there is no folder {Path(path).resolve().parent}"
            )
    require_library()
    backend = choose(arguments.device, arguments.dtype)
    if arguments.host:
        from anyflash.cli import bench_host

        report = bench_host.run(backend, arguments.seconds)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        return 0
    cells = grid(arguments, backend)
    hardware = backend.hardware()
    print(
        f"{hardware}; {', '.join(f'{k} {v}' for k, v in versions(backend).items())}; "
        f"{cells[0].dtype}"
    )
    remark = busy()
    results = measure_all(backend, cells, arguments.seconds)
    print(show(results, backend))
    if remark:
        print(remark)
    if len(results) < len(cells):
        print(
            f"{len(cells) - len(results)} of {len(cells)} sizes were left out: this machine is too "
            f"slow for them (or too busy) within --seconds {arguments.seconds:g}"
        )
    report = to_json(results, backend, hardware)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        from anyflash.cli.bench_plot import plot

        plot(report, Path(arguments.plot))
        print(f"plot: {arguments.plot}")
    return 0


def grid(arguments: argparse.Namespace, backend: Backend) -> list[Cell]:
    """The cells that the options ask for. Raises UserError for sizes that make no sense."""
    for name in ("d", "seqlens", "hidden", "heads", "tokens", "batch"):
        given = getattr(arguments, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < 1:
                raise UserError(f"--{name} {value}: at least 1")
    if any(d > 256 for d in arguments.d):
        raise UserError(f"--d {max(arguments.d)}: at most 256")
    seqlens = arguments.seqlens or [512 << i for i in range(6 if backend.on_gpu else 4)]
    dtype = arguments.dtype or ("bfloat16" if backend.on_gpu else "float32")
    hidden = arguments.hidden or (2048 if backend.on_gpu else 1024)
    tokens = arguments.tokens or (16384 if backend.on_gpu else None)
    cells = []
    for d in arguments.d:
        heads = arguments.heads or max(hidden // d, 1)
        for causal in arguments.masks:
            for seqlen in seqlens:
                batch = arguments.batch or (max(tokens // seqlen, 1) if tokens else 1)
                cells.append(Cell(d, heads, seqlen, batch, causal, dtype))
    return cells


def measure_all(backend: Backend, cells: list[Cell], seconds: float) -> list[Result]:
    """Measures the cells, the short sequences first. Each takes its first calls, however long they
    are: no further cell is begun after twice the time asked for (and time to start)."""
    results: dict[Cell, Result] = {}
    end = time.monotonic() + 2 * seconds + STARTING_SECONDS
    with Progress("benchmark", len(cells)) as progress:
        for cell in sorted(cells, key=lambda cell: cell.seqlen):
            if results and time.monotonic() > end:
                break
            mask = "causal" if cell.causal else "full"
            progress.note(f"d {cell.d} {mask} {cell.seqlen} tokens x {cell.batch}")
            results[cell] = measure(backend, cell, seconds / len(cells))
            progress.step()
    return [results[cell] for cell in cells if cell in results]


def measure(backend: Backend, cell: Cell, seconds: float) -> Result:
    """Runs the contestants in turn until `seconds` are used, each at least once after a first
    call that is not timed but tells the memory it takes and what it computes."""
    result = Result(cell)
    calls = backend.calls(cell)
    share = seconds / len(calls)
    rounds = {}
    ours = None
    for name, call in calls.items():
        start = time.perf_counter()
        try:
            backend.refuse(name, cell)
            result.peak_bytes[name], output = backend.peak(call)
            if name == OURS:
                ours = output
            elif ours is not None:
                result.difference[name] = backend.difference(name, ours, output)
            del output
            once = time.perf_counter() - start
            if once < share:  # else there is time for one more call alone
                start = time.perf_counter()
                backend.seconds(call)
                once = time.perf_counter() - start
        except OutOfMemory as error:
            result.out_of_memory[name] = str(error)
            continue
        rounds[name] = max(1, min(MOST_ROUNDS, int(share / max(once, 1e-6))))
    del ours
    times: dict[str, list[float]] = {name: [] for name in rounds}
    for turn in range(max(rounds.values(), default=0)):
        for name in rounds:
            if turn < rounds[name]:
                times[name].append(backend.seconds(calls[name]))
    result.seconds = {name: statistics.median(values) for name, values in times.items()}
    calls.clear()
    backend.release()
    return result


def show(results: list[Result], backend: Backend) -> str:
    """The table: speed of each, how many times faster anyflash is, memory that a call adds."""
    names = [
        name
        for name in (OURS, STANDARD, SDPA)
        if any(_took_part(name, result) for result in results)
    ]
    unit, scale = ("TFLOP/s", 1e12) if backend.on_gpu else ("GFLOP/s", 1e9)
    others = names[1:]
    heads = ["mask", "d", "seqlen", "batch", "heads"]
    heads += [f"{name} {unit}" if name == OURS else name for name in names]
    heads += [f"x {name}" for name in others] + [f"{name} MB" for name in names]
    lines = []
    for result in results:
        cell = result.cell
        line = [
            "causal" if cell.causal else "full",
            *map(str, (cell.d, cell.seqlen, cell.batch, cell.heads)),
        ]
        line += [_flops(result, name, scale) for name in names]
        line += [
            "-" if result.ratio(name) is None else f"{result.ratio(name):.2f}" for name in others
        ]
        line += [megabytes(result.peak_bytes.get(name)) for name in names]
        lines.append(line)
    text = [table(heads, lines)]
    for name in others:
        ratios = [ratio for result in results if (ratio := result.ratio(name))]
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            text.append(
                f"anyflash is {mean:.2f} times as fast as {name} (geometric mean; from "
                f"{min(ratios):.2f} to {max(ratios):.2f})"
            )
    reasons = {f"{name}: {why}" for result in results for name, why in result.out_of_memory.items()}
    text += [f"out of memory: {reason}" for reason in sorted(reasons)]
    differences = [value for result in results for value in result.difference.values()]
    if differences:
        text.append(f"largest difference between the results of any two: {max(differences):.1e}")
    return "\n".join(text)


def _took_part(name: str, result: Result) -> bool:
    return name in result.seconds or name in result.out_of_memory


def _flops(result: Result, name: str, scale: float) -> str:
    flops = result.flops(name)
    if flops is None:
        return "out of memory" if name in result.out_of_memory else "-"
    return f"{flops / scale:.0f}" if flops >= 10 * scale else f"{flops / scale:.1f}"


def to_json(results: list[Result], backend: Backend, hardware: str) -> dict[str, Any]:
    """The results as they are written by --json; one entry a cell, named as in the project's
    records."""
    unit, scale = ("TFLOP/s", 1e12) if backend.on_gpu else ("GFLOP/s", 1e9)
    entries = []
    for result in results:
        flops = {name: result.flops(name) for name in (OURS, STANDARD, SDPA)}
        rates = {name: value / scale for name, value in flops.items() if value is not None}
        cell = asdict(result.cell)
        entries.append(
            {
                **cell,
                "dv": result.cell.d,
                "heads_k": result.cell.heads,
                "ours": rates.pop(OURS, None),
                "peers": rates,
                "unit": unit,
                "seconds": result.seconds,
                "peak_bytes": result.peak_bytes,
                "difference": result.difference,
                "out_of_memory": result.out_of_memory,
            }
        )
    date = time.strftime("%Y-%m-%d", time.gmtime())
    return {
        "date": date,
        "hardware": hardware,
        "device": "cuda" if backend.on_gpu else "cpu",
        "versions": versions(backend),
        "bench": entries,
    }
