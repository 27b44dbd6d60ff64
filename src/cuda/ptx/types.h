// Element types as tags: 16 bits of storage, arithmetic only through PTX.
#pragma once

#include "cuda/ptx/device.h"

namespace anyflash {

struct fp16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

} // namespace anyflash
