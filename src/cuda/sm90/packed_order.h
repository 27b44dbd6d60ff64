// Which tiles of packed sequences a thread block of a persistent grid works on, and in what order.
// Lengths are known on the GPU alone, so the warp that loads finds its tiles by itself: those that
// exist, large ones first, dealt to and fro over the thread blocks.
#pragma once

#include "cuda/attn/key_blocks.h"
#include "cuda/attn/sequence_lengths.h"
#include "cuda/sm90/params.h"
#include "cuda/sm90/tile_order.h"

namespace anyflash::sm90 {

/// Tiles in classes of their size, the number of key blocks that they see: each class down to
/// 1 / sqrt(2) of the class before. In a class: sequences in their order, 32 at a time, one a lane;
/// of a sequence the last block of queries first, and of that all heads.
template <class Row>
class PackedOrder {
public:
  DEVICE explicit PackedOrder(const ForwardParams& p)
      : above_(max(1, detail::ceil_div(p.seqlen_k, Row::Bc)) + 1) {} // tiles without keys, too

  /// By a warp: the next tile of this thread block. O(classes batch / 32) over all calls.
  DEVICE Tile next(const ForwardParams& p) {
    const int grid = gridDim.x, place = blockIdx.x;
    const int wanted = turn_ * grid + (turn_ % 2 == 0 ? place : grid - 1 - place);
    ++turn_;
    ROLLED
    while (above_ > 0) {
      const int from = p.order.by_size ? above_ * 181 >> 8 : 0;
      int end = 0, blocks = 0;
      if (first_ + lane_index() < p.batch) {
        const SequenceLengths lengths(p, first_ + lane_index());
        end = first_block(p, lengths, above_);
        blocks = end - first_block(p, lengths, from);
      }
      const int until = sum_up_to_lane(blocks);
      const int wanted_block = divide(wanted - tiles_before_, p.heads);
      if (const uint32_t lanes = __ballot_sync(0xffffffff, until > wanted_block)) {
        const int lane = __ffs(lanes) - 1;
        const int block = end - 1 - (wanted_block - (until - blocks));
        const int head = wanted - tiles_before_ - wanted_block * int(p.heads.divisor);
        return {(first_ + lane) * int(p.heads.divisor) + head, __shfl_sync(0xffffffff, block, lane),
                Tile::work};
      }
      tiles_before_ += __shfl_sync(0xffffffff, until, warp_size - 1) * int(p.heads.divisor);
      first_ += warp_size;
      if (first_ >= p.batch) first_ = 0, above_ = from;
    }
    return {0, 0, Tile::end};
  }

private:
  /// The first block of queries that sees so many key blocks or more; so do all after it. An
  /// estimate: a window counts with its whole width.
  DEVICE static int first_block(const ForwardParams& p, const SequenceLengths& l, int key_blocks) {
    constexpr int unbounded = 1 << 29;
    const int blocks = detail::ceil_div(l.rows_q, Row::Br);
    int most = detail::ceil_div(l.seqlen_k, Row::Bc);
    if (max(p.window_left, p.window_right) < unbounded)
      most = min(most, detail::ceil_div(Row::Br + p.window_left + p.window_right, Row::Bc) + 1);
    if (key_blocks <= 1) return 0;
    if (key_blocks > most) return blocks;
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

  int above_;            // sizes of the class at hand are below this
  int first_ = 0;        // of 32 sequences
  int tiles_before_ = 0; // in this order
  int turn_ = 0;
};

} // namespace anyflash::sm90
