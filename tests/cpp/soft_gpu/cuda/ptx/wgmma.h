// cuda/ptx/wgmma.h in software.
#pragma once

#include "cuda/ptx/types.h"

namespace anyflash {

inline void wgmma_fence() {}
inline void wgmma_commit() { soft_gpu::products_commit(); }
template <int pending>
void wgmma_wait() {
  soft_gpu::products_wait(pending);
}
template <class T, int n>
void keep(T (&)[n]) {}

enum class Major { k, mn };

template <class T, Major a_major, Major b_major, int r>
void wgmma(float (&d)[r], uint64_t a, uint64_t b, bool accumulate) {
  soft_gpu::Product mine{
      d,         nullptr, a, b, 2 * r, a_major == Major::mn, b_major == Major::mn, same<T, bf16>,
      accumulate};
  soft_gpu::start_product(mine);
}
template <class T, Major b_major, int r>
void wgmma(float (&d)[r], const uint32_t* a, uint64_t b, bool accumulate) {
  soft_gpu::Product mine{d, a, 0, b, 2 * r, false, b_major == Major::mn, same<T, bf16>, accumulate};
  soft_gpu::start_product(mine);
}

} // namespace anyflash
