// Consumers of the sm90 backward that own 64 keys each, while a warpgroup of its own does dQ: head
// dims up to 128.
#pragma once

#include "cuda/sm90/backward/products_by_keys.h"

namespace anyflash::sm90 {

/// A consumer warpgroup: dK and dV of its 64 keys of a block. It gives dS away and goes on; it
/// meets nobody.
template <class Row>
class ConsumerOfKeys : ProductsByKeys<Row> {
  using Base = ProductsByKeys<Row>;
  using Base::barriers_, Base::memory_, Base::p_;
  using Base::dk_, Base::ds_, Base::dv_, Base::kv_, Base::o_, Base::q_, Base::v_;
  using Base::lse, Base::release, Base::share, Base::start_key_gradient;
  using Base::start_probability_gradients, Base::start_scores, Base::start_value_gradient;
  using typename Base::Cap, typename Base::F, typename Base::Operand, typename Base::Scores;
  static_assert(!F::general);

public:
  DEVICE ConsumerOfKeys(const BackwardParams& p, char* shared_memory, int index)
      : Base(p, shared_memory, index) {}

  DEVICE void run() {
    for_each_work<Row>(p_, memory_, [&](const volatile Work& work) {
      dk_.clear();
      dv_.clear();
      if (work.steps) go_through_queries(work);
      this->store_value_gradient(dv_, work);
      this->store_key_gradient(dk_, work);
    });
  }

private:
  DEVICE void go_through_queries(const volatile Work& work) {
    if constexpr (F::direct_v) this->load_values_directly(v_, work);
    mbarrier_wait(barriers_.k_full(kv_.stage()), kv_.phase());
    Operand p;
    {
      Scores s;
      start_scores(s, q_);
      wgmma_wait<0>();
      keep(s.x);
      probabilities_of(s, work, q_);
      p.round(s);
    }
    mbarrier_wait(barriers_.v_full(kv_.stage()), kv_.phase());
    if constexpr (F::direct_v == 0) this->load_values();
    ROLLED
    for (int left = work.steps; left > 1; --left) one_step<true>(work, p);
    one_step<false>(work, p);
    kv_.advance();
  }

  /// One block of queries, whose P is there; rounded, because dP takes the registers in which it
  /// was. dS takes its place. more: another block follows; its S is computed in front of dK, and
  /// its P under dK.
  template <bool more>
  DEVICE void one_step(const volatile Work& work, Operand& p) {
    {
      Scores dp;
      start_probability_gradients(dp);
      start_value_gradient(p);
      wgmma_wait<0>();
      keep(dv_.x);
      keep(p.a);
      keep(dp.x);
      release(barriers_.o_empty(o_.stage()));
      if (!more) release(barriers_.v_empty(kv_.stage()));
      round_gradients(p, p, dp, lse(q_) + Row::Br);
    }
    mbarrier_wait(barriers_.ds_empty(ds_.stage()), ds_.phase() ^ 1);
    share(p);
    Scores s;
    if constexpr (more) start_scores(s, q_.next());
    start_key_gradient(p);
    if constexpr (more) {
      wgmma_wait<1>();
      keep(s.x);
      probabilities_of(s, work, q_.next());
      compute_here(s);
    }
    wgmma_wait<0>();
    keep(dk_.x);
    keep(p.a);
    this->release_queries(q_.stage());
    if constexpr (more) p.round(s);
    q_.advance();
    o_.advance();
    ds_.advance();
  }

  /// S becomes P.
  DEVICE void probabilities_of(Scores& s, const volatile Work& work, typename Base::QRing q) {
    Cap cap;
    this->prepare(s, cap, work, q);
    probabilities(s, lse(q), p_.factor);
  }
};

} // namespace anyflash::sm90
