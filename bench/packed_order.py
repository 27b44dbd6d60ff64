"""Simulates in which order a persistent grid should take the tiles of packed sequences.

usage: python bench/packed_order.py

64 sequences of log-normal lengths (mean 1024), 2048 columns over all heads, 132 thread blocks. A
tile takes as many units as it sees key blocks, and a little more. Prints the time of the thread
block that is over last, over the average: 1 is a perfectly even end.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable, Sequence

THREAD_BLOCKS = 132
BESIDES = 1.2  # units that a tile takes for its own, in key blocks
SAMPLES = 6
TILES = {64: (192, 128), 128: (128, 128), 256: (128, 64)}  # Br, Bc by head dim

Tile = tuple[float, bool]  # key blocks, and whether the tile exists
Order = Callable[[Sequence[Sequence[Tile]], int], list[Tile]]


def lengths(source: random.Random) -> list[int]:
    sigma = 0.7
    mu = math.log(1024) - sigma**2 / 2
    return [max(1, int(source.lognormvariate(mu, sigma))) for _ in range(64)]


def tiles_of(length: int, longest: int, d: int, causal: bool) -> list[Tile]:
    """Blocks of queries as the longest sequence has them, the last first."""
    br, bc = TILES[d]
    tiles = []
    for block in reversed(range(-(-longest // br))):
        seen = min(length, (block + 1) * br) if causal else length
        tiles.append((-(-seen // bc), block * br < length))
    return tiles


def as_if_equally_long(sequences: Sequence[Sequence[Tile]], heads: int) -> list[Tile]:
    return [tile for sequence in sequences for _ in range(heads) for tile in sequence]


def existing(sequences: Sequence[Sequence[Tile]], heads: int) -> list[Tile]:
    return [tile for sequence in sequences for tile in sequence if tile[1] for _ in range(heads)]


def in_classes(sequences: Sequence[Sequence[Tile]], heads: int) -> list[Tile]:
    """Large ones first, by half octaves."""
    return sorted(existing(sequences, heads), key=lambda tile: -int(2 * math.log2(tile[0])))


def in_couples(sequences: Sequence[Sequence[Tile]], heads: int) -> list[Tile]:
    """Long sequences first, by half octaves; the tiles of two heads that together take as long as
    any other couple of that sequence count as one."""
    couples = []
    for sequence in sorted(sequences, key=lambda tiles: -int(2 * math.log2(tiles_there(tiles)[0]))):
        sizes = tiles_there(sequence)
        both = [a + b + BESIDES for a, b in zip(sizes, reversed(sizes), strict=True)]
        couples += [(size, True) for _ in range(heads // 2) for size in both]
    return couples


def tiles_there(sequence: Sequence[Tile]) -> list[float]:
    return [size for size, exists in sequence if exists]


def time_of(tile: Tile) -> float:
    return tile[0] + BESIDES if tile[1] else 0


def dealt(tiles: list[Tile]) -> float:
    """To and fro."""
    ends = [0.0] * THREAD_BLOCKS
    for i, tile in enumerate(tiles):
        row, place = divmod(i, THREAD_BLOCKS)
        ends[place if row % 2 == 0 else THREAD_BLOCKS - 1 - place] += time_of(tile)
    return max(ends)


def drawn(tiles: list[Tile]) -> float:
    """From a counter."""
    ends = [0.0] * THREAD_BLOCKS
    for tile in tiles:
        if tile[1]:
            heapq.heappush(ends, heapq.heappop(ends) + time_of(tile))
    return max(ends)


WAYS: dict[str, tuple[Order, Callable[[list[Tile]], float]]] = {
    "as if all were as long as the longest, dealt": (as_if_equally_long, dealt),
    "those that exist, dealt": (existing, dealt),
    "the same in classes of size, dealt": (in_classes, dealt),
    "the same, drawn from a counter": (in_classes, drawn),
    "sequence by sequence in couples of heads, dealt": (in_couples, dealt),
}


def main() -> None:
    print("| order | " + " | ".join(f"d {d} full, causal" for d in TILES) + " |")
    print("| --- |" + " --- |" * len(TILES))
    for name, (order, way) in WAYS.items():
        cells = []
        for d in TILES:
            pair = []
            for causal in (False, True):
                source, ratios = random.Random(1), []
                for _ in range(SAMPLES):
                    of_batch = lengths(source)
                    sequences = [tiles_of(n, max(of_batch), d, causal) for n in of_batch]
                    tiles = order(sequences, 2048 // d)
                    ratios.append(way(tiles) * THREAD_BLOCKS / sum(map(time_of, tiles)))
                pair.append(f"{sum(ratios) / SAMPLES:.2f}")
            cells.append(", ".join(pair))
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
