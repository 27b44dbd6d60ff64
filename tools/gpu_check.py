"""Tests, sanitizers and benchmarks on a GPU, from a built wheel, into the record.

On the machine with the GPU (needs Python with torch; nothing is downloaded):

  python tools/gpu_check.py --wheel dist/*.whl --tests --sanitizers all --bench all --out DIR

This checks every section that the record must have; --sections names some: fwd/sm90/sm_90a is the
forward by the family sm90 through the image sm_90a. --torch runs the package's tests of PyTorch on
the GPU too (streams, graphs, compile, autocast, checkpoints, SDPA): both directions, by the rows
that the image gives. Tests and sanitizers run side by side, benchmarks alone, one after the other.

Anywhere:

  python tools/gpu_check.py --import DIR      merge the record of such a run into the project's,
                                              and write the tables of the docs anew
  python tools/gpu_check.py --check-record    one line: which sections are stale; exit 0 if none

Images: "sm_90" (or what the GPU is) is the native image, "compute_80" the PTX that the driver
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
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
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
    "bwd": ["bench/gpu_backward.py", "--grid", "--options", "--deterministic"],
}
# What the newest kernels are measured by besides; FlashAttention-4 is a peer of theirs alone, since
# it compiles each of its kernels anew in each run.
NEWEST_FAMILY, NEWEST_PARTS = "sm90", ["--extra", "--cycles"]
OLDER_PEERS = ["--peers", "cudnn,fa2"]

SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Kernels of which no lane arrives at a barrier for others (tests/README.md, "What racecheck
# reports"); compiled on first use.
EVERY_THREAD_ARRIVES = {"ANYFLASH_COMPILE_OPTIONS": "-DANYFLASH_EVERY_THREAD_ARRIVES"}


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
        return max(1.0, min(at_most, self.limit - self.spent()))

    def out(self) -> bool:
        return self.spent() >= self.limit

    def spent(self) -> float:
        return time.monotonic() - self.start


@dataclass
class Output:
    text: str
    status: int | None  # None: ran out of time


def run(command: Sequence[str], environment: dict[str, str], log: Path, seconds: float) -> Output:
    """Runs a command, its output in a file; ends it and its children when the time is over."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
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
    return Output(log.read_text(errors="replace"), status)


def count_tests(text: str) -> dict[str, int]:
    """The outcomes in the output of pytest -v; an error counts as a failure."""
    words = re.findall(r"^\S+::.* (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b", text, re.MULTILINE)
    return {
        "passed": words.count("PASSED"),
        "failed": words.count("FAILED") + words.count("ERROR"),
        "skipped": words.count("SKIPPED"),
    }


def count_errors(text: str) -> int | None:
    """The errors in compute-sanitizer's summary, printed or not; None if there is no summary."""
    if match := re.search(r"ERROR SUMMARY: (\d+) error", text):
        return int(match[1])
    if match := re.search(r"RACECHECK SUMMARY: .*\((\d+) errors?, (\d+) warnings?\)", text):
        return int(match[1]) + int(match[2])
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
    """One run on this machine. `out` gets a log of each step and, after each, record.json; `work`
    is for what nobody needs afterwards."""

    def __init__(self, arguments: argparse.Namespace, work: Path) -> None:
        self.arguments = arguments
        self.work = work
        self.out: Path = arguments.out
        self.out.mkdir(parents=True, exist_ok=True)
        self.clock = Clock(arguments.limit)
        self.machine = gpu_facts()
        self.sections = [self.section(*key) for key in arguments.sections]
        self.remarks: list[str] = []
        self.lock = threading.Lock()
        self.environment = dict(os.environ, PYTHONUNBUFFERED="1")
        # A cache of its own: what this run compiles at run time is compiled from this tree.
        self.environment.setdefault("ANYFLASH_CACHE_DIR", str(work / "cache"))

    def install(self, wheel: Path) -> None:
        """The wheel without anything else of the tree: tests must not find the checkout."""
        site = self.work / "site"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
        command += ["--no-compile", "--upgrade", "--target", str(site), str(wheel)]
        output = run(command, self.environment, self.log("install"), self.clock.left(120))
        if output.status != 0:
            raise SystemExit(f"the wheel does not install:\n{output.text}")
        path = os.pathsep.join(filter(None, [str(site), self.environment.get("PYTHONPATH")]))
        self.environment["PYTHONPATH"] = path

    def section(self, op: str, family: str, image: str) -> gpu_record.Section:
        return {
            "op": op,
            "family": family,
            "image": image_of(image).name,
            "hash": gpu_record.source_hash(op, family),
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            "gpu": self.machine[0],
            "driver": self.machine[1],
            "tests": {"passed": 0, "failed": 0, "skipped": 0},
            "sanitizers": {},
            "bench": [],
        }

    def check(self) -> None:
        """What is right or wrong first, side by side; then, on a quiet machine, what is fast."""
        with ThreadPoolExecutor(self.arguments.jobs) as pool:
            for step in [pool.submit(step) for step in self.steps()]:
                step.result()
        if self.arguments.bench:
            for section, (_, _, image) in zip(self.sections, self.arguments.sections, strict=True):
                self.bench(section, {**self.environment, **image_of(image).environment})

    def steps(self) -> list[Callable[[], None]]:
        """Tests and sanitizers of all sections, the long ones first."""
        tests: list[Callable[[], None]] = []
        sanitizers: list[Callable[[], None]] = []
        of_torch: dict[str, list[gpu_record.Section]] = {}
        for section, (op, _, image) in zip(self.sections, self.arguments.sections, strict=True):
            environment = {**self.environment, **image_of(image).environment}
            of_torch.setdefault(image, []).append(section)
            if self.arguments.tests:
                files = [f"tests/device/{name}" for name in TESTS[op]]
                tests.append(partial(self.test, [section], "tests", files, environment))
            for tool in self.arguments.sanitizers:
                sanitizers.append(partial(self.sanitize, section, environment, tool))
        for image, sections in of_torch.items() if self.arguments.torch else ():
            found = (path for name in TORCH_TESTS for path in (ROOT / "tests/python").glob(name))
            files = [path.relative_to(ROOT).as_posix() for path in sorted(found)]
            on_gpu = {"ANYFLASH_TEST_DEVICE": "cuda"}
            environment = {**self.environment, **image_of(image).environment, **on_gpu}
            tests.append(partial(self.test, sections, "torch_tests", files, environment))
        return tests + sanitizers

    def test(
        self,
        sections: list[gpu_record.Section],
        field: str,
        files: list[str],
        environment: dict[str, str],
    ) -> None:
        """Runs pytest on these files; the counts go into this field of the sections."""
        what = f"{field.replace('_', ' ')} of {label(sections[0])}"
        if self._no_time(what):
            return
        command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
        command += files + self.arguments.pytest
        output = run(command, environment, self.log(what), self.clock.left())
        counts = count_tests(output.text)
        self.say(f"{what}: {counts}")
        if output.status is None:
            self.remarks.append(f"{what}: out of time after {counts}: not recorded")
        elif output.status not in (0, 1):
            self.remarks.append(f"{what}: pytest ended with {output.status}")
        elif not self.arguments.pytest:
            for section in sections:
                section[field] = counts
        failures = [line for line in output.text.splitlines() if line.startswith("FAILED")]
        self.remarks += failures[:20]
        self.save()

    def sanitize(self, section: gpu_record.Section, environment: dict[str, str], tool: str) -> None:
        what = f"{tool} of {label(section)}"
        result = self.reports(section, environment, tool, what)
        if result is None:
            return
        cases, errors = result
        explained = 0
        if tool == "racecheck" and errors:
            environment = {**environment, **EVERY_THREAD_ARRIVES}
            again = self.reports(section, environment, tool, f"{what}, every thread arriving")
            explained = errors if again == (cases, 0) else 0
        section["sanitizers"][tool] = {"cases": cases, "errors": errors, "explained": explained}
        self.save()

    def reports(
        self, section: gpu_record.Section, environment: dict[str, str], tool: str, what: str
    ) -> tuple[int, int] | None:
        """Cases and errors of one run of a sanitizer; None, with a remark, if it has no result."""
        if self._no_time(what):
            return None
        command = [find_sanitizer(), "--tool", tool, "--print-limit", "30"]
        command += ["--report-api-errors", "no"] if tool == "memcheck" else []
        command += [sys.executable, "tests/device/sanitize_rows.py"]
        command += ["--op", TABLE_OPS[section["op"]], "--family", section["family"]]
        seconds = self.clock.left(self.arguments.sanitizer_limit)
        output = run(command, environment, self.log(what), seconds)
        errors, cases = count_errors(output.text), count_cases(output.text)
        self.say(f"{what}: {cases} cases, {errors} errors")
        if errors is None or cases is None or (output.status != 0 and not errors):
            tail = " | ".join(output.text.splitlines()[-3:])
            self.remarks.append(f"{what}: no result ({output.status}): {tail}")
            return None
        return cases, errors

    def bench(self, section: gpu_record.Section, environment: dict[str, str]) -> None:
        what = f"benchmarks of {label(section)}"
        if self._no_time(what):
            return
        cells = self.work / f"{what.replace(' ', '_')}.jsonl"
        command = bench_command(section, every=self.arguments.bench == "all")
        command += ["--out", str(cells), "--seconds", str(self.arguments.bench_seconds)]
        output = run(command, environment, self.log(what), self.clock.left())
        section["bench"] = read_cells(cells)
        self.say(f"{what}: {len(section['bench'])} cells")
        if output.status != 0:
            tail = " | ".join(output.text.splitlines()[-3:])
            ended = "out of time" if output.status is None else f"ended with {output.status}"
            self.remarks.append(f"{what}: {ended}: {tail}")
        self.save()

    def log(self, what: str) -> Path:
        return self.out / "logs" / f"{re.sub('[^a-z0-9_]+', '_', what.lower())}.txt"

    def say(self, line: str) -> None:
        print(f"{self.clock.spent():4.0f} s  {line}", flush=True)

    def _no_time(self, what: str) -> bool:
        if self.clock.out():
            self.remarks.append(f"{what}: not started, out of time")
        return self.clock.out()

    def save(self) -> None:
        with self.lock:
            gpu_record.write({"sections": self.sections}, self.out / "record.json")

    def report(self) -> None:
        """The short table last: it is what a person sees first."""
        for remark in self.remarks:
            print("!", remark)
        for section in self.sections:
            print("\n".join(gpu_record.summary(section)))


def bench_command(section: gpu_record.Section, every: bool) -> list[str]:
    """The benchmark of a section with every part that it has, or the grid alone."""
    script, *parts = BENCHES[section["op"]]
    newest = section["family"] == NEWEST_FAMILY
    parts = [*parts, *(NEWEST_PARTS if newest else ())] if every else ["--grid"]
    return [sys.executable, script, *parts, *(() if newest else OLDER_PEERS)]


def label(section: gpu_record.Section) -> str:
    return " ".join(gpu_record.key_of(section))


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
        check.check()
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


def section_key(text: str) -> tuple[str, str, str]:
    """(op, family, image) of op/family/image."""
    key = tuple(text.split("/"))
    if len(key) != 3 or key[:2] not in gpu_record.operations():
        raise SystemExit(f"--sections: {text!r} is no op/family/image, such as fwd/sm80/sm_90")
    image_of(key[2])
    return key


def expected_sections() -> list[tuple[str, str, str]]:
    return [
        (op, family, image.removesuffix(" PTX"))
        for op, family in gpu_record.operations()
        for image in gpu_record.EXPECTED_IMAGES[family]
    ]


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
    parser.add_argument("--sanitizer-limit", type=float, default=240, help="seconds of one tool")
    parser.add_argument("--bench", choices=("all", "grid"), help="all: more than the grid")
    parser.add_argument("--bench-seconds", type=float, default=0.4, help="of one cell")
    parser.add_argument("--sections", type=words, help="op/family/image,...; default: all")
    parser.add_argument("--jobs", type=int, default=8, help="tests and sanitizers at a time")
    parser.add_argument("--limit", type=float, default=560, help="seconds of the whole run")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="logs, record.json")
    parser.add_argument("--check-record", action="store_true", help="which sections are stale")
    parser.add_argument("--import", dest="import_from", type=Path, metavar="DIR")
    arguments = parser.parse_args(argv)
    if arguments.sanitizers == ["all"]:
        arguments.sanitizers = list(SANITIZERS)
    keys = map(section_key, arguments.sections) if arguments.sections else expected_sections()
    arguments.sections = list(keys)
    if unknown := set(arguments.sanitizers) - set(SANITIZERS):
        parser.error(f"--sanitizers: {sorted(unknown)} are none of {', '.join(SANITIZERS)}")
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
