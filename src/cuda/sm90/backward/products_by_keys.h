// The products of a consumer of the sm90 backward that owns 64 keys: head dims up to 128.
#pragma once

#include "cuda/sm90/backward/consumer_base.h"

namespace anyflash::sm90 {

/// dK and dV of 64 keys of a block, and what they are made of. P^T and dS^T are operands straight
/// from registers; for dQ, which sums over all keys of the block, dS goes through shared memory.
/// Products run on while the next lines compute: each start_* puts one into a group of its own, and
/// groups retire in order.
template <class Row>
class ProductsByKeys : protected ConsumerBase<Row> {
protected:
  using Base = ConsumerBase<Row>;
  using Base::barriers_, Base::index_, Base::memory_, Base::p_, Base::shared_;
  using Base::lse, Base::o_tile, Base::q_tile, Base::release, Base::step;
  using typename Base::Cap, typename Base::F, typename Base::K, typename Base::O, typename Base::Q;
  using typename Base::S, typename Base::Scores, typename Base::T, typename Base::V;
  using Operand = WarpgroupOperand<T, Row::Br>; // P^T or dS^T

  DEVICE ProductsByKeys(const BackwardParams& p, char* shared_memory, int index)
      : Base(p, shared_memory, index) {}

  /// S^T = K Q^T.
  DEVICE void start_scores(Scores& s, typename Base::QRing q) {
    mbarrier_wait(barriers_.q_full(q.stage()), q.phase());
    const uint64_t a = K::k_major(this->k_tile(kv_), index_ * 64);
    const uint64_t b = Q::k_major(q_tile(q));
    wgmma_fence();
    UNROLL
    for (int k = 0; k < Row::d / 16; ++k)
      wgmma<T, Major::k, Major::k>(s.x, a + K::at_columns(k), b + Q::at_columns(k), k != 0);
    wgmma_commit();
  }

  /// This consumer's rows of V, where they are kept in registers.
  DEVICE void load_values() {
    if constexpr (F::v_in_registers) {
      const auto v = FragmentReader<typename F::VTile>::rows_first(
          this->v_tile(kv_), index_ * 64 + recomputed(threadIdx.x) / 32 % 4 * 16);
      UNROLL
      for (int k = 0; k < Row::dv / 16; ++k)
        v.read(reinterpret_cast<uint32_t(&)[4]>(v_[4 * k]), 0, k);
    }
  }

  /// dP^T = V dO^T.
  DEVICE void start_probability_gradients(Scores& dp) {
    mbarrier_wait(barriers_.o_full(o_.stage()), o_.phase());
    const uint64_t a = V::k_major(this->v_tile(kv_), index_ * 64);
    const uint64_t b = O::k_major(o_tile(o_));
    wgmma_fence();
    UNROLL
    for (int k = 0; k < Row::dv / 16; ++k) {
      if constexpr (F::v_in_registers)
        wgmma<T, Major::k>(dp.x, v_ + 4 * k, b + O::at_columns(k), k != 0);
      else
        wgmma<T, Major::k, Major::k>(dp.x, a + V::at_columns(k), b + O::at_columns(k), k != 0);
    }
    wgmma_commit();
  }

  /// dV += P^T dO.
  DEVICE void start_value_gradient(Operand& p) {
    const uint64_t b = O::mn_major(o_tile(o_));
    keep(dv_.x);
    keep(p.a);
    wgmma_fence();
    UNROLL
    for (int k = 0; k < Row::Br / 16; ++k)
      wgmma<T, Major::mn>(dv_.x, p.a + 4 * k, b + O::at_rows(k), true);
    wgmma_commit();
  }

  /// dK += dS^T Q.
  DEVICE void start_key_gradient(Operand& ds) {
    const uint64_t b = Q::mn_major(q_tile(q_));
    keep(dk_.x);
    keep(ds.a);
    wgmma_fence();
    UNROLL
    for (int k = 0; k < Row::Br / 16; ++k)
      wgmma<T, Major::mn>(dk_.x, ds.a + 4 * k, b + Q::at_rows(k), true);
    wgmma_commit();
  }

  /// dS of this consumer's keys for who computes dQ, as stored: [queries, keys].
  DEVICE void share(const Operand& ds) {
    using Tile = typename F::STile;
    const int thread = recomputed(threadIdx.x);
    const int row = thread % 8 + thread / 16 % 2 * 8;
    const int chunk = thread / 32 % 4 * 2 + thread / 8 % 2;
    const uint32_t address = ds_tile() + index_ * Tile::page_bytes + Tile::offset(row, chunk);
    UNROLL
    for (int k = 0; k < Row::Br / 16; ++k)
      stmatrix_x4_trans(address + k * 16 * Tile::row_bytes, ds.a[4 * k], ds.a[4 * k + 1],
                        ds.a[4 * k + 2], ds.a[4 * k + 3]);
    fence_async_shared();
    warp_arrive(barriers_.ds_full(ds_.stage()));
  }

  DEVICE uint32_t ds_tile() const { return shared_ + F::at.ds + ds_.stage() * F::STile::bytes; }

  typename F::KeyGradient dk_;
  typename F::ValueGradient dv_;
  uint32_t v_[F::v_in_registers ? Row::dv / 4 : 1];
  typename Base::QRing q_;
  typename Base::ORing o_;
  Ring<2> ds_; // also counts turns
  Ring<Row::kv_stages> kv_;
};

} // namespace anyflash::sm90
