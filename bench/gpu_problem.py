"""What the GPU benchmarks compute: problems, their work, and how the record names them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from statistics import NormalDist
from typing import Any, Callable

import torch

TOKENS, HIDDEN = 16384, 2048
HEAD_DIMS = (64, 128, 256)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
MASKS = (False, True)

Run = Callable[[], Any]


@dataclass
class Problem:
    """One call: q [B, N, H, d], k, v alike, or packed sequences [tokens, H, d] of these lengths.

    With `backward` what is measured is the gradients, not the output.
    """

    q: Any
    k: Any
    v: Any
    causal: bool
    backward: bool = False
    window: tuple[int, int] | None = None
    packed: tuple[int, ...] = ()

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.packed or (self.q.shape[1],) * self.q.shape[0]

    @cached_property
    def sums(self) -> Any:
        """Where each packed sequence begins, and the end."""
        sums = list(accumulate(self.packed, initial=0))
        return torch.tensor(sums, dtype=torch.int32, device=self.q.device)

    @cached_property
    def dout(self) -> Any:
        shape = (*self.q.shape[:-1], self.v.shape[-1])
        return torch.randn(shape, device=self.q.device, dtype=self.q.dtype)

    def pairs(self) -> float:
        """Queries and keys that see each other, of one head; causal counts as half."""
        if self.window is None:
            return sum(n * n for n in self.lengths) / (2 if self.causal else 1)
        return sum(n + sum(w * n - w * (w + 1) / 2 for w in self.window) for n in self.lengths)

    def flops(self) -> float:
        """Of two matrix products, backward of five: three sum over d or have d columns."""
        d, dv = self.q.shape[-1], self.v.shape[-1]
        return 2 * self.q.shape[-2] * self.pairs() * (3 * d + 2 * dv if self.backward else d + dv)

    def described(self) -> dict[str, Any]:
        lengths = self.lengths
        options: dict[str, Any] = {"window": list(self.window)} if self.window else {}
        options |= {"lengths": "log-normal"} if len(set(lengths)) > 1 else {}
        return {
            "d": self.q.shape[-1],
            "dv": self.v.shape[-1],
            "heads": self.q.shape[-2],
            "heads_k": self.k.shape[-2],
            "causal": self.causal,
            "seqlen": round(sum(lengths) / len(lengths)),
            "batch": len(lengths),
            "dtype": "bf16",
            "layout": "packed" if self.packed else "dense",
            "options": options,
            "deterministic": not self.backward,
        }


def dense(
    seqlen: int,
    d: int,
    causal: bool,
    backward: bool = False,
    *,
    dv: int | None = None,
    heads: int | None = None,
    heads_k: int | None = None,
    batch: int | None = None,
    window: int | None = None,
) -> Problem:
    """Of 16k tokens, with 2048 columns of values over all heads, if nothing else is said."""
    dv, heads = dv or d, heads or HIDDEN // (dv or d)
    rows = (batch or TOKENS // seqlen, seqlen)
    q, k, v = tensors(rows, (heads, d), (heads_k or heads, d), (heads_k or heads, dv), backward)
    sides = None if window is None else (window, 0 if causal else window)
    return Problem(q, k, v, causal, backward, sides)


def packed(lengths: tuple[int, ...], d: int, causal: bool, backward: bool = False) -> Problem:
    columns = (HIDDEN // d, d)
    q, k, v = tensors((sum(lengths),), columns, columns, columns, backward)
    return Problem(q, k, v, causal, backward, packed=lengths)


def tensors(
    rows: tuple[int, ...],
    q: tuple[int, int],
    k: tuple[int, int],
    v: tuple[int, int],
    backward: bool = False,
) -> tuple[Any, Any, Any]:
    """Random ones of so many rows; q, k, v: their heads and columns."""
    make = partial(torch.randn, device="cuda", dtype=torch.bfloat16, requires_grad=backward)
    return make(*rows, *q), make(*rows, *k), make(*rows, *v)


def log_normal_lengths(count: int = 64, mean: int = 1024, sigma: float = 0.7) -> tuple[int, ...]:
    """Lengths that lie as a log-normal distribution has them, in a random order; their mean."""
    normal = NormalDist(0, sigma)
    lengths = [math.exp(normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    scale = mean * count / sum(lengths)
    whole = [round(scale * length) for length in lengths]
    whole[-1] += mean * count - sum(whole)
    random.Random(0).shuffle(whole)
    return tuple(whole)


def as_much_dense(p: Problem) -> Problem:
    """Sequences of one length, of as many tokens and nearly as many flops as these packed ones."""
    tokens = sum(p.packed)
    seqlen = 128 * round(sum(n * n for n in p.packed) / tokens / 128)
    d = p.q.shape[-1]
    return dense(seqlen, d, p.causal, p.backward, batch=round(tokens / seqlen))


def extra_problems(backward: bool) -> Iterator[Callable[[], Problem]]:
    """What the grid has not: grouped heads, other head dims, windows, packed sequences."""
    for heads in (32, 64):
        for causal in MASKS:
            yield partial(dense, 8192, 128, causal, backward, heads=heads, heads_k=8)
    for d, dv in ((96, 96), (192, 128)):
        for causal in MASKS:
            for seqlen in LENGTHS:
                yield partial(dense, seqlen, d, causal, backward, dv=dv)
    for seqlen in (16384, 65536):
        for causal in MASKS:
            yield partial(dense, seqlen, 128, causal, backward, batch=1, window=1024)
    for d in HEAD_DIMS:
        for causal in MASKS:
            yield partial(packed, log_normal_lengths(), d, causal, backward)
