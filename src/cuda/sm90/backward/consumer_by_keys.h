// Consumers of the sm90 backward that own 64 keys each, and a part of dQ.
#pragma once

#include "cuda/sm90/backward/products_by_keys.h"

namespace anyflash::sm90 {

/// A consumer warpgroup: dK and dV of its 64 keys of a block, and its part of dQ of the queries
/// that see them.
template <class Row>
class ConsumerByKeys : ProductsByKeys<Row> {
  using Base = ProductsByKeys<Row>;
  using Base::barriers_, Base::index_, Base::memory_, Base::p_;
  using Base::dk_, Base::ds_, Base::dv_, Base::kv_, Base::o_, Base::q_;
  using Base::ds_tile, Base::lse, Base::release, Base::share, Base::start_key_gradient;
  using Base::start_probability_gradients, Base::start_scores, Base::start_value_gradient;
  using typename Base::Cap, typename Base::F, typename Base::K, typename Base::Operand;
  using typename Base::S, typename Base::Scores, typename Base::T;
  /// S of the next queries is started before this block's dQ, and dK comes last, to run under the
  /// next dP; where registers allow.
  static constexpr bool ahead = Row::ahead;
  /// dV leaves while the last products run; not where registers are few.
  static constexpr bool early_store = ahead && !F::general;

public:
  DEVICE ConsumerByKeys(const BackwardParams& p, char* shared_memory, int index)
      : Base(p, shared_memory, index) {}

  DEVICE void run() {
    for_each_work<Row>(p_, memory_, [&](const volatile Work& work) {
      dk_.clear();
      dv_.clear();
      if (work.steps) go_through_queries(work);
      if (!early_store || work.steps == 0) this->store_value_gradient(dv_, work);
      this->store_key_gradient(dk_, work);
    });
  }

private:
  DEVICE void go_through_queries(const volatile Work& work) {
    Scores s; // of the queries that come next, where they are started ahead
    Cap cap;
    mbarrier_wait(barriers_.k_full(kv_.stage()), kv_.phase());
    if constexpr (ahead) {
      start_scores(s, q_);
      wgmma_wait<0>();
      keep(s.x);
      this->prepare(s, cap, work, q_);
    }
    mbarrier_wait(barriers_.v_full(kv_.stage()), kv_.phase());
    ROLLED
    for (int left = work.steps; left > (ahead ? 1 : 0); --left) one_step<true>(work, s, cap, left);
    if constexpr (ahead) {
      one_step<false>(work, s, cap, 1);
      wgmma_wait<0>();
      keep(dk_.x);
      this->release_queries(q_.before());
    } else {
      release(barriers_.v_empty(kv_.stage()));
      release(barriers_.k_empty(kv_.stage()));
    }
    kv_.advance();
  }

  /// One block of queries. more: another one may follow; S of it is started.
  template <bool more>
  DEVICE void one_step(const volatile Work& work, Scores& coming, Cap& cap, int left) {
    Scores s, dp;
    if constexpr (ahead)
      s = coming;
    else
      start_scores(s, q_);
    start_probability_gradients(dp);
    if constexpr (!ahead) {
      wgmma_wait<1>();
      keep(s.x);
      this->prepare(s, cap, work, q_);
    }
    probabilities(s, lse(q_), p_.factor);
    wgmma_wait<0>();
    keep(dp.x);
    if constexpr (ahead) keep(dk_.x); // of the block before
    if (ahead && left != work.steps) this->release_queries(q_.before());
    if (!more) release(barriers_.v_empty(kv_.stage()));

    Operand p, ds;
    p.round(s);
    round_gradients(ds, s, dp, cap, lse(q_) + Row::Br, p_);
    share(ds);
    start_value_gradient(p);
    Scores next;
    typename F::QueryGradient dq;
    if constexpr (ahead) {
      if constexpr (more) start_scores(next, q_.next());
      mbarrier_wait(barriers_.ds_full(ds_.stage()), ds_.phase());
      wait_value_gradient<more>(p);
      start_query_gradient(dq);
      start_key_gradient(ds);
      wgmma_wait<1>();
    } else {
      start_key_gradient(ds);
      mbarrier_wait(barriers_.ds_full(ds_.stage()), ds_.phase());
      start_query_gradient(dq);
      wait_value_gradient<1>(p);
      keep(dk_.x);
      keep(ds.a);
      wgmma_wait<0>();
    }
    keep(dq.x);
    if (!more) release(barriers_.k_empty(kv_.stage()));
    this->wait_for_turn(ds_);
    this->add_to_queries(dq, ds_, this->step(q_).first_row, index_);
    this->pass_turn_on(ds_);
    if (!more && early_store) this->store_value_gradient(dv_, work);
    if constexpr (!ahead) this->release_queries(q_.stage());
    if constexpr (ahead && more) {
      keep(next.x);
      this->prepare(next, cap, work, q_.next());
      coming = next;
    }
    q_.advance();
    o_.advance();
    ds_.advance();
  }

  /// Once dO is read: with `pending` groups after dV's.
  template <int pending>
  DEVICE void wait_value_gradient(Operand& p) {
    wgmma_wait<pending>();
    keep(dv_.x);
    keep(p.a);
    release(barriers_.o_empty(o_.stage()));
  }

  /// dQ = dS K over the keys of both consumers.
  DEVICE void start_query_gradient(typename F::QueryGradient& dq) {
    const uint64_t a = S::k_major(ds_tile(), F::split_queries ? index_ * 64 : 0);
    const uint64_t b = K::mn_major(this->k_tile(kv_), F::part_column(index_));
    wgmma_fence();
    UNROLL
    for (int k = 0; k < Row::Bc / 16; ++k)
      wgmma<T, Major::k, Major::mn>(dq.x, a + S::at_columns(k), b + K::at_rows(k), k != 0);
    wgmma_commit();
  }
};

} // namespace anyflash::sm90
