"""Talking to a person: tables, progress, units, and mistakes that are told in one line."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TextIO


class UserError(Exception):
    """Something that the user can put right; its text says how. exit_code 2: asked wrongly, 1:
    missing here."""

    def __init__(self, message: str, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Progress:
    """One line on stderr that says what is being done, never more than a few times a second.

    On a terminal the line is rewritten in place and erased at the end; into a file or a pipe a
    line goes out every few seconds, so that logs stay short.
    """

    def __init__(self, title: str, total: int, stream: TextIO | None = None) -> None:
        self.title = title
        self.total = max(total, 1)
        self.done = 0
        self.stream = sys.stderr if stream is None else stream
        self.in_place = self.stream.isatty()
        self.interval = 0.1 if self.in_place else 5.0
        self.started = time.monotonic()
        self.shown = self.started if not self.in_place else 0.0
        self.width = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.in_place and self.width:
            self.stream.write("\r" + " " * self.width + "\r")
            self.stream.flush()

    def note(self, text: str) -> None:
        """Says what is being done now."""
        now = time.monotonic()
        if now - self.shown < self.interval:
            return
        self.shown = now
        percent = 100 * self.done // self.total
        line = f"{self.title} {percent:3d} %  {now - self.started:4.0f} s  {text}"
        if self.in_place:
            line = line[:100]
            self.stream.write("\r" + line + " " * max(self.width - len(line), 0))
            self.width = len(line)
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def step(self, amount: int = 1) -> None:
        """Counts work that is done."""
        self.done = min(self.done + amount, self.total)


def table(heads: Sequence[str], lines: Sequence[Sequence[str]], left: int = 1) -> str:
    """A plain text table; the first `left` columns are aligned left, the others right."""
    widths = [max(len(row[c]) for row in [heads, *lines]) for c in range(len(heads))]

    def text(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if c < left else cell.rjust(width)
            for c, (cell, width) in enumerate(zip(cells, widths))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join(
        [text(heads), "  ".join("-" * width for width in widths), *(text(line) for line in lines)]
    )


def megabytes(size: float | None) -> str:
    """Bytes as MB (2**20) with a sensible number of digits; "-" where it could not be measured."""
    if size is None:
        return "-"
    value = size / 2**20
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
