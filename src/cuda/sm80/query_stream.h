// The queries that see a block of keys, on their way through shared memory.
#pragma once

#include "cuda/attn/key_block.h"
#include "cuda/sm80/backward_layout.h"
#include "cuda/tile/tile_loader.h"

namespace anyflash::sm80 {

/// A query head of the group and a block of queries.
struct Position {
  int g, i;
};

/// Streams Q and dO of the queries that see a key block through their stages in shared memory: for
/// each query head of the group, the last block of queries first. (Key blocks that take turns at a
/// block of queries do so from the first key on: with a causal mask or a window, this order lets
/// all of them start at once.) With two stages a block is loaded while the one before is used.
template <class Row>
class QueryStream {
  using F = Backward<Row>;
  using QLoader = TileLoader<typename F::QTile, F::threads, F::general>;
  using OLoader = TileLoader<typename F::OTile, F::threads, F::general>;

public:
  DEVICE QueryStream(const BackwardParams& p, const KeyBlock<Row>& block, const KeyBlocks& blocks,
                     uint32_t shared)
      : p_(p), block_(block), blocks_(blocks), shared_(shared),
        heads_(blocks.empty() ? 0 : p.group.divisor), now_{0, blocks.end - 1},
        q_(loader<QLoader>(p.q, p.q_strides, p.d, block, blocks, p)),
        dout_(loader<OLoader>(p.dout, p.dout_strides, p.dv, block, blocks, p)) {}

  /// Before the loop; K and V belong to the same group of copies.
  DEVICE void start() {
    if (!done()) {
      load_queries(now_, 0);
      load_gradients(now_, 0);
    }
    cp_async_commit();
  }

  DEVICE bool done() const { return now_.g >= heads_; }
  DEVICE Position position() const { return now_; }
  DEVICE bool has_previous() const { return now_.g > 0 || now_.i < blocks_.end - 1; }
  DEVICE Position previous() const {
    return now_.i < blocks_.end - 1 ? Position{now_.g, now_.i + 1}
                                    : Position{now_.g - 1, blocks_.begin};
  }

  /// This block's Q and dO have landed, and every warp is done with the block before.
  DEVICE void wait() {
    cp_async_wait<0>();
    __syncthreads();
    if constexpr (Row::q_stages == 2 || Row::o_stages == 2) {
      load_next(Row::q_stages == 2, Row::o_stages == 2, stage_ ^ 1);
      cp_async_commit();
    }
  }

  /// This warp is done with dO, or with Q; the single stage is refilled once all warps are.
  DEVICE void release_gradients() {
    if constexpr (Row::o_stages == 1) {
      __syncthreads();
      load_next(false, true, 0);
      cp_async_commit();
    }
  }
  DEVICE void release_queries() {
    if constexpr (Row::q_stages == 1) {
      __syncthreads();
      load_next(true, false, 0);
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
  /// At the last block of the first head.
  template <class Loader>
  DEVICE static Loader loader(const void* tensor, const Strides& strides, int columns,
                              const KeyBlock<Row>& block, const KeyBlocks& blocks,
                              const BackwardParams& p) {
    return {static_cast<const uint16_t*>(tensor) +
                block.query_offset(strides, block.head_k * p.group.divisor) +
                int64_t{blocks.end - 1} * Row::Br * strides.row,
            strides.row, columns, p.aligned != 0};
  }

  DEVICE Position following() const {
    return now_.i > blocks_.begin ? Position{now_.g, now_.i - 1}
                                  : Position{now_.g + 1, blocks_.end - 1};
  }

  /// Moves the loaders from the current block to the one that follows, and loads that.
  DEVICE void load_next(bool queries, bool gradients, int stage) {
    const Position at = following();
    if (at.g >= heads_) return;
    move(queries, gradients, -Row::Br, 0);
    if (at.g != now_.g)
      move(queries, gradients, recomputed_64(blocks_.end - blocks_.begin) * Row::Br, 1);
    if (queries) load_queries(at, stage);
    if (gradients) load_gradients(at, stage);
  }
  DEVICE void move(bool queries, bool gradients, int64_t rows, int heads) {
    if (queries) q_.advance(rows * p_.q_strides.row + heads * p_.q_strides.head);
    if (gradients) dout_.advance(rows * p_.dout_strides.row + heads * p_.dout_strides.head);
  }
  DEVICE void load_queries(Position at, int stage) {
    q_.load(shared_ + F::q_begin + stage * F::QTile::bytes, 0, block_.seqlen_q - at.i * Row::Br);
  }
  DEVICE void load_gradients(Position at, int stage) {
    dout_.load(shared_ + F::o_begin + stage * F::OTile::bytes, 0, block_.seqlen_q - at.i * Row::Br);
  }

  const BackwardParams& p_;
  const KeyBlock<Row>& block_;
  const KeyBlocks& blocks_;
  uint32_t shared_;
  int heads_;
  Position now_;
  QLoader q_; // at the block that was loaded last
  OLoader dout_;
  int stage_ = 0;
};

} // namespace anyflash::sm80
