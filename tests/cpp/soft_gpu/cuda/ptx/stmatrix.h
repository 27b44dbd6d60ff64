// cuda/ptx/stmatrix.h in software.
#pragma once

#include "cuda/ptx/ldmatrix.h"

namespace anyflash {

constexpr bool has_stmatrix = __CUDA_ARCH__ >= 900;

inline void stmatrix_x4(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  soft::MatrixAccess mine{address, {r0, r1, r2, r3}};
  soft_gpu::warp_together(soft::access_matrix<false, true>, &mine);
}
inline void stmatrix_x4_trans(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2,
                              uint32_t r3) {
  soft::MatrixAccess mine{address, {r0, r1, r2, r3}};
  soft_gpu::warp_together(soft::access_matrix<true, true>, &mine);
}

} // namespace anyflash
