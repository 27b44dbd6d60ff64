// One arrival of a warp at a barrier in shared memory.
#pragma once

#include "cuda/ptx/mbarrier.h"

namespace anyflash::sm90 {

/// What a barrier counts for a warp. racecheck follows arrivals thread by thread, and takes what
/// the other lanes did before __syncwarp() for unordered; so it is also given kernels whose every
/// thread arrives (tests/README.md, "What racecheck reports").
#ifdef ANYFLASH_EVERY_THREAD_ARRIVES
constexpr int warp_arrivals = warp_size;
#else
constexpr int warp_arrivals = 1;
#endif
constexpr int warpgroup_arrivals = 4 * warp_arrivals;

/// By all lanes of a warp, after what each of them did before.
DEVICE void warp_arrive(uint32_t barrier) {
  __syncwarp();
  if (warp_arrivals == warp_size || lane_index() == 0) mbarrier_arrive(barrier);
}

/// The same, where x is all that they have loaded from what the barrier guards, or depends on it,
/// and has perhaps not arrived.
DEVICE void warp_arrive_after(uint32_t x, uint32_t barrier) {
  __syncwarp();
  if (warp_arrivals == warp_size || lane_index() == 0) mbarrier_arrive_after(x, barrier);
}

} // namespace anyflash::sm90
