"""Writes the measured tables into README.md and the docs from what the benchmarks recorded; --check
says whether they are current.

usage: python tools/update_tables.py [--check]

A table stands between <!-- table:NAME --> and <!-- /table:NAME -->:
  gpu, gpu-backward, options   from tests/device/record.json, which tools/gpu_check.py writes:
                native images
  gpu-images, options-images   the same of the other images
  gpu-peers, gpu-extra, gpu-cycles, gpu-backward-...   of Hopper's own kernels: the grid beside
                every peer, other problems, cycles
  cpu, cpu-backward   from bench/cpu_forward.json and bench/cpu_backward.json, which the
                benchmarks of these names write
  train         from docs/train_gpt_*.json, which examples/train_gpt.py writes
  agreement     from bench/transformers_agreement.json, which its script writes
Without its file a table says that nothing was measured yet.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gpu_tables import (
    NOT_YET,
    Cell,
    cycles_table,
    extra_table,
    gpu_table,
    grid,
    markdown,
    option_table,
    peers_table,
)

ROOT = Path(__file__).resolve().parent.parent
CPU = {"forward": Path("bench/cpu_forward.json"), "backward": Path("bench/cpu_backward.json")}
TRAIN = {"CPU": Path("docs/train_gpt_cpu.json"), "GPU": Path("docs/train_gpt_gpu.json")}
AGREEMENT = Path("bench/transformers_agreement.json")


def cpu_table(root: Path, op: str = "forward") -> str:
    """Speed over the grid: ours, and how many times that of torch's SDPA. First without AVX-512,
    then with it, on another machine."""
    path = root / CPU[op]
    reports = [path, path.with_stem(path.stem + "_avx512")]
    grids = [cpu_grid(json.loads(x.read_text()), op) for x in reports if x.is_file()]
    return "\n\n".join(grids) or NOT_YET


def cpu_grid(report: dict[str, Any], op: str) -> str:
    place = f"{report['cpu']} ({report['isa']})" if "isa" in report else report["cpu"]
    return (
        f"{place}, {report['threads']} threads, torch {report['torch']}, {report['date']}: "
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
    "docs/kernels/sm90_forward.md": {
        "gpu-peers": peers_table,
        "gpu-extra": extra_table,
        "gpu-cycles": cycles_table,
    },
    "docs/kernels/sm90_backward.md": {
        "gpu-backward-peers": partial(peers_table, op="backward"),
        "gpu-backward-extra": partial(extra_table, op="backward"),
        "gpu-backward-cycles": partial(cycles_table, op="backward"),
    },
    "docs/transformers.md": {"agreement": agreement_table},
}


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
