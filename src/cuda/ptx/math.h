// Approximate functions and conversions. PTX ISA, "Floating point instructions" and "cvt".
#pragma once

#include "cuda/ptx/types.h"

namespace anyflash {

/// 2^x, relative error 2^-22; results below 2^-126 are 0. exp2(-inf) = 0.
DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// tanh(x), absolute error 2^-11. sm_75+.
DEVICE float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Two floats rounded to T, `low` in the low half.
template <class T>
DEVICE uint32_t pack(float low, float high) {
  uint32_t pair;
  if constexpr (same<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

} // namespace anyflash
