// Consumers of the sm90 backward that own a part of the head dim each, while a warpgroup of its own
// does the scores: head dims above 128.
#pragma once

#include "cuda/sm90/backward/products_by_columns.h"

namespace anyflash::sm90 {

/// A consumer warpgroup: `width` columns of dK and dV of the block's 64 keys, and of dQ of the
/// queries that see them.
template <class Row, int width>
class ConsumerOfColumns : ProductsByColumns<Row> {
  using Base = ProductsByColumns<Row>;
  using Base::barriers_, Base::index_, Base::kv_, Base::memory_, Base::o_, Base::p_, Base::q_;
  using Base::release, Base::shared_stage_, Base::step;
  using Base::start_key_gradient, Base::start_query_gradient, Base::start_value_gradient;
  using typename Base::F;

public:
  DEVICE ConsumerOfColumns(const BackwardParams& p, char* shared_memory, int index)
      : Base(p, shared_memory, index), first_column_(index * F::q_columns) {}

  DEVICE void run() {
    for_each_work<Row>(p_, memory_, [&](const volatile Work& work) {
      dk_.clear();
      dv_.clear();
      if (work.steps) go_through_queries(work);
      this->store_value_gradient(dv_, work, first_column_);
      this->store_key_gradient(dk_, work, first_column_);
    });
  }

private:
  DEVICE void go_through_queries(const volatile Work& work) {
    mbarrier_wait(barriers_.k_full(kv_.stage()), kv_.phase());
    ROLLED
    for (int left = work.steps; left > 0; --left) one_step(left == 1);
    kv_.advance();
  }

  /// One block of queries. dQ is computed in parts of 64 columns, and added while other products
  /// run.
  DEVICE void one_step(bool last) {
    QueryGradient dq;
    mbarrier_wait(barriers_.o_full(o_.stage()), o_.phase());
    mbarrier_wait(barriers_.p_full(shared_stage_.stage()), shared_stage_.phase());
    start_value_gradient(dv_, first_column_, o_, shared_stage_.stage());
    mbarrier_wait(barriers_.ds_full(shared_stage_.stage()), shared_stage_.phase());
    start_query_gradient(dq, first_column_);
    start_key_gradient(dk_, first_column_);
    wgmma_wait<2>();
    keep(dv_.x);
    release(barriers_.o_empty(o_.stage()));
    wgmma_wait<1>();
    keep(dq.x);
    const bool store = this->wait_for_turn(shared_stage_);
    if constexpr (width == 128) {
      this->add_to_queries(dq, step(q_).first_row, store, index_);
      start_query_gradient(dq, first_column_ + 64);
    }
    wgmma_wait<0>();
    keep(dk_.x);
    keep(dq.x);
    const int64_t first_row = step(q_).first_row;
    if (last) release(barriers_.k_empty(kv_.stage()));
    this->release_queries(q_.stage());
    this->add_to_queries(dq, first_row, store, index_, width == 128 ? 8 : 0);
    this->pass_turn_on();
    q_.advance();
    o_.advance();
    shared_stage_.advance();
  }

  using QueryGradient = WarpgroupAccumulator<64>;
  int first_column_;
  WarpgroupAccumulator<width> dk_, dv_;
};

} // namespace anyflash::sm90
