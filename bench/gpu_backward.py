"""Backward speed on a GPU: ours, torch's FlashAttention-2, on Hopper also cuDNN; medians of a run.

usage: python bench/gpu_backward.py [--grid] [--options] [--out cells.jsonl] [--seconds S]

--grid     d 64, 128, 256 x full, causal x 512 to 16k: 16k tokens, hidden 2048, bf16, in TFLOP/s
--options  what deterministic dQ, window, softcap, ALiBi and GQA cost over the plain kernels at 1k,
           4k and 16k (deterministic) or 4k

Both sides are torch.autograd.grad of an output that was computed before. Method: gpu_forward.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyflash
import torch
from gpu_forward import HEAD_DIMS, LENGTHS, Run, cell, flash_attention_2, measure, tensors
from torch.nn.attention import SDPBackend, sdpa_kernel


def gradients(o: Any, inputs: tuple[Any, ...], dout: Any) -> Run:
    return partial(torch.autograd.grad, o, inputs, dout, retain_graph=True)


def ours(inputs: tuple[Any, ...], dout: Any, **options: Any) -> Run:
    return gradients(anyflash.attention(*inputs, **options), inputs, dout)


def peer(inputs: tuple[Any, ...], dout: Any, causal: bool) -> Run:
    """torch's FA2, differentiated through the views that it takes."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        o = flash_attention_2(*inputs, causal)()
    return gradients(o, inputs, dout.transpose(1, 2))


def cudnn(inputs: tuple[Any, ...], dout: Any, causal: bool) -> dict[str, Run]:
    """{"cudnn": its backward through torch} where it takes tensors of this kind."""
    heads_first = (x.transpose(1, 2) for x in inputs)
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            o = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal)
        run = gradients(o, inputs, dout.transpose(1, 2))
        run()
    except RuntimeError:
        return {}
    return {"cudnn": run}


def problem(seqlen: int, d: int, heads_k: int | None = None) -> tuple[tuple[Any, ...], Any]:
    inputs = tuple(x.requires_grad_() for x in tensors(seqlen, d, heads_k))
    return inputs, torch.randn_like(inputs[0])


def backward_cell(*arguments: Any, **more: Any) -> dict[str, Any]:
    """Five products instead of the forward's two."""
    return cell(*arguments, products=5, **{"deterministic": False, **more})


def grid(seconds: float) -> Iterator[dict[str, Any]]:
    for d in HEAD_DIMS:
        for causal in (False, True):
            for seqlen in LENGTHS:
                inputs, dout = problem(seqlen, d)
                runs = {"ours": ours(inputs, dout, causal=causal)}
                runs["fa2"] = peer(inputs, dout, causal)
                runs |= cudnn(inputs, dout, causal)
                yield backward_cell(inputs[0], inputs[1], causal, measure(runs, seconds))


def options(seconds: float) -> Iterator[dict[str, Any]]:
    for d in HEAD_DIMS:
        for causal in (False, True):
            for seqlen in (1024, 4096, 16384):
                inputs, dout = problem(seqlen, d)
                runs = {
                    "ours": ours(inputs, dout, causal=causal, deterministic=True),
                    "plain": ours(inputs, dout, causal=causal),
                }
                times = measure(runs, seconds)
                yield backward_cell(inputs[0], inputs[1], causal, times, deterministic=True)
            yield from choices(d, causal, seconds)


def choices(d: int, causal: bool, seconds: float, seqlen: int = 4096) -> Iterator[dict[str, Any]]:
    inputs, dout = problem(seqlen, d)
    plain = ours(inputs, dout, causal=causal)
    reach = seqlen - 2
    slopes = torch.linspace(0.01, 0.5, inputs[0].shape[2], device="cuda")
    for name, value, arguments in (
        ("window", [reach, 0 if causal else reach], {"window": (reach, None)}),
        ("softcap", 30.0, {"softcap": 30.0}),
        ("alibi", "h", {"alibi_slopes": slopes}),
    ):
        runs = {"ours": ours(inputs, dout, causal=causal, **arguments), "plain": plain}
        times = measure(runs, seconds)
        yield backward_cell(inputs[0], inputs[1], causal, times, options={name: value})
    few, dout = problem(seqlen, d, inputs[0].shape[2] // 4)
    runs = {"ours": ours(few, dout, causal=causal), "plain": plain, "fa2": peer(few, dout, causal)}
    yield backward_cell(few[0], few[1], causal, measure(runs, seconds))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", action="store_true")
    parser.add_argument("--options", action="store_true")
    parser.add_argument("--out", type=Path, help="append each cell as a line of JSON")
    parser.add_argument("--seconds", type=float, default=0.4, help="measuring time of a cell")
    arguments = parser.parse_args()
    parts = [grid] if arguments.grid else []
    parts += [options] if arguments.options else []
    for part in parts:
        for line in part(arguments.seconds):
            text = json.dumps(line)
            print(text, flush=True)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
