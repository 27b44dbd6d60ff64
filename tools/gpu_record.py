"""The record of the last GPU runs: what it is a record of, how runs merge, what is stale.

A record is {"sections": [...]}. A section is one operation of one family of kernels run through one
image, with a hash over the sources that this operation and family are made of. Work on one family
does not touch the hash of another. Everything here runs without a GPU.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from source_text import closure, normalised
from variants import Row, read_rows

ROOT = Path(__file__).resolve().parent.parent
NAME = Path("tests/device/record.json")
RECORD = ROOT / NAME

Section = dict[str, Any]
Record = dict[str, Any]

# op of variants.def -> op of the record: the parts of one operation are recorded together.
OPERATIONS = {"forward": "fwd", "backward": "bwd", "backward_pre": "bwd", "backward_post": "bwd"}

# Images that a family must have been run through; more may be recorded.
EXPECTED_IMAGES = {"sm80": ("sm_90", "compute_80 PTX"), "sm90": ("sm_90a",)}

# Fields with counts of tests: of the kernels and, where they were run, of PyTorch. The hash covers
# the kernels alone, not the Python between the two.
TESTS = ("tests", "torch_tests")

# What identifies a measured cell; the rest of it is the measurement.
MEASUREMENT = ("ours", "peers", "unit", "clock")

# Those that a cell is compared with, the one that says most first, and what tables call them.
PEERS = {"cudnn": "cuDNN", "fa4": "FlashAttention-4", "fa2": "FlashAttention-2"}


def read(path: Path = RECORD) -> Record:
    return json.loads(path.read_text()) if path.is_file() else {"sections": []}


def write(record: Record, path: Path = RECORD) -> None:
    """Sorted, one measured cell a line: a merge shows in a diff as what it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sections = sorted(record["sections"], key=key_of)
    cells: list[str] = []

    def placeholder(cell: Any) -> str:
        cells.append(json.dumps(cell))
        return f"<cell {len(cells) - 1}>"

    light = [
        {**section, "bench": [placeholder(cell) for cell in section["bench"]]}
        if "bench" in section
        else section
        for section in sections
    ]
    text = json.dumps({**record, "sections": light}, indent=1)
    text = re.sub(r'"<cell (\d+)>"', lambda m: cells[int(m[1])], text)
    path.write_text(text + "\n")


def key_of(section: Section) -> tuple[str, str, str]:
    return section["op"], section["family"], section["image"]


def operations(root: Path = ROOT) -> list[tuple[str, str]]:
    """(op of the record, family) of everything in the table."""
    return sorted({(operation_of(row), row.family) for row in read_rows(root)})


def operation_of(row: Row) -> str:
    return OPERATIONS.get(row.op, row.op)


def source_hash(op: str, family: str, root: Path = ROOT) -> str:
    """Changes exactly when the code or the rows of this operation and family change.

    Comments and layout do not count.
    """
    rows = [row for row in read_rows(root) if (operation_of(row), row.family) == (op, family)]
    files: set[Path] = set()
    for table_op in {row.op for row in rows}:
        files.update(closure(root / "src", root / "src/cuda" / family / f"{table_op}.cuh"))
    digest = hashlib.sha256()
    for path in sorted(files):
        name = path.relative_to(root).as_posix()
        digest.update(f"{name}\0{normalised(path.read_text())}\0".encode())
    for row in rows:
        digest.update(f"{row.text}\0".encode())
    return digest.hexdigest()[:16]


def merge(record: Record, sections: Iterable[Section]) -> Record:
    """record with what `sections` measured.

    A section of the same sources keeps what the new run did not measure; one of other sources is
    replaced. Tests are replaced whole, sanitizers by tool, measurements cell by cell.
    """
    merged = {key_of(section): section for section in record["sections"]}
    for new in filter(_measured, sections):
        old = merged.get(key_of(new))
        if old is None or old["hash"] != new["hash"]:
            merged[key_of(new)] = dict(new)
            continue
        both = {**old, **new}
        if not any(new.get("tests", {}).values()):
            both["tests"] = old.get("tests", {})
        both["sanitizers"] = {**old.get("sanitizers", {}), **new.get("sanitizers", {})}
        cells = {_cell_key(cell): cell for cell in old.get("bench", [])}
        cells.update({_cell_key(cell): cell for cell in new.get("bench", [])})
        both["bench"] = list(cells.values())
        merged[key_of(new)] = both
    return {**record, "sections": [merged[key] for key in sorted(merged)]}


def _measured(section: Section) -> bool:
    """False for a run that ended before it had anything to say."""
    tested = any(any(section.get(field, {}).values()) for field in TESTS)
    return bool(tested or section.get("sanitizers") or section.get("bench"))


def _cell_key(cell: dict[str, Any]) -> str:
    return json.dumps({k: v for k, v in cell.items() if k not in MEASUREMENT}, sort_keys=True)


def why_stale(section: Section, root: Path = ROOT) -> str | None:
    """None for a section that still speaks of the sources as they are, and well of them."""
    if section["hash"] != source_hash(section["op"], section["family"], root):
        return "sources changed"
    tests = section.get("tests")
    if not tests or not tests["passed"]:
        return "not tested"
    if failed := failures(section):
        return f"{failed} tests failed"
    for tool, result in sorted(section.get("sanitizers", {}).items()):
        if result["errors"] > result.get("explained", 0):
            return f"{tool}: {result['errors']} errors"
    return None


def failures(section: Section) -> int:
    """Tests that failed, of every kind."""
    return sum(section.get(field, {}).get("failed", 0) for field in TESTS)


def stale_sections(record: Record, root: Path = ROOT) -> list[str]:
    """One phrase for each section that is missing or stale."""
    sections = {key_of(section): section for section in record["sections"]}
    table = operations(root)
    expected = [
        (op, family, image) for op, family in table for image in EXPECTED_IMAGES.get(family, ())
    ]
    phrases = [f"{' '.join(key)} (not recorded)" for key in expected if key not in sections]
    for key, section in sorted(sections.items()):
        if key[:2] not in table:
            phrases.append(f"{' '.join(key)} (no such kernels)")
        elif reason := why_stale(section, root):
            phrases.append(f"{' '.join(key)} ({reason})")
    return phrases


def check_line(record: Record, root: Path = ROOT) -> tuple[str, bool]:
    """The one line of --check-record, and whether all is fresh."""
    stale = stale_sections(record, root)
    if not stale:
        count = len(record["sections"])
        return f"GPU record: {count} sections, none stale", True
    return f"GPU record: stale: {'; '.join(stale)}", False


def summary(section: Section) -> list[str]:
    """A few lines for people: what was tested, and a table of what was measured."""
    lines = [
        f"{' '.join(key_of(section))}  {section.get('gpu', '?')}, driver "
        f"{section.get('driver', '?')}, {section['date']}"
    ]
    for field in TESTS:
        if tests := section.get(field):
            counts = ", ".join(f"{tests[k]} {k}" for k in ("passed", "failed", "skipped"))
            lines.append(f"  {field.replace('_', ' ')}: {counts}")
    for tool, result in sorted(section.get("sanitizers", {}).items()):
        lines.append(
            f"  {tool}: {result['cases']} cases, {result['errors']} errors"
            + (f", {result['explained']} explained" if result.get("explained") else "")
        )
    return lines + _speed_table(section.get("bench", []))


def _speed_table(cells: list[dict[str, Any]]) -> list[str]:
    """A line for each (d, causal, options): our speed at each length, beside the first peer's."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in sorted(cells, key=lambda cell: (not is_plain(cell), cell["d"], cell["causal"])):
        groups.setdefault(_name_of(cell), []).append(cell)
    lines = []
    for name, group in groups.items():
        group.sort(key=lambda cell: cell["seqlen"])
        lengths = "/".join(short_length(cell["seqlen"]) for cell in group)
        speeds = "  ".join(_beside_peer(cell) for cell in group)
        lines.append(f"  {name:36} {group[0]['unit']} at {lengths}: {speeds}")
    return lines + [line for peer in PEERS for line in _over(peer, cells)]


def _over(peer: str, cells: list[dict[str, Any]]) -> list[str]:
    """How we compare with a peer over the grid: all in all, and for each d and mask."""
    groups: dict[str, list[float]] = {}
    for cell in cells:
        if is_plain(cell) and cell["peers"].get(peer):
            name = f"d{cell['d']} {'causal' if cell['causal'] else 'full'}"
            groups.setdefault(name, []).append(_ratio(cell, peer))
    ratios = [ratio for group in groups.values() for ratio in group]
    if not ratios:
        return []
    parts = ", ".join(f"{name} {geometric_mean(group):.3f}x" for name, group in groups.items())
    return [
        f"  over {peer}: geomean {geometric_mean(ratios):.3f}x, worst {min(ratios):.3f}x "
        f"of {len(ratios)} cells; {parts}"
    ]


def is_plain(cell: dict[str, Any]) -> bool:
    """True for a cell of the grid."""
    return _is_simple(cell) and "part" not in cell and "plain" not in cell["peers"]


def _is_simple(cell: dict[str, Any]) -> bool:
    dense = cell["layout"] == "dense" and cell["heads"] == cell["heads_k"]
    return dense and not cell["options"]


def _name_of(cell: dict[str, Any]) -> str:
    d, dv, heads, heads_k = (cell[name] for name in ("d", "dv", "heads", "heads_k"))
    parts = [f"d{d}" if d == dv else f"d{d}/{dv}", "causal" if cell["causal"] else "full"]
    parts += [cell["dtype"], cell["part"]] if "part" in cell else [cell["dtype"]]
    parts += [cell["layout"]] if cell["layout"] != "dense" else []
    parts += [f"GQA {heads}/{heads_k}"] if heads != heads_k else []
    parts += ["deterministic"] if _is_simple(cell) and "plain" in cell["peers"] else []
    parts += [f"{name}={value}" for name, value in sorted(cell["options"].items())]
    return " ".join(parts)


def _beside_peer(cell: dict[str, Any]) -> str:
    """Our number, with what it is over the peer: a price over the plain kernel, or a ratio."""
    ours, peers = cell["ours"], cell["peers"]
    if peers.get("plain") and ours:
        return f"{ours:.4g} (price {peers['plain'] / ours - 1:+.1%})"
    found = [peer for peer in (*PEERS, "dense") if peers.get(peer) and ours]
    return " ".join([f"{ours:.4g}", *(f"({_ratio(cell, peer):.2f}x {peer})" for peer in found)])


def _ratio(cell: dict[str, Any], peer: str) -> float:
    """How much faster we are than a peer; a unit of time is better when small."""
    ours, theirs = float(cell["ours"]), float(cell["peers"][peer])
    return ours / theirs if cell["unit"].endswith("FLOP/s") else theirs / ours


def short_length(seqlen: int) -> str:
    """4096 as 4k."""
    return f"{seqlen // 1024}k" if seqlen >= 1024 and seqlen % 1024 == 0 else str(seqlen)
