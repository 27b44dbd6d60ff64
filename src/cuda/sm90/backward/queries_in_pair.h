// The warpgroup that computes dQ in a pair of thread blocks of the sm90 backward: head dims up to
// 128.
#pragma once

#include "cuda/sm90/backward/consumer_of_queries.h"

namespace anyflash::sm90 {

/// This block's part of dQ, over the keys of both blocks, of all queries that see any of them.
template <class Row>
class QueriesInPair : ConsumerOfQueries<Row> {
  using Base = ConsumerOfQueries<Row>;
  using Base::barriers_, Base::ds_, Base::kv_, Base::memory_, Base::p_, Base::release;
  using Base::shared_;
  using typename Base::F, typename Base::T;
  using STile = typename F::PeerSTile;
  using KTile = typename F::PeerKTile;
  using S = MatrixDescriptor<STile>;
  using K = MatrixDescriptor<KTile>;
  using QueryGradient = typename F::QueryGradient;

public:
  DEVICE QueriesInPair(const BackwardParams& p, char* shared_memory) : Base(p, shared_memory) {}

  DEVICE void run() {
    for_each_work<Row>(p_, memory_, [&](const volatile Work& work) { go_through_queries(work); });
  }

private:
  DEVICE void go_through_queries(const volatile Work& work) {
    QueryCursor at(in_pair(work).of_pair);
    own_left_ = work.steps;
    peer_left_ = in_pair(work).of_peer.steps;
    if (own_left_) mbarrier_wait(barriers_.k_full(kv_.stage()), kv_.phase());
    if (peer_left_) mbarrier_wait(barriers_.peer_k_full(), peer_keys_.phase());
    ROLLED
    for (int left = in_pair(work).of_pair.steps; left > 0; --left) {
      const bool own = contains(work, at.i), peer = contains(in_pair(work).of_peer, at.i);
      QueryGradient dq;
      if (own && peer)
        multiply<true, true>(dq);
      else if (own)
        multiply<true, false>(dq);
      else
        multiply<false, true>(dq);
      const int64_t first_row = at.first_row(work, p_.padded_rows, Row::Br);
      this->wait_for_turn(turn_);
      this->add_to_queries(dq, turn_, first_row, F::rank());
      this->pass_turn_on(turn_);
      turn_.advance();
      at.advance(p_);
    }
  }

  /// dQ = dS K over the keys of the blocks that have some of them. What comes from the other block
  /// is needed last.
  template <bool own, bool peer>
  DEVICE void multiply(QueryGradient& dq) {
    if constexpr (own) {
      mbarrier_wait(barriers_.ds_full(ds_.stage()), ds_.phase());
      this->start(dq, F::rank());
    }
    if constexpr (peer) {
      constexpr bool two = Row::peer_stages == 2;
      const int stage = two ? peer_ds_.stage() : 0;
      mbarrier_wait(barriers_.peer_ds_full(stage), two ? peer_ds_.phase() : peer_ds_.count & 1);
      start_of_peer(dq, stage, own);
    }
    wgmma_wait<0>();
    keep(dq.x);
    if constexpr (own) {
      release(barriers_.ds_empty(ds_.stage()));
      ds_.advance();
      if (--own_left_ == 0) {
        release(barriers_.k_empty(kv_.stage()));
        kv_.advance();
      }
    }
    if constexpr (peer) {
      this->release_there(barriers_.ds_empty(peer_ds_.stage()));
      peer_ds_.advance();
      if (--peer_left_ == 0) {
        release(barriers_.peer_k_empty());
        peer_keys_.advance();
      }
    }
  }

  /// dQ (+)= dS K over the keys of the other block.
  DEVICE void start_of_peer(QueryGradient& dq, int stage, bool accumulate) {
    const uint64_t a = S::k_major(shared_ + F::at.peer_ds + stage * STile::bytes);
    const uint64_t b = K::mn_major(shared_ + F::at.peer_k);
    wgmma_fence();
    UNROLL
    for (int k = 0; k < Row::Bc / 16; ++k)
      wgmma<T, Major::k, Major::mn>(dq.x, a + S::at_columns(k), b + K::at_rows(k),
                                    accumulate || k != 0);
    wgmma_commit();
  }

  Ring<2> peer_ds_; // stages there
  Ring<2> turn_;
  Ring<1> peer_keys_;
  int own_left_, peer_left_; // steps
};

} // namespace anyflash::sm90
