// Which tiles of packed sequences a thread block of a persistent grid works on, and in what order.
// Lengths are known on the GPU alone, so a warp of each thread block finds its tiles by itself:
// those that exist, large ones first, dealt to and fro over the thread blocks.
//
//   Many tiles: sequence by sequence, the long ones first, so that what runs together reads the
//   same keys. Heads in pairs (A, B): the tiles (A, last - k) and (B, k) are a couple, which takes
//   the same time for every k, and couples are dealt. Few tiles: these are dealt, the large ones
//   first, of whatever sequence. They end more evenly, but come back to the same keys.
#pragma once

#include "cuda/attn/key_blocks.h"
#include "cuda/attn/sequence_lengths.h"
#include "cuda/sm90/params.h"
#include "cuda/sm90/tile_order.h"

namespace anyflash::sm90 {

/// Classes of size, in key blocks that are seen by a tile, or in couples by the last tile of a
/// sequence: each class down to 1 / sqrt(2) of the class before. In a class: sequences in their
/// order, 32 at a time, one a lane.
template <class Row>
class PackedOrder {
public:
  DEVICE explicit PackedOrder(const ForwardParams& p)
      : above_(max(1, detail::ceil_div(p.seqlen_k, Row::Bc)) + 1) {} // tiles without keys, too

  /// By a warp: the next tile of this thread block. O(classes batch / 32) over all calls.
  DEVICE Tile next(const ForwardParams& p) {
    const int grid = gridDim.x, place = blockIdx.x;
    const int round = p.order.in_couples ? turn_ / 2 : turn_;
    const bool second = p.order.in_couples && turn_ % 2;
    const int wanted = round * grid + (round % 2 == 0 ? place : grid - 1 - place);
    ++turn_;
    ROLLED
    while (above_ > 0) {
      const int from = p.order.by_size ? above_ * 181 >> 8 : 0;
      Share share = {0, 0};
      if (first_ + lane_index() < p.batch) {
        const SequenceLengths lengths(p, first_ + lane_index());
        share = p.order.in_couples ? couples(p, lengths, from) : tiles(p, lengths, from);
      }
      const int until = sum_up_to_lane(share.count);
      if (const uint32_t lanes = __ballot_sync(0xffffffff, until > wanted - before_)) {
        const int lane = __ffs(lanes) - 1;
        const int i = __shfl_sync(0xffffffff, wanted - before_ - (until - share.count), lane);
        const int end = __shfl_sync(0xffffffff, share.end, lane);
        Tile tile = p.order.in_couples ? of_couple(p, i, end, second) : alone(p, i, end);
        tile.head += (first_ + lane) * int(p.heads.divisor);
        return tile;
      }
      before_ += __shfl_sync(0xffffffff, until, warp_size - 1);
      first_ += warp_size;
      if (first_ >= p.batch) first_ = 0, above_ = from;
    }
    return {0, 0, Tile::end};
  }

private:
  /// What a sequence has in the class at hand: so many couples, or tiles; of blocks before `end`.
  struct Share {
    int count, end;
  };

  DEVICE Share tiles(const ForwardParams& p, const SequenceLengths& l, int from) const {
    const int end = first_block(p, l, above_);
    return {(end - first_block(p, l, from)) * int(p.heads.divisor), end};
  }
  /// The last block of queries first, and of that all heads.
  DEVICE static Tile alone(const ForwardParams& p, int i, int end) {
    const int block = divide(i, p.heads);
    return {i - block * int(p.heads.divisor), end - 1 - block, Tile::work};
  }

  DEVICE Share couples(const ForwardParams& p, const SequenceLengths& l, int from) const {
    const int blocks = detail::ceil_div(l.rows_q, Row::Br), heads = p.heads.divisor;
    const int size = key_blocks_seen(p, l);
    const bool here = size >= from && size < above_;
    return {here ? heads / 2 * blocks + heads % 2 * detail::ceil_div(blocks, 2) : 0, blocks};
  }
  /// The last of an odd number of heads is a pair with itself.
  DEVICE static Tile of_couple(const ForwardParams& p, int i, int blocks, bool second) {
    const int pair = i / blocks, k = i - pair * blocks;
    const bool itself = 2 * pair + 1 == p.heads.divisor;
    if (!second) return {2 * pair, blocks - 1 - k, Tile::work};
    if (itself && k == blocks - 1 - k) return {0, 0, Tile::nothing};
    return {2 * pair + (itself ? 0 : 1), k, Tile::work};
  }

  /// By the last query, at most. An estimate: a window counts with its whole width.
  DEVICE static int key_blocks_seen(const ForwardParams& p, const SequenceLengths& l) {
    constexpr int unbounded = 1 << 29;
    const int all = detail::ceil_div(l.seqlen_k, Row::Bc);
    if (max(p.window_left, p.window_right) >= unbounded) return all;
    return min(all, detail::ceil_div(Row::Br + p.window_left + p.window_right, Row::Bc) + 1);
  }
  /// The first block of queries that sees so many key blocks or more; so do all after it.
  DEVICE static int first_block(const ForwardParams& p, const SequenceLengths& l, int key_blocks) {
    const int blocks = detail::ceil_div(l.rows_q, Row::Br);
    if (key_blocks <= 1) return 0;
    if (key_blocks > key_blocks_seen(p, l)) return blocks;
    const int keys = (key_blocks - 1) * Row::Bc + 1; // that its last query must see
    const int queries = keys - l.diagonal() - p.window_right;
    return min(blocks, max(0, detail::ceil_div(queries, Row::Br) - 1));
  }

  DEVICE static int sum_up_to_lane(int x) {
    UNROLL
    for (int distance = 1; distance < warp_size; distance *= 2) {
      const int before = __shfl_up_sync(0xffffffff, x, distance);
      if (lane_index() >= distance) x += before;
    }
    return x;
  }

  int above_;      // sizes of the class at hand are below this
  int first_ = 0;  // of 32 sequences
  int before_ = 0; // couples or tiles, in this order
  int turn_ = 0;
};

} // namespace anyflash::sm90
