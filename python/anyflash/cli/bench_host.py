"""``python -m anyflash bench --host``: the time that a call costs on the host, in PyTorch.

What is computed is tiny, so that Python, torch's autograd and the launch are what is left. The
contestants take turns in one process; every number is a median.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from anyflash.cli.bench_backends import OURS, SDPA, Backend, TorchCpu, versions
from anyflash.cli.console import UserError, table
from anyflash.cli.facts import busy

Call = Callable[[], Any]
EMPTY = "empty Function"
COLUMNS = ("forward", "forward with gradient", "the backward alone", "forward and backward")
CALLS_A_TURN = 100  # fewer launches than a GPU's queue holds: the host never waits for it
EXPLANATION = """\
microseconds of host time a call, medians.
the backward alone: the gradient function called by itself, without autograd's engine.
empty Function: a classic torch.autograd.Function that computes nothing; what is more than it is the
library's own."""


@dataclass(frozen=True)
class Tiny:
    """The problem: batch 1."""

    seqlen: int
    heads: int
    d: int
    dtype: str
    device: str


def tiny(backend: Backend) -> Tiny:
    if backend.on_gpu:
        return Tiny(128, 8, 64, "bfloat16", "cuda")
    return Tiny(1, 1, 64, "float32", "cpu")  # the CPU computes within the call


def run(backend: Backend, seconds: float) -> dict[str, Any]:
    """Measures, prints the table, and returns it."""
    if not isinstance(backend, TorchCpu):
        raise UserError("--host needs torch: `pip install torch`", exit_code=1)
    problem = tiny(backend)
    place = "the GPU" if backend.on_gpu else "the CPU, for want of a GPU"
    words = ", ".join(f"{name} {version}" for name, version in versions(backend).items())
    print(f"{backend.hardware()}; {words}")
    print(
        f"on {place}: batch 1, {problem.seqlen} tokens, {problem.heads} heads, d {problem.d}, "
        f"{problem.dtype}"
    )
    times = measure(contestants(problem), seconds, backend)
    lines = [
        [name, *("-" if row[c] is None else f"{row[c]:.1f}" for c in COLUMNS)]
        for name, row in times.items()
    ]
    print(table(["", *COLUMNS], lines))
    print(EXPLANATION)
    remark = busy()
    if remark:
        print(remark)
    return {"problem": vars(problem), "microseconds": times}


def contestants(problem: Tiny) -> dict[str, dict[str, Call]]:
    """By name and column; what a contestant refuses is left out."""
    import torch

    import anyflash

    class Empty(torch.autograd.Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
            return q.detach()

        @staticmethod
        def backward(ctx: Any, dout: Any) -> Any:
            return dout, dout, dout

    shape = (1, problem.seqlen, problem.heads, problem.d)
    dtype = getattr(torch, problem.dtype)
    plain = [torch.randn(shape, dtype=dtype, device=problem.device) for _ in range(3)]
    # SDPA's layout, and the same memory as ours.
    swapped = [x.transpose(1, 2) for x in plain]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return {
        OURS: _columns(anyflash.attention, plain),
        SDPA: _columns(sdpa, swapped),
        EMPTY: _columns(Empty.apply, plain),
    }


def _columns(function: Callable[..., Any], plain: list[Any]) -> dict[str, Call]:
    """Each as one call. plain: tensors that want no gradient."""
    import torch

    leaves = [x.detach().clone().requires_grad_() for x in plain]
    try:
        o = function(*leaves)
        dout = torch.ones_like(o)
        torch.autograd.grad(o, leaves, dout, retain_graph=True)
    except NotImplementedError:  # no gradient here
        return {COLUMNS[0]: lambda: function(*plain)}
    node = o.grad_fn
    rest: tuple[None, ...] = ()
    if isinstance(node, torch.autograd.function.BackwardCFunction):  # written in Python
        node_call = node.apply
    else:  # torch's own, with a gradient for each of its outputs
        node_call, rest = node, (None,) * (_outputs(node, dout) - 1)

    def backward(graph: Any = o) -> Any:  # what o's gradient function saved lives as long as o
        with torch.no_grad():
            return node_call(dout, *rest)

    def both() -> Any:
        return torch.autograd.grad(function(*leaves), leaves, dout)

    calls = (lambda: function(*plain), lambda: function(*leaves), backward, both)
    return dict(zip(COLUMNS, calls))


def _outputs(node: Any, dout: Any) -> int:
    """How many gradients a node takes: tried out."""
    import torch

    for count in range(1, 12):
        try:
            with torch.no_grad():
                node(dout, *(None,) * (count - 1))
        except (RuntimeError, TypeError):
            continue
        return count
    raise UserError(f"{node} cannot be called by itself", exit_code=1)


def measure(
    contestants: dict[str, dict[str, Call]], seconds: float, backend: Backend
) -> dict[str, dict[str, float | None]]:
    """Median microseconds of each, or None for what a contestant does not have."""
    samples: dict[tuple[str, str], list[float]] = {
        (name, column): [] for name, calls in contestants.items() for column in calls
    }
    end = time.monotonic() + seconds
    turns = 0
    while turns < 3 or time.monotonic() < end:
        for name, column in samples:
            took = _microseconds(contestants[name][column], backend)
            if turns > 0:  # the first turn warms up
                samples[name, column].append(took)
        turns += 1
    return {
        name: {
            column: statistics.median(samples[name, column]) if column in calls else None
            for column in COLUMNS
        }
        for name, calls in contestants.items()
    }


def _microseconds(call: Call, backend: Backend) -> float:
    start = time.perf_counter()
    for _ in range(CALLS_A_TURN):
        call()
    took = time.perf_counter() - start
    if backend.on_gpu:
        import torch

        torch.cuda.synchronize()
    return took / CALLS_A_TURN * 1e6
