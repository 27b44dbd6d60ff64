// Thread blocks of a cluster run side by side and reach into each other's shared memory. PTX ISA,
// "mapa", "barrier.cluster", "mbarrier", "cp.async.bulk". sm_90+.
#pragma once

#include "cuda/ptx/device.h"

namespace anyflash {

/// Where block `rank` of the cluster has what this block has at `address`; for the functions below.
DEVICE uint32_t shared_of(int rank, uint32_t address) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

/// Waits for all threads of all blocks of the cluster but those that are over.
DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\n"
               "barrier.cluster.wait.acquire;" ::
                   : "memory");
}

DEVICE void cluster_store(uint32_t there, uint32_t value) {
  asm volatile("st.shared::cluster.b32 [%0], %1;" ::"r"(there), "r"(value) : "memory");
}

/// One arrival at a barrier of any block: for who waits there, products of this warpgroup that are
/// over have read what they read. Nothing is said of what this thread wrote.
DEVICE void cluster_arrive(uint32_t there) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(there) : "memory");
}

/// One arrival, after what this thread wrote, wherever that is: takes as long as that does.
DEVICE void cluster_arrive_after_writes(uint32_t there) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(there)
               : "memory");
}

/// One arrival, and the phase also waits for `bytes` bytes of copies; before these.
DEVICE void cluster_arrive_expect(uint32_t there, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cluster.b64 _, [%0], %1;" ::"r"(there), "r"(bytes)
               : "memory");
}

/// mbarrier_wait, and what threads of other blocks wrote before they arrived is there.
DEVICE void cluster_wait_for_writes(uint32_t barrier, uint32_t parity) {
  asm volatile("{\n"
               ".reg .pred over;\n"
               "again:\n"
               "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%0], %1;\n"
               "@over bra done;\n"
               "bra again;\n"
               "done:\n"
               "}" ::"r"(barrier),
               "r"(parity)
               : "memory");
}

/// Copies a run of bytes, a multiple of 16, from this block's shared memory to another's, where it
/// counts on a barrier of that block. By the copy engine; by one thread.
DEVICE void cluster_copy(uint32_t there, uint32_t shared, uint32_t bytes, uint32_t barrier_there) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], "
               "%2, [%3];" ::"r"(there),
               "r"(shared), "r"(bytes), "r"(barrier_there)
               : "memory");
}

} // namespace anyflash
