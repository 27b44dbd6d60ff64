"""Random cases, forward and backward, each against the formula in fp64, until the time is over.

usage: python tests/device/soak.py [--seconds 60] [--seed 0] [--processes 4]

Beside those of tests/random_cases.py: many short packed sequences, whose tiles follow each other
closely. Every result must be the same bit for bit when it is computed again. Of several processes
every second one gives each tensor memory of its own: what lies beside a tensor may then not be
there at all.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import anyflash
import torch
from accuracy import worst_gradient_violation, worst_violation
from case_list import case_of
from case_tensors import prepare, prepare_backward
from random_cases import random_line

DEVICE = os.environ.get("ANYFLASH_TEST_DEVICE", "cuda")


def line_of(seed: int) -> dict[str, Any]:
    return many_sequences(seed) if seed % 2 else random_line(seed)


def many_sequences(seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    heads_k, longest = draw.choice([1, 2, 8]), draw.choice([40, 300, 900])
    lengths = [draw.randint(0, longest) for _ in range(draw.randint(20, 90))]
    others = lengths if draw.random() < 0.5 else [draw.randint(0, longest) for _ in lengths]
    return {
        "name": f"many sequences {seed}",
        "d": draw.choice([64, 96, 128, 192, 256, draw.randint(1, 256)]),
        "heads": heads_k * draw.choice([1, 2]),
        "heads_k": heads_k,
        "packed": [list(pair) for pair in zip(lengths, others)],
        "causal": draw.random() < 0.5,
    }


def bits_of(result: Any) -> list[torch.Tensor]:
    return [x.clone().view(torch.uint8) for x in vars(result).values() if x is not None]


def wrong_about(seed: int) -> str | None:
    case, dtype = case_of(line_of(seed)), ("float16", "bfloat16")[seed // 2 % 2]
    forward, backward = prepare(case, dtype, DEVICE), prepare_backward(case, dtype, DEVICE)

    def o() -> Any:
        return forward.run(anyflash.attention, anyflash.attention_varlen)

    def gradients() -> Any:
        return backward.run(anyflash, deterministic=True)

    results = o(), gradients()
    for run, result in zip((o, gradients), results):
        first = bits_of(result)
        if not all(torch.equal(a, b) for a, b in zip(first, bits_of(run()))):
            return "not the same bits again"
    violation = worst_violation(results[0], forward.inputs, dtype) or worst_gradient_violation(
        results[1], backward.forward.inputs, backward.cotangents, dtype
    )
    return str(violation) if violation else None


def soak(seed: int, step: int, seconds: float) -> int:
    """The number of wrong cases, of seeds so many apart."""
    end = time.monotonic() + seconds
    cases = wrong = 0
    while time.monotonic() < end:
        if what := wrong_about(seed):
            wrong += 1
            print(f"{line_of(seed)}: {what}", flush=True)
        cases += 1
        seed += step
    print(f"{cases} cases, {wrong} wrong", flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, default=1)
    settings = parser.parse_args()
    if settings.processes == 1:
        return 1 if soak(settings.seed, settings.step, settings.seconds) else 0
    started = []
    for i in range(settings.processes):
        own = [sys.executable, __file__, "--seconds", str(settings.seconds)]
        own += ["--seed", str(settings.seed + i), "--step", str(settings.processes | 1)]
        environment = {**os.environ, **({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if i % 2 else {})}
        started.append(subprocess.Popen(own, env=environment))
    return max(process.wait() for process in started)


if __name__ == "__main__":
    sys.exit(main())
