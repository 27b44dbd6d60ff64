// Which tiles (blocks of queries of a head) a thread block of a persistent grid works on, and in
// what order: a function of its index alone, so that nothing is shared and nothing must be zeroed.
// Shared by the kernels and the planner: constexpr arithmetic, tested on the host.
//
// Without a mask all tiles take equally long: one head after the other, so that tiles that run
// together read the same keys. Under a causal mask the tile of block m takes about m + 1 units:
//
//   1. Heads in pairs (A, B): the tiles (A, blocks - 1 - k) and (B, k) together take the same time
//      for every k. Thread blocks take such couples in turn, and few heads are in the cache.
//   2. The last heads, a few tiles for each thread block: sorted by size and dealt to and fro, so
//      that the small tiles even out. Thread blocks that got one couple less than others in 1 take
//      two tiles of middle size first.
#pragma once

#include "cuda/params.h"

namespace anyflash::sm90 {

struct Tile {
  int head;  // over all sequences: sequence * heads + head
  int block; // of Br queries
  enum State { work, nothing, end } state;
};

struct TileOrder {
  Divisor blocks;      // of a head
  Divisor last_heads;  // heads of part 2
  int32_t grid;        // thread blocks
  int32_t first_heads; // heads of part 1, an even number
  int32_t couples;     // of part 1
  int32_t rounds;      // in which every thread block gets a couple
  int32_t rest;        // thread blocks that get one more; the others take two tiles of middle size
  int32_t tiles;       // of part 2
  int32_t by_size;     // 0: part 2 is in the order of heads; packed sequences in their order
  int32_t in_couples;  // packed sequences (packed_order.h)

  /// The tile that thread block `index` works on at its `turn`.
  constexpr Tile tile(int index, int turn) const {
    const int round = turn / 2;
    if (round < rounds || (round == rounds && index < rest)) return couple(index, turn);
    const int middle = rest == 0 ? 0 : grid - rest; // thread blocks that take middle tiles
    if (round == rounds && middle > 0) {
      const int half = tiles / 2, i = index - rest;
      if (tiles < 2 * middle) return {0, 0, Tile::nothing};
      return by_rank(turn % 2 == 0 ? half - 1 - i : half + i);
    }
    return dealt(index, turn - 2 * (rounds + (rest > 0)), middle);
  }

private:
  constexpr Tile couple(int index, int turn) const {
    const int number = turn / 2 * grid + index;
    const int pair = divide(number, blocks);
    const int k = number - pair * static_cast<int>(blocks.divisor);
    if (turn % 2 == 0) return {2 * pair, static_cast<int>(blocks.divisor) - 1 - k, Tile::work};
    return {2 * pair + 1, k, Tile::work};
  }

  constexpr Tile dealt(int index, int row, int middle) const {
    const int taken = tiles < 2 * middle ? 0 : middle; // on either side of the middle
    const bool back = by_size && row % 2 == 1;
    const int i = row * grid + (back ? grid - 1 - index : index);
    if (row * grid >= tiles - 2 * taken) return {0, 0, Tile::end};
    if (i >= tiles - 2 * taken) return {0, 0, Tile::nothing};
    return by_rank(i < tiles / 2 - taken ? i : i + 2 * taken);
  }

  constexpr Tile by_rank(int i) const {
    if (!by_size) {
      const int head = divide(i, blocks);
      return {first_heads + head, i - head * static_cast<int>(blocks.divisor), Tile::work};
    }
    const int level = divide(i, last_heads);
    return {first_heads + i - level * static_cast<int>(last_heads.divisor),
            static_cast<int>(blocks.divisor) - 1 - level, Tile::work};
  }
};

static_assert(sizeof(TileOrder) == 2 * sizeof(Divisor) + 8 * 4);

} // namespace anyflash::sm90
