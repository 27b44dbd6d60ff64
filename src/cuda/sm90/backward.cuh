// dQ, dK, dV with wgmma: Hopper. FlashAttention-2, Algorithm 2, with loading and computing warps
// apart as in FlashAttention-3. Schedule, budgets, experiments: docs/kernels/sm90_backward.md.
#pragma once

#include "cuda/sm90/backward/consumer_by_columns.h"
#include "cuda/sm90/backward/consumer_by_keys.h"
#include "cuda/sm90/backward/consumer_in_pair.h"
#include "cuda/sm90/backward/consumer_of_keys.h"
#include "cuda/sm90/backward/consumer_of_queries.h"
#include "cuda/sm90/backward/queries_in_pair.h"
#include "cuda/sm90/backward/scores_in_pair.h"
#include "cuda/sm90/backward/sender.h"
#include "cuda/sm90/backward/zero_sums.h"

namespace anyflash::sm90 {

/// The warpgroup at `index` of those that share a block's keys, or columns.
template <class Row>
DEVICE void consume(const BackwardParams& p, char* shared_memory, int index) {
  using F = Backward<Row>;
  constexpr int dk = Row::d - F::k_columns, dv = Row::dv - F::v_columns; // of the second
  constexpr bool alike = dk == F::k_columns && dv == F::v_columns;
  if constexpr (F::by_keys && F::apart) {
    ConsumerOfKeys<Row>(p, shared_memory, index).run();
  } else if constexpr (F::by_keys) {
    ConsumerByKeys<Row>(p, shared_memory, index).run();
  } else if constexpr (F::pair) {
    if (alike || index == 0)
      ConsumerInPair<Row, F::k_columns, F::v_columns, F::q_columns - 64>(p, shared_memory, index)
          .run();
    else
      ConsumerInPair<Row, dk, dv, 64>(p, shared_memory, index).run();
  } else {
    if (alike || index == 0)
      ConsumerByColumns<Row, F::k_columns>(p, shared_memory, index).run();
    else
      ConsumerByColumns<Row, dk>(p, shared_memory, index).run();
  }
}

/// The warps that move data and hand out work.
template <class Row>
DEVICE void serve(const BackwardParams& p, char* shared_memory) {
  using F = Backward<Row>;
  const int warp = warp_index();
  if (warp == 0) {
    if (p.turns) wait_for_turns<Row>(p, shared_memory);
    if (p.zeroed) zero_sums_ahead<Row>(p, shared_memory);
  } else if (warp == 1) {
    if constexpr (F::pair)
      Sender<Row>(p, shared_memory).run();
    else if (p.turns)
      pass_turns_on<Row>(p, shared_memory);
  } else if (lane_index() == 0) {
    if (warp == 2)
      Scheduler<Row>(p, shared_memory).run();
    else
      Loader<Row>(p, shared_memory).run();
  }
}

/// Key blocks, one after the other.
template <class Row>
DEVICE void backward(const BackwardParams& p) {
  using F = Backward<Row>;
  extern __shared__ __align__(1024) char shared_memory[];
  if (threadIdx.x == 0) {
    const int watchers = p.turns ? 2 : (p.zeroed ? 1 : 0) + F::pair;
    BackwardBarriers<Row>{shared_address(shared_memory) + F::at.barriers}.init(watchers);
  }
  zero_missing_pages<Row>(p, shared_address(shared_memory));
  if constexpr (F::pair)
    cluster_sync();
  else
    __syncthreads();
  wait_for_kernel_before();
  let_next_kernel_start();
  const int warpgroup = warpgroup_index();
  if (warpgroup == 0) {
    fewer_registers<24>();
    serve<Row>(p, shared_memory);
  } else if (warpgroup <= F::consumers) {
    more_registers<F::consumer_registers>();
    consume<Row>(p, shared_memory, warpgroup - 1);
  } else if constexpr (F::apart) {
    fewer_registers<F::apart_registers>();
    if constexpr (F::by_keys && F::pair)
      QueriesInPair<Row>(p, shared_memory).run();
    else if constexpr (F::by_keys)
      ConsumerOfQueries<Row>(p, shared_memory).run();
    else
      ScoresInPair<Row>(p, shared_memory).run();
  }
  if constexpr (F::pair) cluster_sync(); // the other block needs this one's barriers
}

} // namespace anyflash::sm90
