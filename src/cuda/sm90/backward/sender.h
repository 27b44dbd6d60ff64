// The warp that exchanges with the other block of a pair in the sm90 backward.
#pragma once

#include "cuda/ptx/cluster.h"
#include "cuda/sm90/backward/turns.h"

namespace anyflash::sm90 {

/// Fetches what is needed here of the other block's keys, and sends what is needed there of dS.
/// Where there are turns, it also passes them on, of the queries before: nothing that is sent waits
/// for that.
template <class Row>
class Sender {
  using F = Backward<Row>;

public:
  DEVICE Sender(const BackwardParams& p, const char* shared_memory)
      : p_(p), memory_(shared_memory), shared_(shared_address(shared_memory)),
        barriers_{shared_ + F::at.barriers} {}

  DEVICE void run() {
    for_each_work<Row>(p_, memory_, [&](const volatile Work& work) {
      if (in_pair(work).of_peer.steps) load_keys(work);
      send_all(work);
    });
  }

private:
  DEVICE void send_all(const volatile Work& work) {
    const volatile Queries& queries = in_pair(work).of_pair;
    QueryCursor at(queries), before(queries);
    ROLLED
    for (int left = queries.steps; left > 0; --left) {
      if (contains(work, at.i)) send();
      at.advance(p_);
      if (p_.turns && left < queries.steps) pass_turn_on(work, before);
    }
    if (p_.turns && queries.steps) pass_turn_on(work, before);
  }
  DEVICE void pass_turn_on(const volatile Work& work, QueryCursor& at) {
    sm90::pass_turn_on<Row>(p_, barriers_, work, at, turn_);
  }

  /// The columns of this block's part of dQ.
  DEVICE void load_keys(const volatile Work& work) {
    using Tile = typename F::PeerKTile;
    const int column = F::first_of_peer_k();
    const int pages = pages_with<Tile>(p_.d, column);
    mbarrier_wait(barriers_.peer_k_empty(), keys_.phase() ^ 1);
    if (lane_index() == 0) {
      mbarrier_arrive_expect(barriers_.peer_k_full(), pages * Tile::page_bytes);
      load_rows<Tile>(shared_ + F::at.peer_k, pages, &p_.k_map, barriers_.peer_k_full(), column,
                      work.first_k, work.first_key ^ Row::Bc, work.seqlen_k, work.head_k,
                      work.batch);
    }
    keys_.advance();
  }

  /// dS of the queries of the other block's part of dQ, in pages. Where that has one stage for it,
  /// it is free when all who compute dQ, here and there, are done with what was sent before; where
  /// it has two, dS is not stored here before there is room.
  DEVICE void send() {
    using Tile = typename F::STile;
    using Part = typename F::PeerSTile;
    if constexpr (Row::peer_stages == 1) {
      const Ring<2> last{ds_.count - 1};
      mbarrier_wait(barriers_.ds_empty(last.stage()), last.phase());
    }
    mbarrier_wait(barriers_.ds_full(ds_.stage()), ds_.phase());
    if (lane_index() == 0) {
      const int peer = F::rank() ^ 1;
      const uint32_t here = shared_ + F::at.ds + ds_.stage() * Tile::bytes +
                            (F::split_queries ? peer * Part::page_bytes : 0);
      const uint32_t there = shared_of(peer, shared_ + F::at.peer_ds + stage() * Part::bytes);
      const uint32_t full_there = shared_of(peer, barriers_.peer_ds_full(stage()));
      cluster_arrive_expect(full_there, Part::bytes);
      UNROLL
      for (int page = 0; page < Part::pages; ++page)
        cluster_copy(there + page * Part::page_bytes, here + page * Tile::page_bytes,
                     Part::page_bytes, full_there);
    }
    ds_.advance();
  }
  /// Of the other block, that dS is sent to.
  DEVICE int stage() const { return Row::peer_stages == 2 ? ds_.stage() : 0; }

  const BackwardParams& p_;
  const char* memory_;
  uint32_t shared_;
  BackwardBarriers<Row> barriers_;
  Ring<2> ds_;
  Ring<2> turn_;
  Ring<1> keys_; // of the other block
};

} // namespace anyflash::sm90
