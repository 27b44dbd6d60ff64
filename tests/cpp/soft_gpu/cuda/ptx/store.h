// cuda/ptx/store.h in software.
#pragma once

#include "cuda/ptx/device.h"

namespace anyflash {

inline void store_16(void* to, uint4 x) {
  if (reinterpret_cast<uintptr_t>(to) % 16) soft_gpu::fault("st.v4 not on 16 bytes");
  *static_cast<uint4*>(to) = x;
}

} // namespace anyflash
