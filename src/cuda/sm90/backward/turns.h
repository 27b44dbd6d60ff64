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

/// How many key blocks have added to the queries that `at` stands at; of a pair, each to its half
/// of the columns, in any order.
template <class Row>
DEVICE int32_t* turn_of(const BackwardParams& p, const volatile Work& work, const QueryCursor& at) {
  return p.turns + at.first_row(work, p.padded_rows, Row::Br) / Row::Br;
}

template <class Row>
DEVICE void describe_turn(const BackwardParams& p, const volatile Work& work, const QueryCursor& at,
                          bool first, bool last, char* shared_memory, int stage) {
  volatile Turn& turn = *reinterpret_cast<volatile Turn*>(shared_memory + Backward<Row>::at.turns +
                                                          stage * backward_turn_bytes);
  turn.first = first;
  turn.last = last;
  if (!last) return;
  const int query = at.i * Row::Br;
  const int32_t* const lengths = p.cu_seqlens_q;
  const int sequence = work.sequence;
  const int rows = lengths ? lengths[sequence + 1] - lengths[sequence] : p.seqlen_q;
  turn.rows = rows - query; // those that are not used get zeros, too
  turn.dq_offset = work.batch * p.dq_strides.batch +
                   (int64_t{work.first_q} + query) * p.dq_strides.row +
                   (work.head + at.head) * p.dq_strides.head;
}

/// By one warp: tells the adders that it is their turn, up to a block of queries before they come.
template <class Row>
DEVICE void wait_for_turns(const BackwardParams& p, char* shared_memory) {
  using F = Backward<Row>;
  const BackwardBarriers<Row> barriers{shared_address(shared_memory) + F::at.barriers};
  Ring<2> stage;
  for_each_work<Row>(p, shared_memory, [&](const volatile Work& work) {
    const volatile auto& queries = added_queries<Row>(work);
    QueryCursor at(queries);
    ROLLED
    for (int left = queries.steps; left > 0; --left) {
      const KeyBlocks keys = key_blocks(at.i * Row::Br, Row::Br, F::Keys::Bc, work.seqlen_q,
                                        work.seqlen_k, p.window_left, p.window_right);
      const int mine = work.first_key / F::Keys::Bc - keys.begin;
      const bool last = mine + 1 == keys.end - keys.begin;
      mbarrier_wait(barriers.passed(stage.stage()), stage.phase() ^ 1);
      if (lane_index() == 0) {
        describe_turn<Row>(p, work, at, mine == 0, last, shared_memory, stage.stage());
        const int32_t* const turn = turn_of<Row>(p, work, at);
        while (load_acquire(turn) / Row::cluster != mine) {
        }
        mbarrier_arrive(barriers.turn(stage.stage()));
      }
      __syncwarp();
      stage.advance();
      at.advance(p);
    }
  });
}

/// By one warp: makes what the adders added visible to the next key block, and passes the turn on.
template <class Row>
DEVICE void pass_turn_on(const BackwardParams& p, const BackwardBarriers<Row>& barriers,
                         const volatile Work& work, QueryCursor& at, Ring<2>& stage) {
  mbarrier_wait(barriers.added(stage.stage()), stage.phase());
  if (lane_index() == 0) {
    mbarrier_arrive(barriers.passed(stage.stage()));
    add_release(turn_of<Row>(p, work, at));
  }
  stage.advance();
  at.advance(p);
}

/// By one warp, until there is no more work.
template <class Row>
DEVICE void pass_turns_on(const BackwardParams& p, const char* shared_memory) {
  const BackwardBarriers<Row> barriers{shared_address(shared_memory) + Backward<Row>::at.barriers};
  Ring<2> stage;
  for_each_work<Row>(p, shared_memory, [&](const volatile Work& work) {
    QueryCursor at(work);
    ROLLED
    for (int left = work.steps; left > 0; --left) pass_turn_on<Row>(p, barriers, work, at, stage);
  });
}

} // namespace anyflash::sm90
