// cuda/ptx/math.h in software.
#pragma once

#include "cuda/ptx/types.h"

namespace anyflash {

constexpr float ln_2 = 0.6931471805599453f;
constexpr float log2_e = 1.4426950408889634f;

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0 : y; // NaN stays
}
inline float tanh_approx(float x) { return std::tanh(x); }

template <class T>
uint32_t pack(float low, float high) {
  return soft_gpu::to_half(low, same<T, bf16>) | uint32_t{soft_gpu::to_half(high, same<T, bf16>)}
                                                     << 16;
}
template <class T>
float2 unpack(uint32_t pair) {
  return {soft_gpu::to_float(static_cast<uint16_t>(pair), same<T, bf16>),
          soft_gpu::to_float(static_cast<uint16_t>(pair >> 16), same<T, bf16>)};
}
template <class T>
float dot(uint32_t a, uint32_t b) {
  const float2 x = unpack<T>(a), y = unpack<T>(b);
  return x.x * y.x + x.y * y.y;
}

} // namespace anyflash
