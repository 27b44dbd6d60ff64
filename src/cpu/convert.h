// 16-bit floating point in storage, and its conversions: to nearest, ties to even; NaN stays NaN
// (made quiet); subnormals and infinities exact.
#pragma once

#include <cstdint>

namespace anyflash::cpu {

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// Static, not inline, and nothing inline is called: files compiled for different instruction sets
// include this header, and the linker must not let one of them provide the code of all.
// NOLINTBEGIN(misc-definitions-in-headers)

[[maybe_unused]] static float to_float(BFloat16 x) {
  return __builtin_bit_cast(float, uint32_t{x.bits} << 16);
}

[[maybe_unused]] static float to_float(Float16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) // infinity, NaN
    return __builtin_bit_cast(float, sign | 0x7f800000u | (magnitude & 0x3ffu) << 13 |
                                         (magnitude > 0x7c00u ? 0x400000u : 0u));
  if (magnitude >= 0x400u) // normal: the exponent's bias grows from 15 to 127
    return __builtin_bit_cast(float, sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return __builtin_bit_cast(float, sign | __builtin_bit_cast(uint32_t, subnormal));
}

[[maybe_unused]] static float to_float(float x) { return x; }

[[maybe_unused]] static BFloat16 to_bfloat16(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

[[maybe_unused]] static Float16 to_float16(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  } else if (magnitude >= 0x47800000u) { // 2^16 and above, infinity
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) { // normal; a carry may make it infinity, rightly
    half = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  } else { // subnormal: adding 0.5 makes the hardware round at 2^-24
    half = __builtin_bit_cast(uint32_t, __builtin_bit_cast(float, magnitude) + 0.5f) - 0x3f000000u;
  }
  return {static_cast<uint16_t>(sign | half)};
}

/// The float that rounds to the same 16-bit number as x does: truncated, with the lowest bit set if
/// anything was lost ("round to odd"), so that the second rounding sees on which side of a tie x
/// is.
[[maybe_unused]] static float to_odd_float(double x) {
  const float nearest = static_cast<float>(x);
  if (static_cast<double>(nearest) == x || x != x) return nearest;
  uint32_t bits = __builtin_bit_cast(uint32_t, nearest);
  const double magnitude = x < 0 ? -x : x;
  const float nearest_magnitude = __builtin_bit_cast(float, bits & 0x7fffffffu);
  if (static_cast<double>(nearest_magnitude) > magnitude) --bits;
  return __builtin_bit_cast(float, bits | 1u);
}

/// x in the type of `result`, rounded once.
[[maybe_unused]] static void store(double x, Float16& result) {
  result = to_float16(to_odd_float(x));
}
[[maybe_unused]] static void store(double x, BFloat16& result) {
  result = to_bfloat16(to_odd_float(x));
}
[[maybe_unused]] static void store(double x, float& result) { result = static_cast<float>(x); }
[[maybe_unused]] static void store(double x, double& result) { result = x; }
// NOLINTEND(misc-definitions-in-headers)

} // namespace anyflash::cpu
