"""Who computes the problems of the GPU benchmarks: ours, and the peers that take them.

Each is a function of a problem; it returns a call without arguments, which returns O in q's layout.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, Callable

import anyflash
import torch
from gpu_problem import Problem, Run


def ours(p: Problem, **options: Any) -> Run:
    if p.window:
        options["window"] = p.window
    if not p.packed:
        return partial(anyflash.attention, p.q, p.k, p.v, causal=p.causal, **options)
    ends, longest = p.sums, max(p.lengths)
    varlen = partial(anyflash.attention_varlen, p.q, p.k, p.v, ends, ends, longest, longest)
    return partial(varlen, causal=p.causal, **options)


def cudnn(p: Problem) -> Run:
    """cuDNN's attention, through torch."""
    if p.packed or p.window:
        raise NotImplementedError("torch gives cuDNN neither packed sequences nor windows")
    q, k, v = (x.transpose(1, 2) for x in (p.q, p.k, p.v))
    attention = torch.ops.aten._scaled_dot_product_cudnn_attention

    def run() -> Any:
        return attention(q, k, v, None, p.backward, 0.0, p.causal)[0].transpose(1, 2)

    return run


def fa4(p: Problem) -> Run:
    """FlashAttention-4, where the package flash-attn-4 is installed."""
    if p.packed or p.window:
        raise NotImplementedError("not asked: each kind compiles for seconds")
    from flash_attn.cute import flash_attn_func

    return lambda: flash_attn_func(p.q, p.k, p.v, causal=p.causal)[0]


def fa2(p: Problem) -> Run:
    """torch's FlashAttention-2."""
    ends, longest = p.sums if p.packed else None, max(p.lengths)
    left, right = p.window or (None, None)
    attention = partial(
        torch.ops.aten._flash_attention_forward,
        *(p.q, p.k, p.v, ends, ends, longest, longest, 0.0, p.causal, False),
        window_size_left=left,
        window_size_right=right,
    )
    return lambda: attention()[0]


PEERS: dict[str, Callable[[Problem], Run]] = {"cudnn": cudnn, "fa4": fa4, "fa2": fa2}


def measured(p: Problem, run: Run) -> Run:
    """What is measured of a call: itself, or the gradients of what it computed before."""
    if not p.backward:
        return run
    return partial(torch.autograd.grad, run(), (p.q, p.k, p.v), p.dout, retain_graph=True)


def takers(p: Problem, peers: Sequence[str], most: int = len(PEERS)) -> dict[str, Run]:
    """Ours, and the first of the peers that take the problem and compute the same.

    Whoever compiles at his first call has done so then.
    """
    runs = {"ours": measured(p, ours(p))}
    expected = runs["ours"]()
    for name in peers:
        try:
            run = measured(p, PEERS[name](p))
            if not agree(run(), expected):
                raise ArithmeticError("computes something else")
        except Exception as error:  # whatever a peer raises, the others are measured
            complain(f"{name}: {type(error).__name__}: {str(error)[:400]}")
            continue
        runs[name] = run
        if len(runs) > most:
            break
    return runs


def agree(results: Any, expected: Any) -> bool:
    """Within what rounding does; another mask or other heads differ by as much as there is."""
    pairs = zip(results, expected) if isinstance(expected, tuple) else [(results, expected)]
    return all(float((a - b).abs().max()) < 0.1 * float(b.abs().max()) for a, b in pairs)


@cache
def complain(message: str) -> None:
    """Once each."""
    print(message, file=sys.stderr, flush=True)
