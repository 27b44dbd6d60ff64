// cuda/ptx/cluster.h in software.
#pragma once

#include "cuda/ptx/device.h"

namespace anyflash {

inline uint32_t shared_of(int rank, uint32_t address) {
  return soft_gpu::cluster_address(rank, address);
}
inline void cluster_sync() { soft_gpu::cluster_barrier(); }
inline void cluster_store(uint32_t there, uint32_t value) { soft_gpu::cluster_store(there, value); }
inline void cluster_arrive(uint32_t there) { soft_gpu::cluster_arrive(there, 0); }
inline void cluster_arrive_after_writes(uint32_t there) { soft_gpu::cluster_arrive(there, 0); }
inline void cluster_arrive_expect(uint32_t there, uint32_t bytes) {
  soft_gpu::cluster_arrive(there, bytes);
}
inline void cluster_wait_for_writes(uint32_t barrier, uint32_t parity) {
  soft_gpu::mbarrier_wait(barrier, parity);
}
inline void cluster_copy(uint32_t there, uint32_t shared, uint32_t bytes, uint32_t barrier_there) {
  soft_gpu::cluster_copy(there, shared, bytes, barrier_there);
}

} // namespace anyflash
