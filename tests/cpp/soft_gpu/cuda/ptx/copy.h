// cuda/ptx/copy.h in software.
#pragma once

#include "cuda/ptx/device.h"

namespace anyflash {

inline void cp_async_16(uint32_t shared, const void* global, bool valid) {
  soft_gpu::copy_async(shared, global, valid);
}
inline void cp_async_commit() { soft_gpu::copy_async_commit(); }
template <int pending>
void cp_async_wait() {
  soft_gpu::copy_async_wait(pending);
}

template <class T>
void st_shared(uint32_t address, const T& value) {
  std::memcpy(soft_gpu::shared_target(address, sizeof value, sizeof value), &value, sizeof value);
}
template <class T>
T ld_shared_value(uint32_t address) {
  T value;
  std::memcpy(&value, soft_gpu::shared_place(address, sizeof value, sizeof value), sizeof value);
  return value;
}
inline uint32_t ld_shared(uint32_t address) { return ld_shared_value<uint32_t>(address); }
inline uint4 ld_shared_16(uint32_t address) { return ld_shared_value<uint4>(address); }

} // namespace anyflash
