// The queries that see a block of keys, on their way through shared memory.
#pragma once

#include "cuda/attn/key_block.h"
#include "cuda/sm80/backward_layout.h"
#include "cuda/tile/tile_loader.h"

namespace anyflash::sm80 {

/// Which query head of the group and which block of queries comes next: heads outermost.
struct Position {
  int g, i;
};

/// Streams Q and dO of the queries that see a key block through their stages in shared memory, for
/// each query head of the group. With two stages a block is loaded while the one before is used.
template <class Row>
class QueryStream {
  using F = Backward<Row>;

public:
  DEVICE QueryStream(const BackwardParams& p, const KeyBlock<Row>& block, const KeyBlocks& blocks,
                     uint32_t shared)
      : q_(static_cast<const uint16_t*>(p.q) +
           block.query_offset(p.q_strides, block.head_k * p.group.divisor)),
        dout_(static_cast<const uint16_t*>(p.dout) +
              block.query_offset(p.dout_strides, block.head_k * p.group.divisor)),
        p_(p), shared_(shared), seqlen_q_(block.seqlen_q), begin_(blocks.begin), end_(blocks.end),
        heads_(blocks.empty() ? 0 : p.group.divisor), now_{0, blocks.begin} {}

  /// Before the loop; K and V belong to the same group of copies.
  DEVICE void start() {
    load_queries(now_, 0);
    load_gradients(now_, 0);
    cp_async_commit();
  }

  DEVICE bool done() const { return now_.g >= heads_; }
  DEVICE Position position() const { return now_; }

  /// This block's Q and dO have landed, and every warp is done with the block before.
  DEVICE void wait() {
    cp_async_wait<0>();
    __syncthreads();
    if constexpr (Row::q_stages == 2) load_queries(following(), stage_ ^ 1);
    if constexpr (Row::o_stages == 2) load_gradients(following(), stage_ ^ 1);
    if constexpr (Row::q_stages == 2 || Row::o_stages == 2) cp_async_commit();
  }

  /// This warp is done with dO, or with Q; the single stage is refilled once all warps are.
  DEVICE void release_gradients() {
    if constexpr (Row::o_stages == 1) {
      __syncthreads();
      load_gradients(following(), 0);
      cp_async_commit();
    }
  }
  DEVICE void release_queries() {
    if constexpr (Row::q_stages == 1) {
      __syncthreads();
      load_queries(following(), 0);
      cp_async_commit();
    }
  }

  DEVICE void next() {
    now_ = following();
    stage_ ^= 1;
  }

  /// Offsets of the current stages in shared memory.
  DEVICE uint32_t q_tile() const {
    return F::q_begin + (Row::q_stages == 2 ? stage_ * F::QTile::bytes : 0);
  }
  DEVICE uint32_t o_tile() const {
    return F::o_begin + (Row::o_stages == 2 ? stage_ * F::OTile::bytes : 0);
  }

private:
  DEVICE Position following() const {
    return now_.i + 1 < end_ ? Position{now_.g, now_.i + 1} : Position{now_.g + 1, begin_};
  }
  DEVICE void load_queries(Position at, int stage) {
    load<typename F::QTile>(q_, p_.q_strides, p_.d, at,
                            shared_ + F::q_begin + stage * F::QTile::bytes);
  }
  DEVICE void load_gradients(Position at, int stage) {
    load<typename F::OTile>(dout_, p_.dout_strides, p_.dv, at,
                            shared_ + F::o_begin + stage * F::OTile::bytes);
  }
  /// This thread's addresses are computed anew for each block: kept through the loop they would
  /// cost it registers that it does not have.
  template <class Tile>
  DEVICE void load(const uint16_t* matrix, const Strides& strides, int columns, Position at,
                   uint32_t tile) {
    if (at.g >= heads_) return;
    const TileLoader<Tile, F::threads, F::general> loader(
        matrix + at.g * strides.head, recomputed_64(strides.row), columns, p_.aligned);
    loader.load(tile, int64_t{at.i} * Row::Br, seqlen_q_ - at.i * Row::Br);
  }

  const uint16_t* q_; // of the first head of the group
  const uint16_t* dout_;
  const BackwardParams& p_;
  uint32_t shared_;
  int seqlen_q_;
  int begin_, end_, heads_;
  Position now_;
  int stage_ = 0;
};

} // namespace anyflash::sm80
