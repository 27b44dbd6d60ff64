"""Writes the measured tables into README.md and the docs from what the benchmarks recorded; --check
says whether they are current.

usage: python tools/update_tables.py [--check]

A table stands between <!-- table:NAME --> and <!-- /table:NAME -->:
  gpu, gpu-backward, options   from tests/device/record.json, which tools/gpu_check.py writes:
                native images
  gpu-images, options-images   the same of the other images
  gpu-cudnn     the native images beside cuDNN
  cpu, cpu-backward   from bench/cpu_forward.json and bench/cpu_backward.json, which the
                benchmarks of these names write
  train         from docs/train_gpt_*.json, which examples/train_gpt.py writes
  agreement     from bench/transformers_agreement.json, which its script writes
Without its file a table says that nothing was measured yet.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD = Path("tests/device/record.json")
CPU = {"forward": Path("bench/cpu_forward.json"), "backward": Path("bench/cpu_backward.json")}
TRAIN = {"CPU": Path("docs/train_gpt_cpu.json"), "GPU": Path("docs/train_gpt_gpu.json")}
AGREEMENT = Path("bench/transformers_agreement.json")
NOT_YET = "Not measured yet."
IMAGES = {
    "compute_80 PTX": "PTX of compute_80, compiled by the driver",
    "rows of sm_86": "the rows for 8.6, compiled for this GPU",
}

Cell = dict[str, Any]


PEERS = {"fa2": "torch's FlashAttention-2", "cudnn": "cuDNN through torch"}


def gpu_table(
    root: Path, native: bool = True, peer: str = "fa2", op: str = "forward", family: str = ""
) -> str:
    """Speed over the grid, by image: ours, and how many times that of a peer."""
    parts = []
    for section in sections(root, native, op):
        if family not in ("", section["family"]):
            continue
        cells = [
            cell for cell in section.get("bench", []) if is_plain(cell) and peer in cell["peers"]
        ]
        if not cells:
            continue
        ratios = [cell["ours"] / cell["peers"][peer] for cell in cells]
        image = IMAGES.get(section["image"], f"image {section['image']}")
        parts.append(
            f"{section['gpu']}, {image}, driver {section['driver']}, {section['date']}: {op}, "
            f"{cells[0]['dtype']}, {cells[0]['unit']} (in brackets: times the speed of "
            f"{PEERS[peer]} in the same run; geometric mean {geometric_mean(ratios):.2f})\n\n"
            + grid(cells, lambda c: c["ours"], lambda c: c["ours"] / c["peers"][peer])
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
        image = IMAGES.get(section["image"], f"image {section['image']}")
        parts.append(
            f"{section['gpu']}, {image}, {cells[0]['seqlen']} tokens: time that an option adds to "
            f"the plain kernel\n\n{markdown(heads, lines)}"
        )
    return "\n\n".join(parts) or NOT_YET


def cpu_table(root: Path, op: str = "forward") -> str:
    """Speed over the grid: ours, and how many times that of torch's SDPA."""
    path = root / CPU[op]
    if not path.is_file():
        return NOT_YET
    report = json.loads(path.read_text())
    return (
        f"{report['cpu']}, {report['threads']} threads, torch {report['torch']}, {report['date']}: "
        f"{op}, batch 1, hidden 1024, GFLOP/s (in brackets: times the speed of torch's SDPA in "
        f"the same run; geometric mean {report['geomean']:.2f}){disturbance(report['cells'])}\n\n"
        + grid(report["cells"], lambda c: c["ours"], lambda c: c["ratio"])
    )


def disturbance(cells: Sequence[Cell]) -> str:
    """A remark when other work ran on the same cores, which the best calls of a cell betray."""
    most = max(cell.get("ours_best", cell["ours"]) / cell["ours"] for cell in cells)
    if most < 1.5:
        return ""
    return (
        f". Other work ran on these cores: the best calls were up to {most:.1f} times as fast as "
        "these medians, and the ratios are those of neighbouring calls"
    )


def train_table(root: Path) -> str:
    """The training example: loss, time and memory of both attentions."""
    lines, remarks = [], []
    for place, name in TRAIN.items():
        if not (root / name).is_file():
            continue
        report = json.loads((root / name).read_text())
        settings = report["settings"]
        where = f"{place}, {settings['length']} characters a sequence"
        for line in report["summary"]:
            cells = [line["stopped"], "", ""]
            if not line["stopped"]:
                memory = f"{line['peak_bytes'] / 2**20:,.0f} MB"
                cells = [f"{line['loss']:.3f}", f"{line['seconds']:.0f} s", memory]
            lines.append([where, line["attention"], *cells])
        torch, dtype = report["versions"]["torch"], settings["dtype"].rpartition(".")[2]
        disturbed = f" ({report['remark']})" if report["remark"] else ""
        remarks.append(f"{report['hardware']}, {dtype}, torch {torch}, {report['date']}{disturbed}")
    if not lines:
        return NOT_YET
    heads = ["", "attention", "loss, nats a character", "time of a run", "peak memory"]
    return f"{'; '.join(remarks)}\n\n{markdown(heads, lines)}"


def agreement_table(root: Path) -> str:
    """How far transformers' models are from their eager attention."""
    if not (root / AGREEMENT).is_file():
        return NOT_YET
    report = json.loads((root / AGREEMENT).read_text())
    lines = [
        [
            line["model"],
            f"{line['logits']:.0e}",
            f"{line['gradients']:.0e}",
            f"{line['same_tokens']} of {line['tokens']}" if "tokens" in line else "",
        ]
        for line in report["models"]
    ]
    heads = ["model", "logits", "gradients of all parameters", "generated tokens that are the same"]
    return (
        f"float32, {report['hardware']}, torch {report['torch']}, transformers "
        f"{report['transformers']}, {report['date']}: largest difference from eager, over the "
        f"largest value\n\n{markdown(heads, lines)}\n\nall-MiniLM-L6-v2 on paragraphs of the "
        f"README: unit vectors differ by {report['minilm']:.0e} at most."
    )


Tables = dict[str, Callable[[Path], str]]
TABLES: Tables = {
    "gpu": gpu_table,
    "gpu-backward": partial(gpu_table, op="backward"),
    "options": option_table,
    "cpu": cpu_table,
    "cpu-backward": partial(cpu_table, op="backward"),
    "train": train_table,
}
IMAGE_TABLES: Tables = {
    "gpu-images": partial(gpu_table, native=False),
    "options-images": partial(option_table, native=False),
}
PAGES: dict[str, Tables] = {
    "README.md": TABLES,
    "docs/kernels/sm80_forward.md": IMAGE_TABLES,
    "docs/kernels/sm90_forward.md": {"gpu-cudnn": partial(gpu_table, peer="cudnn", family="sm90")},
    "docs/kernels/sm90_backward.md": {
        "gpu-backward-cudnn": partial(gpu_table, peer="cudnn", op="backward", family="sm90")
    },
    "docs/transformers.md": {"agreement": agreement_table},
}


def sections(root: Path, native: bool, op: str = "forward") -> list[dict[str, Any]]:
    """The record's sections of an operation: those of native images, or the others."""
    path = root / RECORD
    found = json.loads(path.read_text())["sections"] if path.is_file() else []
    name = {"forward": "fwd", "backward": "bwd"}[op]
    return [s for s in found if s["op"] == name and s["image"].startswith("sm_") == native]


def is_plain(cell: Cell) -> bool:
    return not cell["options"] and cell["layout"] == "dense" and cell["heads"] == cell["heads_k"]


def option_name(cell: Cell) -> str:
    if cell["options"]:
        return ", ".join(sorted(cell["options"]))
    return "packed sequences" if cell["layout"] == "packed" else "GQA, 4 query heads a key head"


def grid(
    cells: Iterable[Cell], speed: Callable[[Cell], float], ratio: Callable[[Cell], float]
) -> str:
    """A line for each dtype, head dim and mask, a column for each sequence length."""
    table: dict[tuple[Any, ...], dict[int, str]] = {}
    for cell in cells:
        line = table.setdefault((cell["dtype"], cell["d"], cell["causal"]), {})
        line[cell["seqlen"]] = f"{speed(cell):.0f} ({ratio(cell):.2f}x)"
    seqlens = sorted({seqlen for line in table.values() for seqlen in line})
    heads = ["dtype", "d", "mask", *(length(seqlen) for seqlen in seqlens)]
    lines = [
        [dtype, str(d), mask(causal), *(line.get(seqlen, "") for seqlen in seqlens)]
        for (dtype, d, causal), line in table.items()
    ]
    return markdown(heads, lines)


def markdown(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *lines])


def mask(causal: bool) -> str:
    return "causal" if causal else "full"


def length(seqlen: int) -> str:
    return f"{seqlen // 1024}k" if seqlen % 1024 == 0 else str(seqlen)


def geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def updated(text: str, root: Path, tables: Tables = TABLES) -> str:
    """The text with each table between its markers as the files have it now."""
    for name, make in tables.items():
        start, end = f"<!-- table:{name} -->\n", f"<!-- /table:{name} -->"
        if text.count(start) != 1 or text.count(end) != 1:
            raise SystemExit(f"the page has not one place for the table {name}")
        before, rest = text.split(start)
        text = f"{before}{start}{make(root)}\n{end}{rest.split(end)[1]}"
    return text


def main() -> int:
    status = 0
    for name, tables in PAGES.items():
        page = ROOT / name
        current = page.read_text(encoding="utf-8")
        text = updated(current, ROOT, tables)
        if "--check" not in sys.argv[1:]:
            page.write_text(text, encoding="utf-8")
        elif current != text:
            print(f"{name} has not the measured tables: run tools/update_tables.py")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
