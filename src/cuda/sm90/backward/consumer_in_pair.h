// Consumers of the sm90 backward in a pair of thread blocks, which exchange dS: head dims above
// 128.
#pragma once

#include "cuda/sm90/backward/products_by_columns.h"

namespace anyflash::sm90 {

/// A consumer warpgroup: so many columns of dK and of dV of this block's 64 keys, and of dQ over
/// the 128 keys of the pair.
template <class Row, int k_width, int v_width, int q_width>
class ConsumerInPair : ProductsByColumns<Row> {
  using Base = ProductsByColumns<Row>;
  using Base::barriers_, Base::index_, Base::kv_, Base::memory_, Base::o_, Base::p_, Base::q_;
  using Base::release, Base::shared_, Base::shared_stage_, Base::step;
  using Base::start_key_gradient, Base::start_query_gradient, Base::start_value_gradient;
  using typename Base::F, typename Base::T;
  using PeerSTile = typename F::PeerSTile;
  using PeerS = MatrixDescriptor<PeerSTile>;
  using PeerK = MatrixDescriptor<typename F::PeerKTile>;

public:
  DEVICE ConsumerInPair(const BackwardParams& p, char* shared_memory, int index)
      : Base(p, shared_memory, index) {}

  DEVICE void run() {
    for_each_work<Row>(p_, memory_, [&](const volatile Work& work) {
      dk_.clear();
      dv_.clear();
      if (work.steps) go_through_queries(work);
      this->store_value_gradient(dv_, work, first_of_dv());
      this->store_key_gradient(dk_, work, first_of_dk());
    });
  }

private:
  DEVICE void go_through_queries(const volatile Work& work) {
    mbarrier_wait(barriers_.k_full(kv_.stage()), kv_.phase());
    mbarrier_wait(barriers_.peer_k_full(), kv_.phase());
    ROLLED
    for (int left = work.steps; left > 0; --left) one_step(left == 1);
    kv_.advance();
  }

  /// One block of queries. What comes from the other block is needed last.
  DEVICE void one_step(bool last) {
    QueryGradient dq;
    const uint32_t parity = shared_stage_.stage(); // of what there is one stage of
    mbarrier_wait(barriers_.o_full(o_.stage()), o_.phase());
    mbarrier_wait(barriers_.p_full(), parity);
    start_value_gradient(dv_, first_of_dv(), o_, 0);
    mbarrier_wait(barriers_.ds_full(shared_stage_.stage()), shared_stage_.phase());
    start_key_gradient(dk_, first_of_dk());
    start_query_gradient(dq, query_column());
    wgmma_wait<2>();
    keep(dv_.x);
    release(barriers_.o_empty(o_.stage()));
    release(barriers_.p_empty());
    mbarrier_wait(barriers_.peer_ds_full(peer_.stage()), peer_.phase());
    add_keys_of_peer(dq);
    wgmma_wait<2>();
    keep(dk_.x);
    const int64_t first_row = step(q_).first_row;
    warp_arrive_after(static_cast<uint32_t>(first_row), barriers_.q_empty(q_.stage()));
    wgmma_wait<0>();
    keep(dq.x);
    release(barriers_.ds_empty(shared_stage_.stage()));
    this->release_there(barriers_.ds_empty(shared_stage_.stage()));
    if (last) release(barriers_.k_empty(kv_.stage()));
    if (last) release(barriers_.peer_k_empty());
    this->wait_for_turn(shared_stage_);
    this->add_to_queries(dq, shared_stage_, first_row, F::rank(),
                         (query_column() - F::rank() * F::q_columns) / 8);
    this->pass_turn_on(shared_stage_);
    q_.advance();
    o_.advance();
    shared_stage_.advance();
    peer_.advance();
  }

  using QueryGradient = WarpgroupAccumulator<q_width>;

  DEVICE int first_of_dk() const { return index_ * F::k_columns; }
  DEVICE int first_of_dv() const { return index_ * F::v_columns; }
  /// The first of dQ. At head dim 192 a block's part is a page of columns and half of the one in
  /// the middle; the consumer that owns less of dK has the page.
  DEVICE int query_column() const {
    if constexpr (F::q_columns == 96) return q_width == 64 ? F::rank() * 128 : 64 + F::rank() * 32;
    return F::rank() * F::q_columns + index_ * q_width;
  }

  /// dQ += dS K, of the other block's keys.
  DEVICE void add_keys_of_peer(QueryGradient& dq) {
    const uint64_t a = PeerS::mn_major(shared_ + F::at.peer_ds + peer_.stage() * PeerSTile::bytes);
    const uint64_t b =
        PeerK::mn_major(shared_ + F::at.peer_k, query_column() - F::first_of_peer_k());
    wgmma_fence();
    UNROLL
    for (int k = 0; k < Row::Bc / 16; ++k)
      wgmma<T, Major::mn, Major::mn>(dq.x, a + PeerS::at_rows(k), b + PeerK::at_rows(k), true);
    wgmma_commit();
  }

  Ring<Row::peer_stages> peer_; // of the other block's dS
  WarpgroupAccumulator<k_width> dk_;
  WarpgroupAccumulator<v_width> dv_;
};

} // namespace anyflash::sm90
