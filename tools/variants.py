"""variants.def as the tools read it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from source_text import without_comments

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """One line of the table; `text` is all of it, blanks normalised."""

    op: str
    family: str
    variant: str
    archs: tuple[str, ...]
    dtypes: tuple[str, ...]
    d: int
    dv: int
    text: str


def read_rows(root: Path = ROOT) -> list[Row]:
    """Every row, in the order of the table."""
    text = without_comments((root / "variants.def").read_text())
    return [_row(match[1]) for match in re.finditer(r"\bKERNEL\s*\(([^()]*)\)", text)]


def _row(line: str) -> Row:
    columns = [" ".join(column.split()) for column in line.split(",")]
    op, family, variant, archs, dtypes, d, dv = columns[:7]
    constants = ["=".join(part.strip() for part in column.split("=")) for column in columns[7:]]
    return Row(
        op,
        family,
        variant,
        tuple(archs.strip('"').split()),
        tuple(dtypes.replace(" ", "").split("|")),
        int(d),
        int(dv),
        ",".join([*columns[:7], *constants]),
    )
