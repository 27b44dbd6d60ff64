"""Cases that nobody thought of: lines of the case list, drawn at random.

usage: python tests/random_cases.py [--count 2] [--seed 17] > lines.json
"""

from __future__ import annotations

import argparse
import json
import random
from typing import Any


def random_line(seed: int) -> dict[str, Any]:
    """A small case with any mixture of options; the same seed, the same case."""
    draw = random.Random(seed)
    heads_k = draw.randint(1, 3)
    line: dict[str, Any] = {"name": f"random {seed}", "d": _head_dim(draw)}
    line |= {"heads": heads_k * draw.randint(1, 3), "heads_k": heads_k}
    if draw.random() < 0.2:
        line["dv"] = _head_dim(draw)
    line |= _packed(draw) if draw.random() < 0.35 else _dense(draw)
    if draw.random() < 0.5:
        line["causal"] = True
    elif draw.random() < 0.5:
        line["window"] = [draw.choice([None, draw.randint(0, 200)]) for _ in range(2)]
    if draw.random() < 0.15:
        line["softcap"] = 5.0
    if draw.random() < 0.15:
        line["alibi"] = draw.choice(["h", "bh"])
    if draw.random() < 0.1:
        line["scale"] = draw.choice([-1.5, 0.0, 2.0]) / line["d"] ** 0.5
    line["layout"] = draw.choice(["contiguous", "contiguous", "transposed", "gaps", "odd"])
    return line


def _head_dim(draw: random.Random) -> int:
    return draw.choice([draw.randint(1, 256), 8 * draw.randint(1, 32), 64, 96, 128, 192, 256])


def _length(draw: random.Random) -> int:
    """Few rows; about as many as some blocks have; anything between."""
    whole = 64 * draw.randint(1, 4) + draw.randint(-1, 1)
    return draw.choice([draw.randint(0, 3), whole, draw.randint(4, 420)])


def _dense(draw: random.Random) -> dict[str, Any]:
    q = _length(draw)
    return {"batch": draw.randint(1, 3), "q": q, "k": draw.choice([q, _length(draw)])}


def _packed(draw: random.Random) -> dict[str, Any]:
    lengths = [[_length(draw) // 2, _length(draw) // 2] for _ in range(draw.randint(1, 5))]
    line: dict[str, Any] = {"packed": lengths}
    for side, name in enumerate(("seqused_q", "seqused_k")):
        if draw.random() < 0.3:
            line[name] = [draw.randint(0, pair[side]) for pair in lengths]
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    arguments = parser.parse_args()
    seeds = range(arguments.seed, arguments.seed + arguments.count)
    print(json.dumps([random_line(seed) for seed in seeds]))


if __name__ == "__main__":
    main()
