// The order of additions to dQ in the sm90 backward, where it must be the same from run to run.
//
// Key blocks add to the sums of a block of queries in the order of their index; the first does not
// add but stores. One int a block of queries counts who has been there. Key blocks are handed out
// in that order, so that nobody waits for one that cannot run. Two warps that have nothing else to
// do see to it, so that neither the flag's way nor the fence is the adders' time: one looks for the
// turn while the adders are still at the block of queries before, the other passes it on behind
// them, while they are at the next.
#pragma once

#include "cuda/ptx/atomic.h"
#include "cuda/ptx/warpgroup.h"
#include "cuda/sm90/backward/stream.h"

namespace anyflash::sm90 {

/// How it becomes known that the adders are done with a block of queries: first to the warp that
/// passes the turn on, and from it to the one that looks for the next. So neither is a block ahead.
template <class Row>
struct AddersDone {
  static constexpr int to_passer = 1, to_looker = 2; // named barriers
  static constexpr int adders_and_warp = Backward<Row>::adders * warpgroup_size + warp_size;

  DEVICE static void say() { named_barrier_arrive(to_passer, adders_and_warp); }
  DEVICE static void wait_and_say() {
    __syncwarp(); // one lane may still be sending
    named_barrier_sync(to_passer, adders_and_warp);
    named_barrier_arrive(to_looker, 2 * warp_size);
  }
  DEVICE static void wait() { named_barrier_sync(to_looker, 2 * warp_size); }
};

/// How many key blocks have added to the queries that `at` stands at; of a pair, each to its half
/// of the columns, in any order.
template <class Row>
DEVICE int32_t* turn_of(const BackwardParams& p, const volatile Work& work, const QueryCursor& at) {
  return p.turns + at.first_row(work, p.padded_rows, Row::Br) / Row::Br;
}

/// By one warp: tells the adders that it is their turn, and which.
template <class Row>
DEVICE void wait_for_turns(const BackwardParams& p, const char* shared_memory) {
  using F = Backward<Row>;
  const BackwardBarriers<Row> barriers{shared_address(shared_memory) + F::at.barriers};
  for_each_work<Row>(p, shared_memory, [&](const volatile Work& work) {
    const volatile auto& queries = added_queries<Row>(work);
    QueryCursor at(queries);
    ROLLED
    for (int left = queries.steps; left > 0; --left) {
      const KeyBlocks keys = key_blocks(at.i * Row::Br, Row::Br, F::Keys::Bc, work.seqlen_q,
                                        work.seqlen_k, p.window_left, p.window_right);
      const int mine = work.first_key / F::Keys::Bc - keys.begin;
      const int32_t* const turn = turn_of<Row>(p, work, at);
      if (lane_index() == 0) {
        while (load_acquire(turn) / Row::cluster != mine) {
        }
      }
      __syncwarp();
      if (left < queries.steps) AddersDone<Row>::wait(); // the block of queries before
      if (lane_index() == 0) {
        st_shared(barriers.turn_of(), mine);
        mbarrier_arrive(barriers.turn());
      }
      at.advance(queries);
    }
    if (queries.steps) AddersDone<Row>::wait();
  });
}

/// By one warp: makes what the adders added visible to the next key block, and passes the turn on.
template <class Row>
DEVICE void pass_turn_on(const BackwardParams& p, const volatile Work& work, QueryCursor& at) {
  int32_t* const turn = turn_of<Row>(p, work, at);
  AddersDone<Row>::wait_and_say();
  if (lane_index() == 0) add_release(turn);
  at.advance(added_queries<Row>(work));
}

/// By one warp, until there is no more work.
template <class Row>
DEVICE void pass_turns_on(const BackwardParams& p, const char* shared_memory) {
  for_each_work<Row>(p, shared_memory, [&](const volatile Work& work) {
    QueryCursor at(work);
    ROLLED
    for (int left = work.steps; left > 0; --left) pass_turn_on<Row>(p, work, at);
  });
}

} // namespace anyflash::sm90
