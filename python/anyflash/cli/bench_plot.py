"""The benchmark's plot: a panel for each head dim and mask, speed over the sequence length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {"anyflash": "#0b6e4f", "torch SDPA": "#c46210", "standard": "#7a7a7a"}
MARKERS = {"anyflash": "o", "torch SDPA": "s", "standard": "^"}


def plot(report: dict[str, Any], path: Path) -> None:
    """Draws the report of `bench` into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = report["bench"]
    dims = sorted({entry["d"] for entry in entries})
    masks = sorted({entry["causal"] for entry in entries})
    names = [name for name in COLOURS if any(_rate(entry, name) is not None for entry in entries)]
    figure, panels = pyplot.subplots(
        len(masks),
        len(dims),
        figsize=(4.6 * len(dims) + 0.6, 3.1 * len(masks) + 1.1),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for row, causal in enumerate(masks):
        for column, d in enumerate(dims):
            cells = [entry for entry in entries if entry["d"] == d and entry["causal"] == causal]
            _panel(panels[row][column], cells, names)
            panels[row][column].set_title(
                f"head dim {d}, {'causal' if causal else 'full'}", fontsize=10
            )
    seqlens = sorted({entry["seqlen"] for entry in entries})
    for panel in panels[-1]:
        panel.set_xscale("log", base=2)
        panel.set_xticks(seqlens, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in seqlens])
        panel.minorticks_off()
        panel.set_xlabel("sequence length")
    for row in panels:
        row[0].set_ylabel(entries[0]["unit"])
        row[0].set_ylim(bottom=0)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    versions = ", ".join(
        f"{name} {version}"
        for name, version in report["versions"].items()
        if name in ("anyflash", "torch", "NumPy")
    )
    figure.suptitle(
        f"Attention forward, {entries[0]['dtype']}: {report['hardware']}\n"
        f"{versions}, {report['date']}",
        fontsize=11,
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _rate(entry: dict[str, Any], name: str) -> float | None:
    rate = entry["ours"] if name == "anyflash" else entry["peers"].get(name)
    return None if rate is None else float(rate)


def _panel(panel: Any, cells: list[dict[str, Any]], names: list[str]) -> None:
    for name in names:
        points = [
            (cell["seqlen"], rate) for cell in cells if (rate := _rate(cell, name)) is not None
        ]
        panel.plot(
            *zip(*points),
            color=COLOURS[name],
            marker=MARKERS[name],
            label=name,
            linewidth=1.8,
            markersize=5,
        )
        missing = [cell["seqlen"] for cell in cells if name in cell["out_of_memory"]]
        for seqlen in missing:
            panel.annotate(
                f"{name}:\nout of memory",
                (seqlen, 0),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color=COLOURS[name],
            )
    panel.grid(True, linewidth=0.4, alpha=0.6)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
