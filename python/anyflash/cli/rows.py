"""``python -m anyflash rows``: the ledger that the build wrote, a line for each kernel."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from anyflash.cli.console import UserError, table
from anyflash.cli.facts import environment, package_folder

# field of the ledger, heading of the column, format
COLUMNS = (
    ("row", "row", "{}"),
    ("arch", "image", "{}"),
    ("registers", "registers", "{}"),
    ("spill_bytes", "spill B", "{}"),
    ("stack_bytes", "stack B", "{}"),
    ("shared_bytes", "shared B", "{}"),
    ("image_bytes", "image B", "{}"),
    ("seconds", "seconds", "{:.2f}"),
    ("peak_mb", "peak MB", "{:.0f}"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the ledger as JSON")


def run(arguments: argparse.Namespace) -> int:
    ledger = read_ledger()
    print(json.dumps(ledger, indent=1) if arguments.json else show(ledger))
    return 0


def ledger_path() -> Path:
    """Where the build puts the ledger: beside the kernels."""
    folder = environment().get("kernels_folder") or package_folder() / "lib" / "kernels"
    return Path(folder) / "ledger.json"


def read_ledger(path: Path | None = None) -> dict[str, Any]:
    """The ledger: {"compiler", "seconds", "kernels": [an entry for each row and image]}. Raises
    UserError where there is none."""
    path = path or ledger_path()
    try:
        ledger = json.loads(path.read_text(encoding="utf-8"))
        return {**ledger, "kernels": list(ledger["kernels"])}
    except FileNotFoundError:
        text = f"no ledger at {path}: this package was built without kernels for GPUs"
        raise UserError(text, exit_code=1) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the ledger {path}: {error!r}", exit_code=1) from None


def show(ledger: dict[str, Any]) -> str:
    """The ledger as a table, with its totals below."""

    def cell(entry: dict[str, Any], field: str, form: str) -> str:
        return "-" if entry.get(field) is None else form.format(entry[field])

    entries = ledger["kernels"]
    lines = [[cell(entry, field, form) for field, _, form in COLUMNS] for entry in entries]
    images = list(dict.fromkeys(str(entry.get("arch")) for entry in entries))
    size = sum(entry.get("image_bytes") or 0 for entry in entries) / 2**20
    seconds = sum(entry.get("seconds") or 0 for entry in entries)
    totals = (
        f"{len(entries)} kernels, {size:.1f} MB, images {', '.join(images)}; compiled by "
        f"{ledger.get('compiler', 'NVRTC')} in {seconds:.0f} s of processor time"
    )
    return "\n".join([table([heading for _, heading, _ in COLUMNS], lines, left=2), totals])
