// cuda/ptx/atomic.h in software.
#pragma once

#include <atomic>

#include "cuda/ptx/device.h"

namespace anyflash {

constexpr bool has_vector_red = __CUDA_ARCH__ >= 900;

inline void red_add(float* target, float x) {
  std::atomic_ref<float>(*target).fetch_add(x, std::memory_order_relaxed);
}

inline void red_add_4(float* target, const float (&x)[4]) {
  if (reinterpret_cast<uintptr_t>(target) % 16) soft_gpu::fault("red.v4 not on 16 bytes");
  for (int i = 0; i < 4; ++i) red_add(target + i, x[i]);
}

/// Who looks once will look again: others run in between.
inline int load_relaxed(const int32_t* flag) {
  soft_gpu::yield();
  return __atomic_load_n(flag, __ATOMIC_ACQUIRE);
}

inline int load_acquire(const int32_t* flag) { return load_relaxed(flag); }

inline void add_release(int32_t* flag) { __atomic_fetch_add(flag, 1, __ATOMIC_RELEASE); }

} // namespace anyflash
