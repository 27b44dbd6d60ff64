"""Tests, sanitizers and benchmarks on a GPU, from a built wheel, into the record.

On the machine with the GPU (needs Python with torch; nothing is downloaded):

  python tools/gpu_check.py --wheel dist/*.whl --tests --sanitizers all --bench all --out DIR

--op bwd does the same for the backward. --torch runs the package's tests of PyTorch on the GPU
(streams, graphs, compile, autocast, checkpoints, SDPA): both directions, by the rows that the image
gives.

Anywhere:

  python tools/gpu_check.py --import DIR      merge the record of such a run into the project's,
                                              and write the tables of the docs anew
  python tools/gpu_check.py --check-record    one line: which sections are stale; exit 0 if none

--images: "sm_90" (or what the GPU is) is the native image, "compute_80" the PTX that the driver
compiles, "rows_86" the rows of another GPU generation (8.6) compiled for this GPU.
Every step has the time that is left of --limit; what a step has finished by then is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import gpu_record
from gpu_record import ROOT

# What each operation of the record is checked by: its name in the table, tests, benchmark.
TABLE_OPS = {"fwd": "forward", "bwd": "backward"}
TESTS = {
    "fwd": ["test_forward.py", "test_rows.py", "test_gpu.py"],
    "bwd": ["test_backward.py", "test_backward_rows.py"],
}
# With ANYFLASH_TEST_DEVICE these run on the GPU.
TORCH_TESTS = ["test_torch_*.py", "test_sdpa.py"]
BENCHES = {
    "fwd": ["bench/gpu_forward.py", "--grid", "--host", "--options"],
    "bwd": ["bench/gpu_backward.py", "--grid", "--options"],
}

SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass
class Image:
    """One way through which the kernels reach the GPU: its name in the record, and how to ask."""

    name: str
    environment: dict[str, str]


def image_of(name: str) -> Image:
    if match := re.fullmatch(r"sm_(\d+a?)", name):
        return Image(name, {"ANYFLASH_IMAGE": name})
    if match := re.fullmatch(r"compute_(\d+)", name):
        # Rows as a GPU gets them for which there is no image: those of the PTX's own generation.
        return Image(f"{name} PTX", {"ANYFLASH_IMAGE": name, "ANYFLASH_PLAN_FOR": match[1]})
    if match := re.fullmatch(r"rows_(\d+)", name):
        return Image(f"rows of sm_{match[1]}", {"ANYFLASH_PLAN_FOR": match[1]})
    raise SystemExit(f"--images: {name!r} is none of sm_NN, compute_NN, rows_NN")


@dataclass
class Clock:
    """What is left of the time that the whole run may take."""

    limit: float
    start: float = field(default_factory=time.monotonic)

    def left(self, at_most: float = float("inf")) -> float:
        return max(1.0, min(at_most, self.limit - (time.monotonic() - self.start)))

    def out(self) -> bool:
        return time.monotonic() - self.start >= self.limit


@dataclass
class Output:
    text: str
    status: int | None  # None: ran out of time


def run(command: Sequence[str], environment: dict[str, str], log: Path, seconds: float) -> Output:
    """Runs a command, appending to a log; ends it and its children when the time is over."""
    with log.open("a") as file:
        file.write(f"\n==== {' '.join(map(str, command))}\n")
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
    text = log.read_bytes()[begin:].decode(errors="replace")
    return Output(text, status)


def count_tests(text: str) -> dict[str, int]:
    """The outcomes in the output of pytest -v; an error counts as a failure."""
    words = re.findall(r"^\S+::.* (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b", text, re.MULTILINE)
    return {
        "passed": words.count("PASSED"),
        "failed": words.count("FAILED") + words.count("ERROR"),
        "skipped": words.count("SKIPPED"),
    }


def count_errors(text: str) -> int | None:
    """The errors in compute-sanitizer's summary; None if there is no summary."""
    if match := re.search(r"ERROR SUMMARY: (\d+) error", text):
        return int(match[1])
    if match := re.search(r"RACECHECK SUMMARY: (\d+) hazard", text):
        return int(match[1])
    return None


def count_cases(text: str) -> int | None:
    """What sanitize_rows.py says in its last line."""
    match = re.search(r"^cases: (\d+), rows reached", text, re.MULTILINE)
    return int(match[1]) if match else None


def read_cells(path: Path) -> list[dict[str, Any]]:
    """The cells measured so far; a line cut off by the end of the time is dropped."""
    cells = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            cells.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return cells


class Check:
    """One run on this machine. `out` gets log.txt and, after each step, record.json; `work` is
    for what nobody needs afterwards."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self.arguments = arguments
        self.work = work
        self.out: Path = arguments.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = self.out / "log.txt"
        self.log.write_text("")
        self.clock = Clock(arguments.limit)
        self.sections: list[gpu_record.Section] = []
        self.remarks: list[str] = []
        self.environment = dict(os.environ, PYTHONUNBUFFERED="1")
        # A cache of its own: what this run compiles at run time is compiled from this tree.
        self.environment.setdefault("ANYFLASH_CACHE_DIR", str(work / "cache"))

    def install(self, wheel: Path) -> None:
        """The wheel without anything else of the tree: tests must not find the checkout."""
        site = self.work / "site"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
        command += ["--no-compile", "--upgrade", "--target", str(site), str(wheel)]
        output = run(command, self.environment, self.log, self.clock.left(120))
        if output.status != 0:
            raise SystemExit(f"the wheel does not install:\n{output.text}")
        path = os.pathsep.join(filter(None, [str(site), self.environment.get("PYTHONPATH")]))
        self.environment["PYTHONPATH"] = path

    def section(self, image: Image) -> gpu_record.Section:
        gpu, driver = gpu_facts()
        op, family = self.arguments.op, self.arguments.family
        return {
            "op": op,
            "family": family,
            "image": image.name,
            "hash": gpu_record.source_hash(op, family),
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            "gpu": gpu,
            "driver": driver,
            "tests": {"passed": 0, "failed": 0, "skipped": 0},
            "sanitizers": {},
            "bench": [],
        }

    def check_image(self, image: Image) -> None:
        section = self.section(image)
        self.sections.append(section)
        label = image.name.replace(" ", "_")
        environment = {**self.environment, **image.environment}
        if self.arguments.tests:
            files = [f"tests/device/{name}" for name in TESTS[self.arguments.op]]
            self.test(section, "tests", files, environment, label)
        if self.arguments.torch:
            found = (path for name in TORCH_TESTS for path in (ROOT / "tests/python").glob(name))
            files = [path.relative_to(ROOT).as_posix() for path in sorted(found)]
            on_gpu = {**environment, "ANYFLASH_TEST_DEVICE": "cuda"}
            self.test(section, "torch_tests", files, on_gpu, label)
        for tool in self.arguments.sanitizers:
            self.sanitize(section, environment, label, tool)
        if self.arguments.bench:
            self.bench(section, environment, label)

    def test(
        self,
        section: gpu_record.Section,
        field: str,
        files: list[str],
        environment: dict[str, str],
        label: str,
    ) -> None:
        """Runs pytest on these files; the counts go into this field of the section."""
        what = f"{field.replace('_', ' ')} of {label}"
        if self._no_time(what):
            return
        command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
        command += files + self.arguments.pytest
        output = run(command, environment, self.log, self.clock.left())
        counts = count_tests(output.text)
        print(f"{what}: {counts}", flush=True)
        if output.status is None:
            self.remarks.append(f"{what}: out of time after {counts}: not recorded")
        elif output.status not in (0, 1):
            self.remarks.append(f"{what}: pytest ended with {output.status}")
        elif not self.arguments.pytest:
            section[field] = counts
        failures = [line for line in output.text.splitlines() if line.startswith("FAILED")]
        self.remarks += failures[:20]
        self.save()

    def sanitize(
        self, section: gpu_record.Section, environment: dict[str, str], label: str, tool: str
    ) -> None:
        if self._no_time(f"{tool} of {label}"):
            return
        command = [find_sanitizer(), "--tool", tool, "--print-limit", "30"]
        command += ["--report-api-errors", "no"] if tool == "memcheck" else []
        command += [sys.executable, "tests/device/sanitize_rows.py"]
        command += ["--op", TABLE_OPS[self.arguments.op], "--family", self.arguments.family]
        output = run(
            command, environment, self.log, self.clock.left(self.arguments.sanitizer_limit)
        )
        errors, cases = count_errors(output.text), count_cases(output.text)
        print(f"{label}: {tool}: {cases} cases, {errors} errors", flush=True)
        if errors is None or cases is None or (output.status != 0 and not errors):
            tail = " | ".join(output.text.splitlines()[-3:])
            self.remarks.append(f"{tool} of {label}: no result ({output.status}): {tail}")
        else:
            explained = self.arguments.explained.get(tool, 0)
            section["sanitizers"][tool] = {
                "cases": cases,
                "errors": errors,
                "explained": min(explained, errors),
            }
        self.save()

    def bench(self, section: gpu_record.Section, environment: dict[str, str], label: str) -> None:
        if self._no_time(f"benchmarks of {label}"):
            return
        cells = self.work / f"bench_{label}.jsonl"
        script, *parts = BENCHES[self.arguments.op]
        parts = parts if self.arguments.bench == "all" else ["--grid"]
        command = [sys.executable, script, *parts, "--out", str(cells)]
        command += ["--seconds", str(self.arguments.bench_seconds)]
        output = run(command, environment, self.log, self.clock.left())
        section["bench"] = read_cells(cells)
        if output.status != 0:
            tail = " | ".join(output.text.splitlines()[-3:])
            ended = "out of time" if output.status is None else f"ended with {output.status}"
            self.remarks.append(f"benchmarks of {label}: {ended}: {tail}")
        self.save()

    def _no_time(self, what: str) -> bool:
        if self.clock.out():
            self.remarks.append(f"{what}: not started, out of time")
        return self.clock.out()

    def save(self) -> None:
        gpu_record.write({"sections": self.sections}, self.out / "record.json")

    def report(self) -> None:
        """The short table last: it is what a person sees first."""
        for remark in self.remarks:
            print("!", remark)
        for section in self.sections:
            print("\n".join(gpu_record.summary(section)))


def gpu_facts() -> tuple[str, str]:
    """Name and driver version of the first GPU."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout
        name, driver = (part.strip() for part in text.splitlines()[0].split(","))
    except (OSError, IndexError, ValueError, subprocess.TimeoutExpired):
        return "unknown", "unknown"
    return name, driver


def find_sanitizer() -> str:
    found = shutil.which("compute-sanitizer")
    return found or "/usr/local/cuda/bin/compute-sanitizer"


def check_here(arguments: argparse.Namespace) -> int:
    """The run on the GPU machine."""
    with tempfile.TemporaryDirectory() as folder:
        check = Check(arguments, Path(folder))
        check.install(arguments.wheel)
        for name in arguments.images:
            check.check_image(image_of(name))
        check.save()
        check.report()
    failed = any(gpu_record.failures(section) for section in check.sections)
    return 1 if failed or check.remarks else 0


def import_record(folder: Path, path: Path = gpu_record.RECORD) -> None:
    """Merges the record.json of a run into the project's; sections of other sources are refused."""
    new = gpu_record.read(folder / "record.json" if folder.is_dir() else folder)
    for section in new["sections"]:
        current = gpu_record.source_hash(section["op"], section["family"])
        if section["hash"] != current:
            raise SystemExit(
                f"{' '.join(gpu_record.key_of(section))} was run from other sources "
                f"({section['hash']}, these are {current})"
            )
    gpu_record.write(gpu_record.merge(gpu_record.read(path), new["sections"]), path)


def words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheel", type=Path, help="the wheel to check")
    parser.add_argument("--tests", action="store_true", help="tests/device with pytest")
    parser.add_argument("--torch", action="store_true", help="the tests of PyTorch, on the GPU")
    parser.add_argument(
        "--pytest",
        nargs=argparse.REMAINDER,
        default=[],
        help="last: more arguments for pytest; counts of such a run are not recorded",
    )
    parser.add_argument("--sanitizers", type=words, default=[], help='"all", or some, by comma')
    parser.add_argument("--sanitizer-limit", type=float, default=150, help="seconds of one tool")
    parser.add_argument("--explained", default="", help="tool=N,...: reports that are understood")
    parser.add_argument("--bench", choices=("all", "grid"), help="all: also options, host time")
    parser.add_argument("--bench-seconds", type=float, default=0.4, help="of one cell")
    parser.add_argument("--images", type=words, default=["sm_90", "compute_80"])
    parser.add_argument("--op", default="fwd", choices=tuple(TABLE_OPS))
    parser.add_argument("--family", default="sm80")
    parser.add_argument("--limit", type=float, default=560, help="seconds of the whole run")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="logs, record.json")
    parser.add_argument("--check-record", action="store_true", help="which sections are stale")
    parser.add_argument("--import", dest="import_from", type=Path, metavar="DIR")
    arguments = parser.parse_args(argv)
    if arguments.sanitizers == ["all"]:
        arguments.sanitizers = list(SANITIZERS)
    if unknown := set(arguments.sanitizers) - set(SANITIZERS):
        parser.error(f"--sanitizers: {sorted(unknown)} are none of {', '.join(SANITIZERS)}")
    arguments.explained = {
        tool: int(count) for tool, count in (pair.split("=") for pair in words(arguments.explained))
    }
    if not (arguments.check_record or arguments.import_from or arguments.wheel):
        parser.error("one of --wheel, --import and --check-record is needed")
    return arguments


def main() -> int:
    arguments = parse()
    if arguments.import_from:
        import_record(arguments.import_from)
        for script in ("generate_docs.py", "update_tables.py"):
            subprocess.run([sys.executable, str(ROOT / "tools" / script)], check=True)
    if arguments.check_record:
        line, fresh = gpu_record.check_line(gpu_record.read())
        print(line)
        return 0 if fresh else 1
    return check_here(arguments) if arguments.wheel else 0


if __name__ == "__main__":
    sys.exit(main())
