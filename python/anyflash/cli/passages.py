"""A text as passages: a paragraph or a few of them, each with the heading it stands under and
where it is."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from anyflash.cli.console import UserError
from anyflash.cli.facts import package_folder

WORDS = 30  # a passage is closed once it holds as many


@dataclass(frozen=True)
class Passage:
    source: str  # the file's name as the user knows it
    line: int  # its first line, from 1
    text: str


def read_files(paths: Iterable[str]) -> list[Passage]:
    """The passages of these files; a folder stands for the .md, .rst and .txt files in it."""
    passages: list[Passage] = []
    for name in paths:
        path = Path(name)
        if not path.exists():
            raise UserError(f"no such file: {name}")
        files = [path]
        if path.is_dir():
            files = sorted(
                file for file in path.rglob("*") if file.suffix in (".md", ".rst", ".txt")
            )
        for file in files:
            try:
                passages += split(str(file), file.read_text(encoding="utf-8", errors="replace"))
            except OSError as error:
                raise UserError(f"cannot read {file}: {error.strerror}") from None
    return passages


def own_documents() -> list[Passage]:
    """anyflash's own documents: those of the checkout that we are called in or run from, else the
    README that the installed package carries."""
    for root in (Path.cwd(), package_folder().parent.parent):
        if (root / "variants.def").is_file() and (root / "README.md").is_file():
            files = sorted([*root.glob("*.md"), *root.glob("docs/**/*.md")])
            return [
                passage
                for file in files
                for passage in split(str(file.relative_to(root)), file.read_text(encoding="utf-8"))
            ]
    try:
        readme = importlib.metadata.metadata("anyflash").get_payload()  # type: ignore[attr-defined]
    except importlib.metadata.PackageNotFoundError:
        readme = ""
    return split("README.md", str(readme or ""))


def split(source: str, text: str) -> list[Passage]:
    """Cuts a text at blank lines and headings, and joins short paragraphs until a passage holds
    WORDS words."""
    passages = []
    heading, words, start, parts = "", 0, 0, []  # type: str, int, int, list[str]

    def close() -> None:
        nonlocal words, parts
        if words:
            lines = [heading, *parts] if heading else parts
            passages.append(Passage(source, start, "\n".join(map(_plain, lines))))
        words, parts = 0, []

    for line, paragraph in _paragraphs(text):
        if paragraph.startswith("#"):
            close()
            heading = paragraph.lstrip("#").strip()
            continue
        if not words:
            start = line
        parts.append(paragraph)
        words += len(paragraph.split())
        if words >= WORDS:
            close()
    close()
    return passages


def _plain(text: str) -> str:
    """Without the signs of tables, code and emphasis, which mean nothing to an encoder."""
    lines = (
        " ".join(re.sub(r"[|`*]+|-{3,}|={3,}", " ", line).split()) for line in text.splitlines()
    )
    return "\n".join(line for line in lines if line)


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """(first line, text) of each block between blank lines; headings and table or list lines of
    a long block alone."""
    block: list[str] = []
    start, fenced = 1, False
    for number, line in enumerate([*text.splitlines(), ""], 1):
        fence = line.lstrip().startswith("```")
        heading = line.startswith("#") and not fenced
        long = sum(len(part.split()) for part in block) >= WORDS
        if block and (heading or (not line.strip() and not fenced) or (long and not fenced)):
            yield start, "\n".join(block)
            block = []
        if heading:
            yield number, line
        elif line.strip() and not line.lstrip().startswith("<!--"):
            if not block:
                start = number
            block.append(line)
        if fence:
            fenced = not fenced
    if block:
        yield start, "\n".join(block)
