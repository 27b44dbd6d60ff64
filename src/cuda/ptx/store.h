// Stores to global memory. PTX ISA, "st".
#pragma once

#include "cuda/ptx/device.h"

namespace anyflash {

/// 16 bytes by one instruction; `to` on 16 bytes. The compiler makes four of a conditional one.
DEVICE void store_16(void* to, uint4 x) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
}

} // namespace anyflash
