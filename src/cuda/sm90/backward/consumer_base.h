// What the two ways of sharing a block's work between consumer warpgroups have in common.
#pragma once

#include "cuda/ptx/cluster.h"
#include "cuda/ptx/stmatrix.h"
#include "cuda/ptx/warpgroup.h"
#include "cuda/sm90/backward/ends.h"
#include "cuda/sm90/backward/stream.h"
#include "cuda/sm90/backward/transposed_scores.h"
#include "cuda/sm90/backward/turns.h"

namespace anyflash::sm90 {

/// A consumer warpgroup's place in the block, and where things are. Its scores are those of the
/// keys from first_key() on and of `queries` queries from first_query on.
template <class Row>
class ConsumerBase {
protected:
  using F = Backward<Row>;
  using T = typename Row::T;
  using Q = MatrixDescriptor<typename F::QTile>;
  using O = MatrixDescriptor<typename F::OTile>;
  using K = MatrixDescriptor<typename F::KTile>;
  using V = MatrixDescriptor<typename F::VTile>;
  using S = MatrixDescriptor<typename F::STile>;
  using Scores = typename F::Scores;
  using Cap = SoftcapSlope<Scores, F::general>;
  using QRing = Ring<Row::q_stages>;
  using ORing = Ring<Row::o_stages>;

  DEVICE ConsumerBase(const BackwardParams& p, char* shared_memory, int index)
      : p_(p), memory_(shared_memory), shared_(shared_address(shared_memory)), index_(index),
        barriers_{shared_ + F::at.barriers} {}

  /// What scores go through before the exponential.
  DEVICE void prepare(Scores& s, Cap& cap, const volatile Work& work, QRing q) const {
    const Step& step = this->step(q);
    const int first_query = step.first_query + (F::by_keys ? 0 : index_ * Scores::width);
    if constexpr (F::general) {
      apply_softcap(s, p_);
      cap.keep(s, p_);
      apply_alibi_transposed(s, alibi_slope(p_, work.sequence, step.head),
                             first_query + Scores::first_column() + work.diagonal -
                                 first_key(work));
    }
    if (step.on_edge)
      mask_transposed(s, p_, first_key(work), work.seqlen_k, work.diagonal, first_query);
  }

  /// The key of this thread's first row.
  DEVICE int first_key(const volatile Work& work) const {
    return work.first_key + first_row() + Scores::first_row();
  }
  /// The first row of this warp among the block's keys.
  DEVICE int first_row() const { return (F::by_keys ? index_ * 64 : 0) + warp_index() % 4 * 16; }

  /// Waits for this warpgroup's turn to add, where there are turns.
  DEVICE void wait_for_turn(Ring<2> at) const {
    if (p_.turns) mbarrier_wait(barriers_.turn(at.stage()), at.phase());
  }
  DEVICE void pass_turn_on(Ring<2> at) const {
    if (p_.turns) warp_arrive(barriers_.added(at.stage()));
  }
  /// dQ to the sums of its part of the queries, in whose turn `at` is. They lie in the order of
  /// registers, so that a warp adds to neighbouring addresses. In turns the first stores, and the
  /// last finishes dQ. first_tile: of the part's tiles of 8 columns.
  template <int width>
  DEVICE void add_to_queries(WarpgroupAccumulator<width>& dq, Ring<2> at, int64_t first_row,
                             int part, int first_tile = 0) const {
    float* const sum =
        query_sums<Row>(p_, first_row, part, recomputed(threadIdx.x) % warpgroup_size) +
        first_tile * 4 * warpgroup_size;
    bool first = false;
    if (p_.turns) {
      const auto& turn = *reinterpret_cast<const volatile Turn*>(memory_ + F::at.turns +
                                                                 at.stage() * backward_turn_bytes);
      first = turn.first;
      if constexpr (F::finishes)
        if (turn.last) return finish_queries(dq, first ? nullptr : sum, turn, part, first_tile);
    }
    UNROLL
    for (int tile = 0; tile < width / 8; ++tile) {
      if (first_tile + tile >= F::q_tiles(part)) continue;
      float* const four = sum + tile * 4 * warpgroup_size;
      const float(&x)[4] = reinterpret_cast<const float(&)[4]>(dq.x[4 * tile]);
      if (first)
        *reinterpret_cast<float4*>(four) = {x[0], x[1], x[2], x[3]};
      else
        red_add_4(four, x);
    }
  }

  /// dQ with the sums of those before, if there were any.
  template <int width>
  DEVICE void finish_queries(WarpgroupAccumulator<width>& dq, const float* sum,
                             const volatile Turn& turn, int part, int first_tile) const {
    const int row = F::part_row(part) + warp_index() % 4 * 16;
    const int column = F::part_column(part) + first_tile * 8, tiles = F::q_tiles(part) - first_tile;
    const RowsOut to = {static_cast<uint16_t*>(p_.dq) + turn.dq_offset + row * p_.dq_strides.row +
                            column,
                        p_.dq_strides.row, turn.rows - row, min(p_.d - column, tiles * 8)};
    UNROLL
    for (int c = 0; c < dq.columns; c += 8) {
      UNROLL
      for (int tile = c / 2; tile < c / 2 + 4; ++tile) {
        if (!sum || tile >= tiles) continue;
        const float4 four = *reinterpret_cast<const float4*>(sum + tile * 4 * warpgroup_size);
        dq.x[4 * tile] += four.x;
        dq.x[4 * tile + 1] += four.y;
        dq.x[4 * tile + 2] += four.z;
        dq.x[4 * tile + 3] += four.w;
      }
      store_32_columns<Row>(dq, c, p_.scale, to);
    }
  }

  /// dK or dV of this block's keys, in columns from first_column on; offset: to the first key.
  template <int width>
  DEVICE void store(const WarpgroupAccumulator<width>& x, float scale, void* matrix, int64_t offset,
                    int64_t row_stride, int rows, int columns, int first_column) const {
    const RowsOut to = {static_cast<uint16_t*>(matrix) + offset + first_column +
                            first_row() * row_stride,
                        row_stride, rows - first_row(), columns - first_column};
    UNROLL
    for (int c = 0; c < x.columns; c += 8) store_32_columns<Row>(x, c, scale, to);
  }
  template <int width>
  DEVICE void store_key_gradient(const WarpgroupAccumulator<width>& dk, const volatile Work& work,
                                 int first_column = 0) const {
    store(dk, p_.scale, p_.dk, work.dk_offset, p_.dk_strides.row, work.rows, p_.d, first_column);
  }
  template <int width>
  DEVICE void store_value_gradient(const WarpgroupAccumulator<width>& dv, const volatile Work& work,
                                   int first_column = 0) const {
    store(dv, 1, p_.dv_out, work.dv_offset, p_.dv_strides.row, work.rows, p_.dv, first_column);
  }

  /// By the warpgroup that has retired the products that read what may now be filled anew: nothing
  /// else did, and all warps have started what one of them sees done.
  DEVICE void release(uint32_t barrier) const {
    if (threadIdx.x % warpgroup_size == 0) mbarrier_arrive(barrier);
  }
  /// The same in the other block of the pair.
  DEVICE void release_there(uint32_t barrier) const {
    if (threadIdx.x % warpgroup_size == 0) cluster_arrive(shared_of(F::rank() ^ 1, barrier));
  }
  /// The stage of Q, with its Step and its statistics, which each warp has read for itself.
  DEVICE void release_queries(int stage) const { warp_arrive(barriers_.q_empty(stage)); }

  /// The last columns of V, from global memory, as an operand: 64 keys. What does not exist is 0.
  template <int size>
  DEVICE void load_values_directly(uint32_t (&v)[size], const volatile Work& work) const {
    constexpr int first_column = Row::dv - 4 * size;
    const Strides& strides = p_.v_strides;
    const int key = first_key(work), column = first_column + Scores::first_column();
    const auto* const from = static_cast<const uint16_t*>(p_.v) + work.sequence * strides.batch +
                             (int64_t{work.first_k} + key) * strides.row +
                             work.head_k * strides.head + column;
    UNROLL
    for (int r = 0; r < Scores::rows; ++r) {
      const int row = Scores::row_offset(r);
      const int columns = key + row < work.seqlen_k ? p_.dv - column : 0;
      UNROLL
      for (int i = 0; i < size / 2; ++i) {
        const auto* const pair =
            reinterpret_cast<const uint32_t*>(from + row * strides.row + 8 * i);
        v[2 * i + r] = 8 * i < columns ? *pair : 0;
      }
    }
  }

  DEVICE uint32_t q_tile(QRing q) const { return shared_ + F::at.q + q.stage() * F::QTile::bytes; }
  DEVICE uint32_t o_tile(ORing o) const { return shared_ + F::at.o + o.stage() * F::OTile::bytes; }
  DEVICE uint32_t k_tile(Ring<Row::kv_stages> kv) const {
    return shared_ + F::at.k + kv.stage() * F::KTile::bytes;
  }
  DEVICE uint32_t v_tile(Ring<Row::kv_stages> kv) const {
    return shared_ + F::at.v + kv.stage() * F::VTile::bytes;
  }
  DEVICE const Step& step(QRing q) const {
    return *reinterpret_cast<const Step*>(memory_ + F::at.steps + q.stage() * backward_step_bytes);
  }
  /// L of this thread's first query; delta is Br further on.
  DEVICE const float* lse(QRing q) const {
    return reinterpret_cast<const float*>(memory_ + F::at.stats + q.stage() * F::stats_bytes) +
           (F::by_keys ? 0 : index_ * Scores::width) + Scores::first_column();
  }

  const BackwardParams& p_;
  char* memory_;
  uint32_t shared_;
  int index_;
  BackwardBarriers<Row> barriers_;
};

} // namespace anyflash::sm90
