// Approximate functions and conversions. PTX ISA, "Floating point instructions" and "cvt".
#pragma once

#include "cuda/ptx/types.h"

namespace anyflash {

constexpr float ln_2 = 0.6931471805599453f;
constexpr float log2_e = 1.4426950408889634f;

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

/// The two values of a pair, as pack() made it.
template <class T>
DEVICE float2 unpack(uint32_t pair) {
  if constexpr (same<T, bf16>) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000)};
  } else {
    float low, high;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(low), "=f"(high)
        : "r"(pair));
    return {low, high};
  }
}

/// Sum of the products of two pairs.
template <class T>
DEVICE float dot(uint32_t a, uint32_t b) {
  const float2 x = unpack<T>(a), y = unpack<T>(b);
  return x.x * y.x + x.y * y.y;
}

} // namespace anyflash
