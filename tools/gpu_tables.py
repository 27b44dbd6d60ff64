"""The tables of what tools/gpu_check.py recorded in tests/device/record.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import gpu_record
from gpu_record import PEERS, is_plain, short_length

NOT_YET = "Not measured yet."
IMAGES = {
    "compute_80 PTX": "PTX of compute_80, compiled by the driver",
    "rows of sm_86": "the rows for 8.6, compiled for this GPU",
}

Cell = dict[str, Any]


def gpu_table(root: Path, native: bool = True, op: str = "forward") -> str:
    """Speed over the grid, by image: ours, and how many times that of FlashAttention-2."""
    parts = []
    for section in sections(root, native, op):
        cells = [
            cell for cell in section.get("bench", []) if is_plain(cell) and "fa2" in cell["peers"]
        ]
        if not cells:
            continue
        ratios = [cell["ours"] / cell["peers"]["fa2"] for cell in cells]
        parts.append(
            f"{origin(section)}: {op}, {cells[0]['dtype']}, {cells[0]['unit']} (in brackets: times "
            "the speed of torch's FlashAttention-2 in the same run; geometric mean "
            f"{geometric_mean(ratios):.2f})\n\n"
            + grid(cells, lambda c: c["ours"], lambda c: c["ours"] / c["peers"]["fa2"])
        )
    return "\n\n".join(parts) or NOT_YET


def option_table(root: Path, native: bool = True) -> str:
    """What each option costs over the same work without it."""
    parts = []
    for section in sections(root, native):
        cells = [cell for cell in section.get("bench", []) if "plain" in cell.get("peers", {})]
        if not cells:
            continue
        names = list(dict.fromkeys(option_name(cell) for cell in cells))
        shapes = sorted({(cell["d"], cell["causal"]) for cell in cells})
        heads = ["", *(f"d {d}, {mask(causal)}" for d, causal in shapes)]
        lines = []
        for name in names:
            cost = {
                (
                    cell["d"],
                    cell["causal"],
                ): f"{100 * (cell['peers']['plain'] / cell['ours'] - 1):+.1f} %"
                for cell in cells
                if option_name(cell) == name
            }
            lines.append([name, *(cost.get(shape, "") for shape in shapes)])
        parts.append(
            f"{section['gpu']}, {image_of(section)}, {cells[0]['seqlen']} tokens: time that an "
            f"option adds to the plain kernel\n\n{markdown(heads, lines)}"
        )
    return "\n\n".join(parts) or NOT_YET


def peers_table(root: Path, op: str = "forward") -> str:
    """Hopper's own kernels over the grid: a line for each head dim, mask and who computes it."""
    parts = []
    for section, cells in hopper_cells(root, op, is_plain):
        lines: list[list[str]] = []
        seqlens = sorted({cell["seqlen"] for cell in cells})
        means = []
        for (d, causal), group in grouped(cells, lambda c: (c["d"], c["causal"])).items():
            by_length = {cell["seqlen"]: cell for cell in group}
            ours = [f"{by_length[n]['ours']:.0f}" if n in by_length else "" for n in seqlens]
            lines.append([str(d), mask(causal), "ours", *ours, ""])
            for peer, name in PEERS.items():
                ratios = ratios_over(peer, group)
                if not ratios:
                    continue
                theirs = [
                    f"{cell['peers'][peer]:.0f} ({ratios[n]:.2f}x)" if n in ratios else ""
                    for n, cell in ((n, by_length.get(n, {})) for n in seqlens)
                ]
                mean = f"{geometric_mean(list(ratios.values())):.2f}x"
                lines.append(["", "", name, *theirs, mean])
        for peer, name in PEERS.items():
            if found := [cell["ours"] / cell["peers"][peer] for cell in having(peer, cells)]:
                means.append(f"{geometric_mean(found):.2f}x {name} ({len(found)} cells)")
        heads = ["d", "mask", "", *(short_length(n) for n in seqlens), "geometric mean"]
        parts.append(
            f"{origin(section)}: {op}, {cells[0]['dtype']}, {cells[0]['unit']} (in brackets: how "
            f"many times as fast ours is, in the same run). All in all: {', '.join(means)}.\n\n"
            + markdown(heads, lines)
        )
    return "\n\n".join(parts) or NOT_YET


def extra_table(root: Path, op: str = "forward") -> str:
    """Problems beside the grid: ours, and how many times as fast as whom."""
    parts = []
    for section, cells in hopper_cells(root, op, lambda cell: cell.get("part") == "extra"):
        seqlens = sorted({cell["seqlen"] for cell in cells})
        lines = []
        for (name, causal), group in grouped(cells, lambda c: (problem(c), c["causal"])).items():
            speeds = {cell["seqlen"]: beside(cell) for cell in group}
            lines.append([name, mask(causal), *(speeds.get(n, "") for n in seqlens)])
        heads = ["", "mask", *(short_length(n) for n in seqlens)]
        parts.append(
            f"{origin(section)}: {op}, {cells[0]['dtype']}, {cells[0]['unit']} (in brackets: how "
            "many times as fast as others in the same run; dense: ours on sequences of one length, "
            f"of as many flops)\n\n{markdown(heads, lines)}"
        )
    return "\n\n".join(parts) or NOT_YET


def cycles_table(root: Path, op: str = "forward") -> str:
    """Thousands of cycles of a call, and how much of them the tensor cores would need."""
    parts = []
    for section, cells in hopper_cells(root, op, lambda cell: cell.get("part") == "cycles"):
        seqlens = sorted({cell["seqlen"] for cell in cells})
        lines = []
        for (d, causal), group in grouped(cells, lambda c: (c["d"], c["causal"])).items():
            for name, who in {"ours": "ours", **PEERS}.items():
                counts = {c["seqlen"]: (of(c, name), c["floor"]) for c in group if of(c, name)}
                shares = [
                    f"{counts[n][0] / 1e3:.0f} ({counts[n][1] / counts[n][0]:.0%})"
                    if n in counts
                    else ""
                    for n in seqlens
                ]
                lines += [[str(d), mask(causal), who, *shares]] if counts else []
        clocks = [clock for cell in cells for clock in cell["clock"].values()]
        heads = ["d", "mask", "", *(short_length(n) for n in seqlens)]
        parts.append(
            f"{origin(section)}: {op}, {cells[0]['dtype']}, thousands of cycles of one call (in "
            "brackets: the share that the tensor cores need at 4096 flops a clock and "
            f"multiprocessor), counted at {min(clocks):.2f} to {max(clocks):.2f} GHz\n\n"
            + markdown(heads, lines)
        )
    return "\n\n".join(parts) or NOT_YET


def hopper_cells(
    root: Path, op: str, wanted: Callable[[Cell], bool]
) -> Iterable[tuple[dict[str, Any], list[Cell]]]:
    """The sections of Hopper's own kernels that have such cells, with these."""
    for section in sections(root, True, op):
        cells = [cell for cell in section.get("bench", []) if wanted(cell)]
        if section["family"] == "sm90" and cells:
            yield section, cells


def sections(root: Path, native: bool, op: str = "forward") -> list[dict[str, Any]]:
    """The record's sections of an operation: those of native images, or the others."""
    found = gpu_record.read(root / gpu_record.NAME)["sections"]
    name = {"forward": "fwd", "backward": "bwd"}[op]
    return [s for s in found if s["op"] == name and s["image"].startswith("sm_") == native]


def origin(section: dict[str, Any]) -> str:
    """Where and when a section was measured."""
    driver, date = section["driver"], section["date"]
    return f"{section['gpu']}, {image_of(section)}, driver {driver}, {date}"


def image_of(section: dict[str, Any]) -> str:
    return IMAGES.get(section["image"], f"image {section['image']}")


def option_name(cell: Cell) -> str:
    if cell["options"]:
        return ", ".join(sorted(cell["options"]))
    return "packed sequences" if cell["layout"] == "packed" else "GQA, 4 query heads a key head"


def problem(cell: Cell) -> str:
    """What sets a cell apart from the grid."""
    d, dv = cell["d"], cell["dv"]
    parts = [f"d {d}" if d == dv else f"d {d}, values of {dv}"]
    if cell["heads"] != cell["heads_k"]:
        parts.append(f"{cell['heads']} heads over {cell['heads_k']}")
    if "window" in cell["options"]:
        parts.append(f"window of {cell['options']['window'][0]}")
    if cell["layout"] == "packed":
        parts.append(f"{cell['batch']} packed sequences, log-normal lengths of this mean")
    return ", ".join(parts)


def beside(cell: Cell) -> str:
    """Our speed, and over whom."""
    names = {**PEERS, "dense": "dense"}
    ratios = [
        f"{cell['ours'] / cell['peers'][peer]:.2f}x {name}"
        for peer, name in names.items()
        if peer in cell["peers"]
    ]
    return f"{cell['ours']:.0f}" + (f" ({', '.join(ratios)})" if ratios else "")


def of(cell: Cell, name: str) -> float:
    """What was measured of us or of a peer; 0: nothing."""
    return float(cell["ours"] if name == "ours" else cell["peers"].get(name, 0))


def having(peer: str, cells: Iterable[Cell]) -> list[Cell]:
    return [cell for cell in cells if peer in cell["peers"]]


def ratios_over(peer: str, cells: Iterable[Cell]) -> dict[int, float]:
    """By length: how many times as fast ours is."""
    return {cell["seqlen"]: cell["ours"] / cell["peers"][peer] for cell in having(peer, cells)}


def grouped(cells: Iterable[Cell], key: Callable[[Cell], Any]) -> dict[Any, list[Cell]]:
    groups: dict[Any, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    return groups


def grid(
    cells: Iterable[Cell], speed: Callable[[Cell], float], ratio: Callable[[Cell], float]
) -> str:
    """A line for each dtype, head dim and mask, a column for each sequence length."""
    table: dict[tuple[Any, ...], dict[int, str]] = {}
    for cell in cells:
        line = table.setdefault((cell["dtype"], cell["d"], cell["causal"]), {})
        line[cell["seqlen"]] = f"{speed(cell):.0f} ({ratio(cell):.2f}x)"
    seqlens = sorted({seqlen for line in table.values() for seqlen in line})
    heads = ["dtype", "d", "mask", *(short_length(seqlen) for seqlen in seqlens)]
    lines = [
        [dtype, str(d), mask(causal), *(line.get(seqlen, "") for seqlen in seqlens)]
        for (dtype, d, causal), line in table.items()
    ]
    return markdown(heads, lines)


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *lines])


def mask(causal: bool) -> str:
    return "causal" if causal else "full"
