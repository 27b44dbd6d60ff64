// dQ, dK, dV with wgmma: Hopper. FlashAttention-2, Algorithm 2, with loading and computing warps
// apart as in FlashAttention-3. Schedule, budgets, experiments: docs/kernels/sm90_backward.md.
#pragma once

#include "cuda/sm90/backward/consumer_by_columns.h"
#include "cuda/sm90/backward/consumer_by_keys.h"

namespace anyflash::sm90 {

/// Key blocks, one after the other.
template <class Row>
DEVICE void backward(const BackwardParams& p) {
  using F = Backward<Row>;
  extern __shared__ __align__(1024) char shared_memory[];
  if (threadIdx.x == 0)
    BackwardBarriers<Row>{shared_address(shared_memory) + F::at.barriers}.init(p.turns);
  __syncthreads();
  wait_for_kernel_before();
  let_next_kernel_start();
  const int warpgroup = warpgroup_index();
  if (warpgroup == 0) {
    fewer_registers<24>();
    const int warp = warp_index();
    if (warp < F::consumers) {
      if (p.turns) watch_turns<Row>(p, warp, shared_memory);
    } else if (lane_index() == 0) {
      if (warp == F::consumers)
        Scheduler<Row>(p, shared_memory).run();
      else
        Loader<Row>(p, shared_memory).run();
    }
  } else {
    more_registers<240>();
    const int consumer = warpgroup - 1;
    if constexpr (F::by_keys) {
      ConsumerByKeys<Row>(p, shared_memory, consumer).run();
    } else if constexpr (Row::d == 2 * F::q_columns) {
      ConsumerByColumns<Row, F::q_columns>(p, shared_memory, consumer).run();
    } else {
      if (consumer == 0)
        ConsumerByColumns<Row, F::q_columns>(p, shared_memory, 0).run();
      else
        ConsumerByColumns<Row, Row::d - F::q_columns>(p, shared_memory, 1).run();
    }
  }
}

} // namespace anyflash::sm90
