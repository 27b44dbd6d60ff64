"""The demo's long document: one sequence of many tokens, where the standard attention's memory
grows with its square.

Each method runs in a process of its own, so that neither finds memory that the other has left
behind. Run as a program this module is that process: a job as JSON on stdin, a result as a JSON
line on stdout for each length.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anyflash.cli import attention_devices
from anyflash.cli.bert import Bert, standard_attention
from anyflash.cli.console import Progress, UserError
from anyflash.cli.memory import PeakResident, available


@dataclass
class Run:
    """One length by one method. peak: growth of the resident memory while encoding, in bytes."""

    length: int
    seconds: float | None
    peak: int | None
    embedding: list[float] | None
    skipped: str = ""


def score_bytes(heads: int, length: int) -> int:
    """Memory of one sequence's score matrices, float32."""
    return 4 * heads * length * length


def lengths_up_to(longest: int) -> list[int]:
    """longest and its halves, at most three of them and none under 128."""
    return sorted({max(longest >> halvings, min(longest, 128)) for halvings in range(3)})


def measure(
    folder: Path,
    method: str,
    device: str,
    tokens: Sequence[int],
    lengths: Sequence[int],
    progress: Progress,
) -> list[Run]:
    """Encodes the first `length` tokens as one sequence, for each length, in a fresh process."""
    job = {
        "model": str(folder),
        "method": method,
        "device": device,
        "tokens": list(tokens),
        "lengths": list(lengths),
    }
    child = subprocess.Popen(
        [sys.executable, "-m", "anyflash.cli.long_document"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None and child.stdout is not None
    runs = []
    with child:
        json.dump(job, child.stdin)
        child.stdin.close()
        for line in child.stdout:
            runs.append(Run(**json.loads(line)))
            progress.step()
            progress.note(f"{method} attention, {runs[-1].length} tokens done")
    for length in list(lengths)[len(runs) :]:  # killed, most likely for want of memory
        runs.append(
            Run(length, None, None, None, f"the process ended with code {child.returncode}")
        )
        progress.step()
    return runs


def _work(job: dict[str, Any]) -> None:
    bert = Bert(Path(job["model"]))
    attention = (
        standard_attention
        if job["method"] == "standard"
        else attention_devices.choose(job["device"])[0]
    )
    bert.encode(
        [job["tokens"][:64]], attention
    )  # whatever the first call sets up is not what we ask about
    for length in job["lengths"]:
        free = available()
        need = 2 * score_bytes(bert.heads, length)
        if job["method"] == "standard" and free is not None and need > free:
            text = f"needs {need / 2**30:.1f} GB, {free / 2**30:.1f} GB are free"
            print(json.dumps(vars(Run(length, None, None, None, text))), flush=True)
            continue
        peak = PeakResident()
        start = time.perf_counter()
        embedding = bert.encode([job["tokens"][:length]], attention)[0]
        seconds = time.perf_counter() - start
        run = Run(length, seconds, peak.growth(), np.asarray(embedding, np.float64).tolist())
        print(json.dumps(vars(run)), flush=True)


if __name__ == "__main__":
    try:
        _work(json.load(sys.stdin))
    except UserError as error:
        sys.exit(f"anyflash: {error}")
