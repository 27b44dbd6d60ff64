// The products of the sm90 backward above head dim 128, where P and dS go through shared memory.
#pragma once

#include "cuda/sm90/backward/consumer_base.h"

namespace anyflash::sm90 {

/// Each start_* puts a product into a group of its own; groups retire in order. P and dS are
/// stored [keys, queries].
template <class Row>
class ProductsByColumns : protected ConsumerBase<Row> {
protected:
  using Base = ConsumerBase<Row>;
  using Base::barriers_, Base::index_, Base::memory_, Base::p_, Base::shared_;
  using Base::lse, Base::o_tile, Base::q_tile, Base::release, Base::step;
  using typename Base::Cap, typename Base::F, typename Base::K, typename Base::O, typename Base::Q;
  using typename Base::S, typename Base::Scores, typename Base::T, typename Base::V;
  using Tile = typename F::STile;
  using Operand = WarpgroupOperand<T, Scores::width>;

  DEVICE ProductsByColumns(const BackwardParams& p, char* shared_memory, int index)
      : Base(p, shared_memory, index) {}

  /// S^T = K Q^T of this consumer's queries.
  DEVICE void start_scores(Scores& s, typename Base::QRing q) {
    mbarrier_wait(barriers_.q_full(q.stage()), q.phase());
    const uint64_t a = K::k_major(this->k_tile(kv_));
    const uint64_t b = Q::k_major(q_tile(q), F::apart ? 0 : index_ * Scores::width);
    wgmma_fence();
    UNROLL
    for (int k = 0; k < Row::d / 16; ++k)
      wgmma<T, Major::k, Major::k>(s.x, a + K::at_columns(k), b + Q::at_columns(k), k != 0);
    wgmma_commit();
  }

  /// dP^T = V dO^T of this consumer's queries.
  DEVICE void start_probability_gradients(Scores& dp, typename Base::ORing o) {
    mbarrier_wait(barriers_.o_full(o.stage()), o.phase());
    constexpr int in_registers = F::direct_v / 16, in_shared = Row::dv / 16 - in_registers;
    const uint64_t a = V::k_major(this->v_tile(kv_));
    const uint64_t b = O::k_major(o_tile(o), F::apart ? 0 : index_ * Scores::width);
    wgmma_fence();
    UNROLL
    for (int k = 0; k < in_shared; ++k)
      wgmma<T, Major::k, Major::k>(dp.x, a + V::at_columns(k), b + O::at_columns(k), k != 0);
    UNROLL
    for (int k = 0; k < in_registers; ++k)
      wgmma<T, Major::k>(dp.x, v_.a + 4 * k, b + O::at_columns(in_shared + k), in_shared + k != 0);
    wgmma_commit();
  }

  /// dV += P^T dO, columns from first_column on.
  template <int width>
  DEVICE void start_value_gradient(WarpgroupAccumulator<width>& dv, int first_column,
                                   typename Base::ORing o, int stage) {
    const uint64_t a = S::k_major(p_tile(stage));
    const uint64_t b = O::mn_major(o_tile(o), first_column);
    keep(dv.x);
    wgmma_fence();
    UNROLL
    for (int k = 0; k < Row::Br / 16; ++k)
      wgmma<T, Major::k, Major::mn>(dv.x, a + S::at_columns(k), b + O::at_rows(k), true);
    wgmma_commit();
  }

  /// dQ = dS K, columns from first_column on.
  template <int width>
  DEVICE void start_query_gradient(WarpgroupAccumulator<width>& dq, int first_column) {
    const uint64_t a = S::mn_major(ds_tile(shared_stage_));
    const uint64_t b = K::mn_major(this->k_tile(kv_), first_column);
    wgmma_fence();
    UNROLL
    for (int k = 0; k < Row::Bc / 16; ++k)
      wgmma<T, Major::mn, Major::mn>(dq.x, a + S::at_rows(k), b + K::at_rows(k), k != 0);
    wgmma_commit();
  }

  /// dK += dS^T Q, columns from first_column on.
  template <int width>
  DEVICE void start_key_gradient(WarpgroupAccumulator<width>& dk, int first_column) {
    const uint64_t a = S::k_major(ds_tile(shared_stage_));
    const uint64_t b = Q::mn_major(q_tile(q_), first_column);
    keep(dk.x);
    wgmma_fence();
    UNROLL
    for (int k = 0; k < Row::Br / 16; ++k)
      wgmma<T, Major::k, Major::mn>(dk.x, a + S::at_columns(k), b + Q::at_rows(k), true);
    wgmma_commit();
  }

  /// P or dS of this warpgroup's queries. A stage is free when its block of queries has been
  /// released: Q has as many stages, and this block's was loaded after that.
  DEVICE void store(const Operand& x, uint32_t tile) const {
    static_assert(Row::q_stages == 2);
    UNROLL
    for (int k = 0; k < Scores::width / 16; ++k)
      stmatrix_x4(tile + chunk_offset(k), x.a[4 * k], x.a[4 * k + 1], x.a[4 * k + 2],
                  x.a[4 * k + 3]);
  }
  /// What store() put there.
  DEVICE void load(Operand& x, uint32_t tile) const {
    UNROLL
    for (int k = 0; k < Scores::width / 16; ++k)
      ldmatrix_x4(reinterpret_cast<uint32_t(&)[4]>(x.a[4 * k]), tile + chunk_offset(k));
  }
  /// What this warp has stored may be read by products, of whoever waits for `full`.
  DEVICE void announce(uint32_t full) const {
    fence_async_shared();
    warp_arrive(full);
  }

  DEVICE uint32_t ds_tile(Ring<2> stage) const {
    return shared_ + F::at.ds + stage.stage() * Tile::bytes;
  }
  DEVICE uint32_t p_tile(int stage) const { return shared_ + F::at.p + stage * Tile::bytes; }

  /// Of this lane's part of the operand's 16 columns from 16 k on.
  DEVICE int chunk_offset(int k) const {
    const int thread = recomputed(threadIdx.x);
    const int row = thread / 32 % 4 * 16 + thread % 16;
    const int first_chunk = F::apart ? 0 : index_ * (Scores::width / 8);
    return Tile::offset(row, first_chunk + 2 * k + thread / 16 % 2);
  }

  WarpgroupOperand<T, F::direct_v ? F::direct_v : 16> v_; // the last columns of V
  typename Base::QRing q_;
  typename Base::ORing o_;
  Ring<2> shared_stage_; // of P and dS; also counts turns
  Ring<Row::kv_stages> kv_;
};

} // namespace anyflash::sm90
