"""The docs name what the code has."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
# Variables that other programs define and nobody sets for us.
FOREIGN = {"CXX", "PATH", "HOME", "PYTHONPATH", "PYENV_ROOT", "LOCALAPPDATA"}
# Names that look like ours but are compile-time macros, options of CMake or enumerators.
LOOKUP = re.compile(
    r'(?:getenv|variable|environ(?:\.get|\.setdefault|\.pop)?)\s*[(\[]\s*"([A-Z][A-Z0-9_]+)"'
)


def looked_up() -> set[str]:
    """Every environment variable that the code reads by a literal name."""
    found = set()
    for folder in ("src", "python", "tools/build_kernels", "tests/device"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".cpp", ".h", ".py", ".c"}:
                found.update(LOOKUP.findall(path.read_text()))
    return found - FOREIGN


def documented() -> set[str]:
    lines = (ROOT / "docs/environment.md").read_text().splitlines()
    names = [re.findall(r"`([A-Z_]+)`", line.split("|")[1]) for line in lines if "|" in line]
    return {name for line in names for name in line}


def test_every_environment_variable_is_documented():
    assert looked_up() - documented() == set()


def test_documented_environment_variables_exist():
    code = "".join(
        path.read_text()
        for folder in ("src", "python", "tools/build_kernels", "tests/device")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".cpp", ".h", ".py", ".c"}
    )
    assert {name for name in documented() if f'"{name}"' not in code} == set()


@pytest.mark.parametrize("page", DOCS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_paths_in_docs_exist(page):
    """`src/...` and relative links point to something, unless they are patterns."""
    text = page.read_text()
    roots = ("src", "tests", "tools", "docs", "bench", "python", "cmake", "include", "examples")
    paths = re.findall(rf"`((?:{'|'.join(roots)})/[\w./-]+)`", text)
    paths += [
        target.split("#")[0]
        for target in re.findall(r"\]\(([^)\s]+)\)", text)
        if not target.startswith(("http", "#"))
    ]
    missing = {
        path for path in paths if not ((ROOT / path).exists() or (page.parent / path).exists())
    }
    assert missing - PENDING == set()


# Patterns.
PENDING = {"src/cuda/smXX", "src/cuda/smXX/"}
