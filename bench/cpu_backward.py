"""Backward speed on the CPU: ours and torch's, both through `torch.autograd.grad`. Grid and method:
cpu_comparison.py. Forwards are outside of the measurement.

usage: python bench/cpu_backward.py [--threads N] [--seconds S] [--out FILE]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anyflash
import torch
from cpu_comparison import Comparison, Run, measure, parser, torch_flash, write


def ours(q: Any, k: Any, v: Any, causal: bool) -> torch.Tensor:
    o: torch.Tensor = anyflash.attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal)
    return o.transpose(1, 2)


def contestants(q: Any, k: Any, v: Any, causal: bool) -> tuple[Run, Run]:
    inputs = [x.requires_grad_() for x in (q, k, v)]
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(q.dtype)

    def backward(forward: Any) -> Run:
        return partial(
            torch.autograd.grad, forward(*inputs, causal), inputs, dout, retain_graph=True
        )

    return backward(ours), backward(torch_flash)


def difference(gradients: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> float:
    """The largest, over the largest gradient where that is more than 1."""
    return max(
        float((x.float() - y.float()).abs().max() / y.float().abs().max().clamp(min=1))
        for x, y in zip(gradients, others)
    )


def main() -> int:
    arguments = parser(__doc__, Path(__file__).with_suffix(".json")).parse_args()
    write(measure(Comparison(5, contestants, difference), arguments), arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
