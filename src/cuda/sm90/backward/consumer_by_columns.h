// Consumers of the sm90 backward that own a part of the head dim each: head dims above 128.
#pragma once

#include "cuda/sm90/backward/consumer_base.h"

namespace anyflash::sm90 {

/// A consumer warpgroup: `width` columns of dK and dV of the block's 64 keys, and of dQ of the
/// queries that see them. Each computes the scores of half of the queries; P and dS of all of them
/// go through shared memory, [keys, queries].
template <class Row, int width>
class ConsumerByColumns : ConsumerBase<Row> {
  using Base = ConsumerBase<Row>;
  using Base::barriers_, Base::index_, Base::memory_, Base::p_, Base::shared_;
  using Base::lse, Base::o_tile, Base::q_tile, Base::release, Base::step;
  using typename Base::Cap, typename Base::F, typename Base::K, typename Base::O, typename Base::Q;
  using typename Base::S, typename Base::Scores, typename Base::T, typename Base::V;
  using Tile = typename F::STile;
  /// dV leaves while the last products run; not where registers are few.
  static constexpr bool early_store = !F::general;

public:
  DEVICE ConsumerByColumns(const BackwardParams& p, char* shared_memory, int index)
      : Base(p, shared_memory, index), first_column_(index * F::q_columns) {}

  DEVICE void run() {
    WorkReader<Row> reader(memory_);
    ROLLED
    while (true) {
      const volatile Work& work = reader.wait();
      if (work.ticket >= p_.key_blocks) return;
      dk_.clear();
      dv_.clear();
      if (work.steps) go_through_queries(work);
      if (!early_store || work.steps == 0) this->store_value_gradient(dv_, work, first_column_);
      this->store_key_gradient(dk_, work, first_column_);
      reader.next();
    }
  }

private:
  DEVICE void go_through_queries(const volatile Work& work) {
    mbarrier_wait(barriers_.k_full(kv_.stage()), kv_.phase());
    mbarrier_wait(barriers_.v_full(kv_.stage()), kv_.phase());
    {
      Scores s, dp;
      start_scores(s, q_);
      start_probability_gradients(dp, o_);
      wgmma_wait<0>();
      keep(s.x);
      keep(dp.x);
      Cap cap;
      this->prepare(s, cap, work, q_);
      share_probabilities(s, q_, shared_stage_);
      share_gradients(s, dp, cap, q_, shared_stage_);
    }
    ROLLED
    for (int left = work.steps; left > 1; --left) one_step<true>(work);
    one_step<false>(work);
    kv_.advance();
  }

  /// One block of queries, whose P and dS are on their way. more: another one follows; its scores
  /// are computed while the products of this one run. dP of it waits until dQ has left its
  /// registers.
  template <bool more>
  DEVICE void one_step(const volatile Work& work) {
    Scores s, dp;
    WarpgroupAccumulator<width> dq;
    if (!more) release(barriers_.v_empty(kv_.stage()));
    mbarrier_wait(barriers_.ds_full(shared_stage_.stage()), shared_stage_.phase());
    start_value_gradient();
    start_query_gradient(dq);
    if constexpr (more) start_scores(s, q_.next());
    start_key_gradient();

    wgmma_wait<more ? 3 : 2>();
    keep(dv_.x);
    release(barriers_.o_empty(o_.stage()));
    wgmma_wait<more ? 2 : 1>();
    keep(dq.x);
    if (!more) release(barriers_.k_empty(kv_.stage()));
    this->add_to_queries(dq, q_, shared_stage_);
    if (!more && early_store) this->store_value_gradient(dv_, work, first_column_);
    if constexpr (more) {
      start_probability_gradients(dp, o_.next());
      wgmma_wait<2>();
      keep(s.x);
      Cap cap;
      this->prepare(s, cap, work, q_.next());
      share_probabilities(s, q_.next(), shared_stage_.next());
      wgmma_wait<0>();
      keep(dp.x);
      keep(dk_.x);
      this->release_queries(q_.stage());
      share_gradients(s, dp, cap, q_.next(), shared_stage_.next());
    } else {
      wgmma_wait<0>();
      keep(dk_.x);
      this->release_queries(q_.stage());
    }
    q_.advance();
    o_.advance();
    shared_stage_.advance();
  }

  /// S^T = K Q^T of this consumer's queries.
  DEVICE void start_scores(Scores& s, typename Base::QRing q) {
    mbarrier_wait(barriers_.q_full(q.stage()), q.phase());
    const uint64_t a = K::k_major(this->k_tile(kv_));
    const uint64_t b = Q::k_major(q_tile(q), index_ * Scores::width);
    wgmma_fence();
    UNROLL
    for (int k = 0; k < Row::d / 16; ++k)
      wgmma<T, Major::k, Major::k>(s.x, a + K::at_columns(k), b + Q::at_columns(k), k != 0);
    wgmma_commit();
  }

  /// dP^T = V dO^T of this consumer's queries.
  DEVICE void start_probability_gradients(Scores& dp, typename Base::ORing o) {
    mbarrier_wait(barriers_.o_full(o.stage()), o.phase());
    const uint64_t a = V::k_major(this->v_tile(kv_));
    const uint64_t b = O::k_major(o_tile(o), index_ * Scores::width);
    wgmma_fence();
    UNROLL
    for (int k = 0; k < Row::dv / 16; ++k)
      wgmma<T, Major::k, Major::k>(dp.x, a + V::at_columns(k), b + O::at_columns(k), k != 0);
    wgmma_commit();
  }

  /// dV += P^T dO.
  DEVICE void start_value_gradient() {
    const uint64_t a = S::k_major(p_tile(shared_stage_));
    const uint64_t b = O::mn_major(o_tile(o_), first_column_);
    keep(dv_.x);
    wgmma_fence();
    UNROLL
    for (int k = 0; k < Row::Br / 16; ++k)
      wgmma<T, Major::k, Major::mn>(dv_.x, a + S::at_columns(k), b + O::at_rows(k), true);
    wgmma_commit();
  }

  /// dQ = dS K.
  DEVICE void start_query_gradient(WarpgroupAccumulator<width>& dq) {
    const uint64_t a = S::mn_major(ds_tile(shared_stage_));
    const uint64_t b = K::mn_major(this->k_tile(kv_), first_column_);
    wgmma_fence();
    UNROLL
    for (int k = 0; k < Row::Bc / 16; ++k)
      wgmma<T, Major::mn, Major::mn>(dq.x, a + S::at_rows(k), b + K::at_rows(k), k != 0);
    wgmma_commit();
  }

  /// dK += dS^T Q.
  DEVICE void start_key_gradient() {
    const uint64_t a = S::k_major(ds_tile(shared_stage_));
    const uint64_t b = Q::mn_major(q_tile(q_), first_column_);
    keep(dk_.x);
    wgmma_fence();
    UNROLL
    for (int k = 0; k < Row::Br / 16; ++k)
      wgmma<T, Major::k, Major::mn>(dk_.x, a + S::at_columns(k), b + Q::at_rows(k), true);
    wgmma_commit();
  }

  /// P and dS for both consumers. A stage is free when its block of queries has been released: Q
  /// has as many stages, and this block's was loaded after that. P is stored before dP is waited
  /// for, so that its exponentials are computed before, whatever the compiler thinks of them.
  DEVICE void share_probabilities(Scores& s, typename Base::QRing q, Ring<2> stage) {
    static_assert(Row::q_stages == 2);
    probabilities(s, lse(q), p_.factor);
    WarpgroupOperand<T, Scores::width> p;
    p.round(s);
    store(p, p_tile(stage));
  }
  DEVICE void share_gradients(Scores& p, const Scores& dp, const Cap& cap, typename Base::QRing q,
                              Ring<2> stage) {
    WarpgroupOperand<T, Scores::width> ds;
    round_gradients(ds, p, dp, cap, lse(q) + Row::Br, p_);
    store(ds, ds_tile(stage));
    fence_async_shared();
    __syncwarp();
    if (lane_index() == 0) mbarrier_arrive(barriers_.ds_full(stage.stage()));
  }
  DEVICE void store(const WarpgroupOperand<T, Scores::width>& x, uint32_t tile) const {
    const int thread = recomputed(threadIdx.x);
    const int row = thread / 32 % 4 * 16 + thread % 16;
    UNROLL
    for (int k = 0; k < Scores::width / 16; ++k) {
      const int chunk = index_ * (Scores::width / 8) + 2 * k + thread / 16 % 2;
      stmatrix_x4(tile + Tile::offset(row, chunk), x.a[4 * k], x.a[4 * k + 1], x.a[4 * k + 2],
                  x.a[4 * k + 3]);
    }
  }

  DEVICE uint32_t ds_tile(Ring<2> stage) const {
    return shared_ + F::at.ds + stage.stage() * Tile::bytes;
  }
  DEVICE uint32_t p_tile(Ring<2> stage) const {
    return shared_ + F::at.ds + (2 + stage.stage()) * Tile::bytes;
  }

  int first_column_;
  WarpgroupAccumulator<width> dk_, dv_;
  typename Base::QRing q_;
  typename Base::ORing o_;
  Ring<2> shared_stage_; // of P and dS; also counts turns
  Ring<Row::kv_stages> kv_;
};

} // namespace anyflash::sm90
