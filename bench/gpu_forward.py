"""Forward speed on a GPU: ours, torch's FlashAttention-2 and, on Hopper, cuDNN in one run; medians.

usage: python bench/gpu_forward.py [--grid] [--options] [--host] [--out cells.jsonl] [--seconds S]

--grid     d 64, 128, 256 x full, causal x 512 to 16k: 16k tokens, hidden 2048, bf16, in TFLOP/s
--options  what window, softcap, ALiBi, packed sequences and GQA cost over the plain kernel at 4k;
           the window covers every key but one, so that the work is the same
--host     microseconds of host time per call, of a problem too small to keep the GPU busy

Each cell is a line of JSON, written as soon as it is measured. The candidates of a cell take turns,
in changing order, so that clocks and heat treat them alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Callable

import anyflash
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

TOKENS, HIDDEN = 16384, 2048
HEAD_DIMS = (64, 128, 256)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
SAMPLE_SECONDS = 2e-3

Run = Callable[[], Any]


def flash_attention_2(q: Any, k: Any, v: Any, causal: bool) -> Run:
    """torch's FA2 on [B, N, H, d] tensors, which it takes as [B, H, N, d] views."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def run() -> Any:
        return sdpa(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])

    return run


def cudnn(q: Any, k: Any, v: Any, causal: bool) -> dict[str, Run]:
    """{"cudnn": cuDNN's attention, through torch}, if it takes such [B, N, H, d] tensors."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    attention = torch.ops.aten._scaled_dot_product_cudnn_attention

    def run() -> Any:
        return attention(q, k, v, None, False, 0.0, causal)

    try:
        run()
    except RuntimeError:
        return {}
    return {"cudnn": run}


def measure(candidates: dict[str, Run], seconds: float) -> dict[str, float]:
    """Median seconds of one call of each candidate."""
    repeats = {name: _repeats(run) for name, run in candidates.items()}
    names = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[names[0]]) < 5:
        for name in names:
            samples[name].append(_timed(candidates[name], repeats[name]))
        names.reverse()
    time.sleep(0.1)  # let the chip cool between cells
    return {name: statistics.median(times) for name, times in samples.items()}


def _repeats(run: Run) -> int:
    """Calls that fill one sample, measured after a warm-up."""
    for _ in range(3):
        run()
    return max(1, round(SAMPLE_SECONDS / _timed(run, 3)))


def _timed(run: Run, repeats: int) -> float:
    run()  # the GPU is busy with it while the host prepares what is timed
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / 1e3 / repeats


def tensors(seqlen: int, d: int, heads_k: int | None = None) -> tuple[Any, Any, Any]:
    batch, heads = TOKENS // seqlen, HIDDEN // d
    make = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    q = make(batch, seqlen, heads, d)
    k, v = (make(batch, seqlen, heads_k or heads, d) for _ in range(2))
    return q, k, v


def cell(
    q: Any,
    k: Any,
    causal: bool,
    times: dict[str, float],
    ours: str = "ours",
    products: int = 2,
    **more: Any,
) -> dict[str, Any]:
    """A cell of the record in TFLOP/s; products: matrix products of N N d; causal counts half."""
    batch, seqlen, heads, d = q.shape
    flops = 2 * products * batch * heads * seqlen * seqlen * d / (2 if causal else 1)
    speeds = {name: round(flops / seconds / 1e12, 1) for name, seconds in times.items()}
    described = {
        "d": d,
        "dv": d,
        "heads": heads,
        "heads_k": k.shape[2],
        "causal": causal,
        "seqlen": seqlen,
        "batch": batch,
        "dtype": "bf16",
        "layout": "dense",
        "options": {},
        "deterministic": True,
        **more,
    }
    peers = {name: speed for name, speed in speeds.items() if name != ours}
    return {**described, "ours": speeds[ours], "peers": peers, "unit": "TFLOP/s"}


def grid(seconds: float) -> Iterator[dict[str, Any]]:
    for d in HEAD_DIMS:
        for causal in (False, True):
            for seqlen in LENGTHS:
                q, k, v = tensors(seqlen, d)
                ours = partial(anyflash.attention, q, k, v, causal=causal)
                with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                    fa2 = flash_attention_2(q, k, v, causal)
                    times = measure({"ours": ours, "fa2": fa2, **cudnn(q, k, v, causal)}, seconds)
                yield cell(q, k, causal, times)


def options(seconds: float, seqlen: int = 4096) -> Iterator[dict[str, Any]]:
    for d in HEAD_DIMS:
        for causal in (False, True):
            q, k, v = tensors(seqlen, d)
            plain = partial(anyflash.attention, q, k, v, causal=causal)
            reach = seqlen - 2
            slopes = torch.linspace(0.01, 0.5, q.shape[2], device="cuda")
            choices: list[tuple[str, Any, dict[str, Any]]] = [
                ("window", [reach, 0 if causal else reach], {"window": (reach, None)}),
                ("softcap", 30.0, {"softcap": 30.0}),
                ("alibi", "h", {"alibi_slopes": slopes}),
            ]
            for name, value, arguments in choices:
                run = partial(plain, **arguments)
                times = measure({"ours": run, "plain": plain}, seconds)
                yield cell(q, k, causal, times, options={name: value})
            yield packed_cell(q, k, v, causal, plain, seconds)
            heads_k = q.shape[2] // 4
            few = tensors(seqlen, d, heads_k)
            run = partial(anyflash.attention, *few, causal=causal)
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                peer = flash_attention_2(*few, causal)
                times = measure({"ours": run, "plain": plain, "fa2": peer}, seconds)
            yield cell(few[0], few[1], causal, times)


def packed_cell(q: Any, k: Any, v: Any, causal: bool, plain: Run, seconds: float) -> dict[str, Any]:
    batch, seqlen = q.shape[:2]
    lengths = torch.arange(0, TOKENS + 1, seqlen, dtype=torch.int32, device="cuda")
    run = partial(
        anyflash.attention_varlen,
        *(x.flatten(0, 1) for x in (q, k, v)),
        lengths,
        lengths,
        seqlen,
        seqlen,
        causal=causal,
    )
    return cell(q, k, causal, measure({"ours": run, "plain": plain}, seconds), layout="packed")


def host(calls: int = 200, rounds: int = 15) -> Iterator[dict[str, Any]]:
    """Host time of a call that gives the GPU next to nothing to do."""
    q, k, v = (torch.randn(1, 16, 1, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    candidates: dict[str, Run] = {
        "ours": partial(anyflash.attention, q, k, v),
        "fa2": flash_attention_2(q, k, v, False),
    }
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.no_grad():
        for _ in range(rounds):
            for name, run in candidates.items():
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    run()
                samples[name].append((time.perf_counter() - start) / calls * 1e6)
    times = {name: round(statistics.median(values), 2) for name, values in samples.items()}
    line = cell(q, k, False, {"ours": 1.0}, options={"measured": "host time per call"})
    yield {**line, "ours": times["ours"], "peers": {"fa2": times["fa2"]}, "unit": "us"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", action="store_true")
    parser.add_argument("--options", action="store_true")
    parser.add_argument("--host", action="store_true")
    parser.add_argument("--out", type=Path, help="append each cell as a line of JSON")
    parser.add_argument("--seconds", type=float, default=0.4, help="measuring time of a cell")
    arguments = parser.parse_args()
    parts: list[Iterator[dict[str, Any]]] = []
    if arguments.grid:
        parts.append(grid(arguments.seconds))
    if arguments.host:
        parts.append(host())
    if arguments.options:
        parts.append(options(arguments.seconds))
    for part in parts:
        for line in part:
            text = json.dumps(line)
            print(text, flush=True)
            if arguments.out:
                with arguments.out.open("a") as file:
                    file.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
