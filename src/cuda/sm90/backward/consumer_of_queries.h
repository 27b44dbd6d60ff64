// The warpgroup of the sm90 backward that computes dQ and nothing else: head dims up to 128.
#pragma once

#include "cuda/sm90/backward/consumer_base.h"

namespace anyflash::sm90 {

/// dQ = dS K of one block of queries after the other, added to the sums. Two blocks behind the
/// consumers at most, so that neither the additions nor the turns are their time.
template <class Row>
class ConsumerOfQueries : protected ConsumerBase<Row> {
protected:
  using Base = ConsumerBase<Row>;
  using Base::barriers_, Base::memory_, Base::p_, Base::release, Base::shared_;
  using typename Base::F, typename Base::K, typename Base::S, typename Base::T;

public:
  DEVICE ConsumerOfQueries(const BackwardParams& p, char* shared_memory)
      : Base(p, shared_memory, 0) {}

  DEVICE void run() {
    for_each_work<Row>(p_, memory_, [&](const volatile Work& work) {
      if (work.steps) go_through_queries(work);
    });
  }

protected:
  /// dQ = dS K over all keys of the block.
  DEVICE void start(typename F::QueryGradient& dq, int part) {
    const uint32_t ds = shared_ + F::at.ds + ds_.stage() * F::STile::bytes;
    const uint64_t a = S::k_major(ds, F::part_row(part));
    const uint64_t b = K::mn_major(this->k_tile(kv_), F::part_column(part));
    wgmma_fence();
    UNROLL
    for (int k = 0; k < Row::Bc / 16; ++k)
      wgmma<T, Major::k, Major::mn>(dq.x, a + S::at_columns(k), b + K::at_rows(k), k != 0);
    wgmma_commit();
  }

  Ring<2> ds_; // also counts turns
  Ring<Row::kv_stages> kv_;

private:
  DEVICE void go_through_queries(const volatile Work& work) {
    QueryCursor at(work);
    mbarrier_wait(barriers_.k_full(kv_.stage()), kv_.phase());
    ROLLED
    for (int left = work.steps; left > 0; --left) {
      mbarrier_wait(barriers_.ds_full(ds_.stage()), ds_.phase());
      const int64_t first_row = at.first_row(work, p_.padded_rows, Row::Br);
      ROLLED
      for (int part = 0; part < 2; ++part) add_part(part, first_row, left == 1);
      this->pass_turn_on(ds_);
      ds_.advance();
      at.advance(p_);
    }
    kv_.advance();
  }

  /// What would be a consumer's part if there were no warpgroup for dQ. dS is free after the
  /// second, and K after that of the last block.
  DEVICE void add_part(int part, int64_t first_row, bool last_block) {
    typename F::QueryGradient dq;
    start(dq, part);
    wgmma_wait<0>();
    keep(dq.x);
    if (part == 0) {
      this->wait_for_turn(ds_);
    } else {
      release(barriers_.ds_empty(ds_.stage()));
      if (last_block) release(barriers_.k_empty(kv_.stage()));
    }
    this->add_to_queries(dq, ds_, first_row, part);
  }
};

} // namespace anyflash::sm90
