"""C++ source as the project's tools read it: without comments, and with what it includes."""

from __future__ import annotations

import re
from pathlib import Path

# A comment, or a literal that may look as if it held one.
_TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*|/\*.*?\*/)
      | (?P<raw>R"(?P<fence>[^()\s\\]*)\(.*?\)(?P=fence)")
      | (?P<literal>"(?:\\.|[^"\\\n])*"|(?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+')""",
    re.DOTALL | re.VERBOSE,
)
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+(?P<name>"[^"\n]+"|<[^>\n]+>)', re.MULTILINE)


def without_comments(text: str) -> str:
    """text with every comment replaced by blanks; lines keep their numbers."""
    return _TOKEN.sub(lambda m: _blank(m.group()) if m.group("comment") else m.group(), text)


def without_comments_and_literals(text: str) -> str:
    """Only what the compiler takes as code: the insides of strings are blank too."""
    return _TOKEN.sub(lambda m: _blank(m.group()), text)


def _blank(text: str) -> str:
    return re.sub(r"[^\n]", " ", text)


def includes(text: str) -> list[tuple[int, str]]:
    """(line number, name with its quotes or brackets) of each #include."""
    code = without_comments(text)
    return [
        (code.count("\n", 0, m.start("name")) + 1, m.group("name")) for m in _INCLUDE.finditer(code)
    ]


def closure(root: Path, first: Path) -> list[Path]:
    """first and every file under root that it includes with quotes, directly or not; sorted."""
    found: set[Path] = set()
    waiting = [first]
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        names = [name for _, name in includes(path.read_text()) if name.startswith('"')]
        waiting += [root / name.strip('"') for name in names]
    return sorted(found)


def normalised(text: str) -> str:
    """Code whose comments, blank lines and indentation do not matter."""
    lines = (" ".join(line.split()) for line in without_comments(text).splitlines())
    return "\n".join(line for line in lines if line)
