// The warpgroup that computes P and dS in a pair of thread blocks of the sm90 backward.
#pragma once

#include "cuda/sm90/backward/products_by_columns.h"

namespace anyflash::sm90 {

/// P and dS of a block's 64 keys and of one block of queries after the other. Where shared memory
/// is full, a part of V is in its registers.
template <class Row>
class ScoresInPair : ProductsByColumns<Row> {
  using Base = ProductsByColumns<Row>;
  using Base::announce, Base::ds_tile, Base::load, Base::lse, Base::p_tile, Base::release,
      Base::store;
  using Base::barriers_, Base::kv_, Base::memory_, Base::p_;
  using Base::start_probability_gradients, Base::start_scores;
  using Base::v_;
  using typename Base::Cap, typename Base::F, typename Base::Operand, typename Base::Scores;
  static_assert(!F::general && Row::q_stages == 2 && Row::o_stages == 2);

public:
  DEVICE ScoresInPair(const BackwardParams& p, char* shared_memory) : Base(p, shared_memory, 0) {}

  DEVICE void run() {
    for_each_work<Row>(p_, memory_, [&](const volatile Work& work) {
      if (work.steps) go_through_queries(work);
    });
  }

private:
  DEVICE void go_through_queries(const volatile Work& work) {
    mbarrier_wait(barriers_.k_full(kv_.stage()), kv_.phase());
    mbarrier_wait(barriers_.v_full(kv_.stage()), kv_.phase());
    if constexpr (F::direct_v) this->load_values_directly(v_.a, work);
    ROLLED
    for (int left = work.steps; left > 0; --left) one_step(work, left == 1);
    kv_.advance();
  }

  /// One block of queries. P leaves as soon as it is there, so that dV runs while dP is awaited,
  /// and comes back from there: beside V and dP there are no registers for it.
  DEVICE void one_step(const volatile Work& work, bool last) {
    Operand p, ds;
    {
      Scores s;
      start_scores(s, stage_);
      wgmma_wait<0>();
      keep(s.x);
      Cap cap;
      this->prepare(s, cap, work, stage_);
      probabilities(s, lse(stage_), p_.factor);
      p.round(s);
    }
    Scores dp;
    start_probability_gradients(dp, stage_);
    mbarrier_wait(barriers_.p_empty(), stage_.stage() ^ 1);
    store(p, p_tile(0));
    announce(barriers_.p_full());
    wgmma_wait<0>();
    keep(dp.x);
    release(barriers_.o_empty(stage_.stage()));
    if (last) release(barriers_.v_empty(kv_.stage()));
    load(p, p_tile(0));
    round_gradients(ds, p, dp, lse(stage_) + Row::Br);
    mbarrier_wait(barriers_.ds_empty(stage_.stage()), stage_.phase() ^ 1);
    store(ds, ds_tile(stage_));
    announce(barriers_.ds_full(stage_.stage()));
    stage_.advance();
  }

  Ring<2> stage_; // of Q, dO, and dS
};

} // namespace anyflash::sm90
