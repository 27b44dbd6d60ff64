// Shared memory to matrix fragments, four 8x8 tiles of 16-bit values a warp. PTX ISA, "ldmatrix".
// sm_75+.
#pragma once

#include "cuda/ptx/device.h"

namespace anyflash {

/// Address of generic pointer in the shared window, as PTX instructions take it.
DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// Lane i gives the address of row i % 8 of tile i / 8.
DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

/// The same, each tile transposed on the way.
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

} // namespace anyflash
