// Additions to and flags in global memory. PTX ISA, "red" and "ld".
#pragma once

#include "cuda/ptx/device.h"

namespace anyflash {

/// True where one instruction adds four neighbouring floats.
#if __CUDA_ARCH__ >= 900
constexpr bool has_vector_red = true;
#else
constexpr bool has_vector_red = false;
#endif

DEVICE void red_add(float* target, float x) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(target), "f"(x) : "memory");
}

/// target[0..3] += x; target on 16 bytes. sm_90+.
DEVICE void red_add_4(float* target, const float (&x)[4]) {
  asm volatile("red.global.add.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(target), "f"(x[0]), "f"(x[1]),
               "f"(x[2]), "f"(x[3])
               : "memory");
}

DEVICE int load_relaxed(const int32_t* flag) {
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

/// What was written before the release that this sees is seen by this thread afterwards.
DEVICE int load_acquire(const int32_t* flag) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

/// *flag += 1, after everything that this thread wrote or has seen written.
DEVICE void add_release(int32_t* flag) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(flag) : "memory");
}

} // namespace anyflash
