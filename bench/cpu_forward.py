"""Forward speed on the CPU: ours and torch's. Grid and method: cpu_comparison.py.

usage: python bench/cpu_forward.py [--threads N] [--seconds S] [--out FILE] [--options]

--options measures what each option costs over the plain kernel, at 2048 tokens.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyflash
import torch
from cpu_comparison import Comparison, Run, measure, pairs, parser, tensors, torch_flash, write


def ours(q: Any, k: Any, v: Any, **options: Any) -> Run:
    return partial(anyflash.attention, *(x.transpose(1, 2) for x in (q, k, v)), **options)


def contestants(q: Any, k: Any, v: Any, causal: bool) -> tuple[Run, Run]:
    return ours(q, k, v, causal=causal), partial(torch_flash, q, k, v, causal)


def difference(o: torch.Tensor, other: torch.Tensor) -> float:
    return float((o.transpose(1, 2).float() - other.float()).abs().max())


def option_costs(seconds: float, d: int = 64, seqlen: int = 2048) -> Iterator[dict[str, Any]]:
    """Time of each option over that of the same work without it."""
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = tensors(dtype, d, seqlen)
        slopes = torch.linspace(0.01, 0.5, q.shape[1])
        few = [x[:, : x.shape[1] // 4] for x in (k, v)]
        for name, run in {
            "softcap": ours(q, k, v, softcap=30.0),
            "alibi": ours(q, k, v, alibi_slopes=slopes),
            "window": ours(q, k, v, window=(seqlen - 2, seqlen - 2)),
            "gqa 4": ours(q, *few),
        }.items():
            times = pairs(run, ours(q, k, v), seconds)
            yield {
                "dtype": str(dtype).removeprefix("torch."),
                "d": d,
                "seqlen": seqlen,
                "option": name,
                "cost": round(statistics.median(a / b for a, b in times) - 1, 3),
            }


def main() -> int:
    options = parser(__doc__, Path(__file__).with_suffix(".json"))
    options.add_argument("--options", action="store_true", help="also what each option costs")
    arguments = options.parse_args()
    report = measure(Comparison(2, contestants, difference), arguments)
    if arguments.options:
        report["options"] = []
        for line in option_costs(arguments.seconds):
            report["options"].append(line)
            print(f"{line['dtype']:9} {line['option']:8} {100 * line['cost']:+6.1f} %", flush=True)
    write(report, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
