// Barriers in shared memory that count threads and bytes, and the named barriers of a block. PTX
// ISA, "mbarrier" and "bar". sm_90+.
#pragma once

#include "cuda/ptx/device.h"

namespace anyflash {

/// A barrier of `arrivals` arrivals a phase. By one thread, before fence_barrier_init and a barrier
/// of the block.
DEVICE void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

/// Makes initialised barriers visible to the copy engine.
DEVICE void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

/// One arrival, after what this thread did before.
DEVICE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// One arrival, after x has been loaded. Seen on an H100: an arrival overtakes loads from shared
/// memory that this thread has started, as long as no instruction has waited for their results;
/// who waits for the barrier may then overwrite what is still to be read. So the address is made
/// to depend on x: no number has 64 bits of 32.
DEVICE void mbarrier_arrive_after(uint32_t x, uint32_t barrier) {
  asm volatile("{\n"
               ".reg .b32 at;\n"
               "popc.b32 at, %0;\n"
               "shr.u32 at, at, 6;\n"
               "add.u32 at, at, %1;\n"
               "mbarrier.arrive.shared::cta.b64 _, [at];\n"
               "}" ::"r"(x),
               "r"(barrier)
               : "memory");
}

/// One arrival, and the phase also waits for `bytes` bytes of copies: whole boxes, with what lies
/// outside of the tensor. Before the copies.
DEVICE void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

/// Waits until the phase of this parity is over. On a fresh barrier parity 1 is over already.
DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile("{\n"
               ".reg .pred over;\n"
               "again:\n"
               "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
               "@over bra done;\n"
               "bra again;\n"
               "done:\n"
               "}" ::"r"(barrier),
               "r"(parity)
               : "memory");
}

/// Named barriers 1 to 15 (0 is __syncthreads): waits for `threads` threads, a multiple of 32,
/// those that only arrive among them.
DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

} // namespace anyflash
