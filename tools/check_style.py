"""Checks the rules of the house that no compiler or formatter knows. CONTRIBUTING.md lists them.

usage: python tools/check_style.py [FOLDER]
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from source_text import includes, without_comments_and_literals

COLUMNS = 100
LINES = 550

CPP = {".h", ".hpp", ".cuh", ".cpp", ".c"}
CODE = CPP | {".py", ".pyi", ".cmake"}
TOP_FOLDERS = (
    "bench",
    "cmake",
    "docs",
    "examples",
    "include",
    "python",
    "src",
    "tests",
    "tools",
)

# layer -> what its files may include, as prefixes of paths under src/ ("own": the layer itself)
CUDA_SHARED = ("cuda/params.h", "cuda/attn/key_blocks.h")
LAYERS = {
    "cuda/ptx": ("cuda/params.h",),
    "cuda/tile": ("cuda/params.h", "cuda/ptx/"),
    "cuda/attn": ("cuda/params.h", "cuda/ptx/", "cuda/tile/"),
    "cuda/sm": ("cuda/params.h", "cuda/ptx/", "cuda/tile/", "cuda/attn/"),
    "cuda": (),
    "core": (*CUDA_SHARED, "*/shared_memory.h", "cuda/sm90/params.h", "cpu/cpu.h", "anyflash/"),
    "cpu": (*CUDA_SHARED, "core/", "anyflash/"),
}


@dataclass(frozen=True)
class Problem:
    path: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


@dataclass(frozen=True)
class Source:
    """A file of the project: path with forward slashes, relative to the root."""

    path: str
    text: str

    @property
    def suffix(self) -> str:
        return Path(self.path).suffix

    def lines(self) -> Iterator[tuple[int, str]]:
        return enumerate(self.text.splitlines(), 1)


def read_sources(root: Path) -> list[Source]:
    """Every file of the project that people write; generated and foreign files are not there."""
    paths = [path for path in root.iterdir() if path.is_file()]
    for folder in TOP_FOLDERS:
        paths += (root / folder).rglob("*") if (root / folder).is_dir() else ()
    sources = []
    for path in sorted(paths):
        relative = path.relative_to(root).as_posix()
        if path.is_file() and not _is_foreign(relative):
            sources.append(Source(relative, path.read_text(encoding="utf-8", errors="replace")))
    return sources


def _is_foreign(path: str) -> bool:
    parts = path.split("/")
    skipped = any(p.startswith((".", "build-", "_deps")) or p == "__pycache__" for p in parts)
    return skipped or ".egg-info" in path or Path(path).suffix not in CODE | {".md", ".txt", ".def"}


def check_inline_assembly(source: Source) -> Iterator[Problem]:
    """asm stands in src/cuda/ptx only: one instruction a function."""
    if source.suffix not in CPP or source.path.startswith("src/cuda/ptx/"):
        return
    for line, code in enumerate(without_comments_and_literals(source.text).splitlines(), 1):
        if re.search(r"\b(asm|__asm__)\b", code):
            yield Problem(source.path, line, "asm belongs into src/cuda/ptx")


FORBIDDEN_CALLS = re.compile(
    r"\b(v?f?printf|puts|fputs|putchar|perror|exit|_Exit|_exit|quick_exit|abort|terminate"
    r"|\w*DeviceSynchronize|cuCtxSynchronize|cuStreamSynchronize|cuEventSynchronize)\s*\("
    r"|\bstd::(cout|cerr|clog)\b"
)


def check_quiet_library(source: Source) -> Iterator[Problem]:
    """The library never prints, exits, aborts or synchronises."""
    if source.suffix not in CPP or not source.path.startswith("src/"):
        return
    for line, code in enumerate(without_comments_and_literals(source.text).splitlines(), 1):
        if match := FORBIDDEN_CALLS.search(code):
            name = match.group().rstrip("( ")
            yield Problem(source.path, line, f"the library never prints, exits or waits: {name}")


def check_layers(source: Source) -> Iterator[Problem]:
    """ptx <- tile <- attn <- smXX; core and cpu know of the kernels what LAYERS says."""
    if source.suffix not in CPP or not source.path.startswith(("src/", "include/")):
        return
    layer = _layer_of(source.path)
    for line, name in includes(source.text):
        target = name[1:-1]
        if target == "Python.h" or target.startswith(("torch/", "ATen/", "c10/", "cuda_runtime")):
            yield Problem(source.path, line, f"{target} is included under python/ only")
        elif name.startswith("<") and layer.startswith("cuda"):
            if (source.path, name) != ("src/cuda/params.h", "<cstdint>"):
                yield Problem(source.path, line, f"kernels include no system header: {name}")
        elif name.startswith('"') and not _may_include(layer, target):
            yield Problem(source.path, line, f"{layer} must not include {target}")


def _layer_of(path: str) -> str:
    if path.startswith("include/"):
        return "anyflash"
    parts = path.split("/")[1:-1]
    return "/".join(parts[:2]) if parts[:1] == ["cuda"] else "".join(parts[:1])


def _may_include(layer: str, target: str) -> bool:
    if target.endswith("variants.def"):
        return layer == "core"
    rule = "cuda/sm" if layer.startswith("cuda/sm") else layer
    if target.startswith(layer + "/"):
        return True
    for allowed in LAYERS.get(rule, ()):
        if allowed.startswith("*"):
            if target.endswith(allowed[1:]):
                return True
        elif target.startswith(allowed):
            return True
    return False


# Spelt so that this line is none itself.
UNOWNED = re.compile(r"\b(T[O]DO|F[I]XME|X[X]X)\b(?!\(#\d+\))")


def check_text(source: Source) -> Iterator[Problem]:
    """Columns, blanks, file lengths; what is left undone names its issue."""
    if source.suffix not in CODE:
        return
    lines = list(source.lines())
    for line, text in lines:
        if len(text) > COLUMNS and source.suffix != ".cmake":
            yield Problem(source.path, line, f"{len(text)} columns, {COLUMNS} are allowed")
        if text != text.rstrip():
            yield Problem(source.path, line, "blanks at the end of the line")
        if "\t" in text:
            yield Problem(source.path, line, "a tab")
        if match := UNOWNED.search(text):
            yield Problem(source.path, line, f"{match[1]} names its issue: {match[1]}(#12)")
    if source.text and not source.text.endswith("\n"):
        yield Problem(source.path, len(lines), "no newline at the end of the file")
    if len(lines) > LINES and not source.path.startswith("tests/"):
        yield Problem(source.path, LINES, f"{len(lines)} lines, {LINES} are allowed: split it")


def check_file_name(source: Source) -> Iterator[Problem]:
    """Lower-case words joined by underscores, for folders too."""
    if source.suffix not in CODE:
        return
    for part in source.path.split("/"):
        stem = part.partition(".")[0]
        if part != "CMakeLists.txt" and not re.fullmatch(r"[a-z0-9_]+", stem):
            yield Problem(source.path, 1, f"{part!r} is not lower_case_with_underscores")
            return


def check_folders(sources: Iterable[Source]) -> Iterator[Problem]:
    """CONTRIBUTING.md states the purpose of every folder that holds code."""
    contributing = next((s.text for s in sources if s.path == "CONTRIBUTING.md"), None)
    if contributing is None:
        yield Problem("CONTRIBUTING.md", 1, "missing")
        return
    folders = {s.path.rpartition("/")[0] for s in sources if s.suffix in CODE and "/" in s.path}
    for folder in sorted(folders):
        if f"`{folder}/`" not in contributing:
            yield Problem("CONTRIBUTING.md", 1, f"does not say what `{folder}/` is for")


FILE_CHECKS = (
    check_inline_assembly,
    check_quiet_library,
    check_layers,
    check_text,
    check_file_name,
)


def check(root: Path) -> list[Problem]:
    sources = read_sources(root)
    problems = [p for source in sources for rule in FILE_CHECKS for p in rule(source)]
    return problems + list(check_folders(sources))


def main() -> int:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent.parent
    problems = check(root)
    for problem in problems:
        print(problem)
    print(f"check_style: {len(problems)} problems" if problems else "check_style: all good")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
