// Consumers of the sm90 backward that own a part of the head dim each: head dims above 128.
#pragma once

#include "cuda/sm90/backward/products_by_columns.h"

namespace anyflash::sm90 {

/// A consumer warpgroup: `width` columns of dK and dV of the block's 64 keys, and of dQ of the
/// queries that see them. Each computes the scores of half of the queries; P and dS of all of them
/// go through shared memory, [keys, queries].
template <class Row, int width>
class ConsumerByColumns : ProductsByColumns<Row> {
  using Base = ProductsByColumns<Row>;
  using Base::announce, Base::ds_tile, Base::lse, Base::p_tile, Base::release, Base::step;
  using Base::barriers_, Base::index_, Base::kv_, Base::memory_, Base::o_, Base::p_, Base::q_;
  using Base::shared_stage_;
  using Base::start_key_gradient, Base::start_probability_gradients, Base::start_query_gradient;
  using Base::start_scores, Base::start_value_gradient, Base::store;
  using typename Base::Cap, typename Base::F, typename Base::Operand, typename Base::Scores;
  using typename Base::T;
  /// dV leaves while the last products run; not where registers are few.
  static constexpr bool early_store = !F::general;

public:
  DEVICE ConsumerByColumns(const BackwardParams& p, char* shared_memory, int index)
      : Base(p, shared_memory, index), first_column_(index * F::k_columns) {}

  DEVICE void run() {
    for_each_work<Row>(p_, memory_, [&](const volatile Work& work) {
      dk_.clear();
      dv_.clear();
      if (work.steps) go_through_queries(work);
      if (!early_store || work.steps == 0) this->store_value_gradient(dv_, work, first_column_);
      this->store_key_gradient(dk_, work, first_column_);
    });
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
    start_value_gradient(dv_, first_column_, o_, shared_stage_.stage());
    start_query_gradient(dq, first_column_);
    if constexpr (more) start_scores(s, q_.next());
    start_key_gradient(dk_, first_column_);

    wgmma_wait<more ? 3 : 2>();
    keep(dv_.x);
    release(barriers_.o_empty(o_.stage()));
    wgmma_wait<more ? 2 : 1>();
    keep(dq.x);
    if (!more) release(barriers_.k_empty(kv_.stage()));
    this->wait_for_turn(shared_stage_);
    this->add_to_queries(dq, shared_stage_, step(q_).first_row, index_);
    this->pass_turn_on(shared_stage_);
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

  /// P and dS for both consumers. P is stored before dP is waited for, so that its exponentials are
  /// computed before, whatever the compiler thinks of them.
  DEVICE void share_probabilities(Scores& s, typename Base::QRing q, Ring<2> stage) {
    probabilities(s, lse(q), p_.factor);
    Operand p;
    p.round(s);
    store(p, p_tile(stage.stage()));
  }
  DEVICE void share_gradients(Scores& p, const Scores& dp, const Cap& cap, typename Base::QRing q,
                              Ring<2> stage) {
    Operand ds;
    round_gradients(ds, p, dp, cap, lse(q) + Row::Br, p_);
    store(ds, ds_tile(stage));
    announce(barriers_.ds_full(stage.stage()));
  }

  int first_column_;
  WarpgroupAccumulator<width> dk_, dv_;
};

} // namespace anyflash::sm90
