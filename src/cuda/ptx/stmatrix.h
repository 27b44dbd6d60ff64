// Matrix fragments to shared memory, four 8x8 tiles of 16-bit values a warp. PTX ISA, "stmatrix".
// sm_90+.
#pragma once

#include "cuda/ptx/device.h"

namespace anyflash {

#if __CUDA_ARCH__ >= 900
constexpr bool has_stmatrix = true;
#else
constexpr bool has_stmatrix = false;
#endif

/// Lane i gives the address of row i % 8 of tile i / 8.
DEVICE void stmatrix_x4(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

/// The same, each tile transposed on the way.
DEVICE void stmatrix_x4_trans(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2,
                              uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

} // namespace anyflash
