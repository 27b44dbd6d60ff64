// cuda/ptx/mbarrier.h in software.
#pragma once

#include "cuda/ptx/device.h"

namespace anyflash {

inline void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  soft_gpu::mbarrier_init(barrier, arrivals);
}
inline void fence_barrier_init() {}
inline void mbarrier_arrive(uint32_t barrier) { soft_gpu::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_after(uint32_t, uint32_t barrier) { mbarrier_arrive(barrier); }
inline void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  soft_gpu::mbarrier_arrive(barrier, bytes);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  soft_gpu::mbarrier_wait(barrier, parity);
}
inline void named_barrier_sync(int id, int threads) { soft_gpu::block_barrier(id, threads, true); }
inline void named_barrier_arrive(int id, int threads) {
  soft_gpu::block_barrier(id, threads, false);
}

} // namespace anyflash
