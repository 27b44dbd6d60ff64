// What every device header needs: function markers and the lane of this thread. NVRTC has no
// <cstdint>.
#pragma once

#include "cuda/params.h"

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")

namespace anyflash {

constexpr int warp_size = 32;

DEVICE int lane_index() { return threadIdx.x % warp_size; }

/// The index of this warp in its block. It is the same in all lanes; the shuffle tells the compiler
/// so, which keeps addresses that depend on it in uniform registers.
DEVICE int warp_index() { return __shfl_sync(0xffffffff, threadIdx.x / warp_size, 0); }

DEVICE float infinity() { return __int_as_float(0x7f800000); }

/// x, which is not negative, has to be known here: an instruction that never runs asks for it.
DEVICE void needed_if_negative(uint32_t x) {
  asm volatile("{.reg .pred never; setp.lt.s32 never, %0, 0; @never nanosleep.u32 0;}" ::"r"(x)
               : "memory");
}

/// x, but the compiler does not know: what is computed from it is computed again, instead of being
/// kept in registers from an earlier use. No instruction.
DEVICE uint32_t recomputed(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}
DEVICE int64_t recomputed_64(int64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}

} // namespace anyflash
