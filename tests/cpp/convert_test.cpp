// 16-bit conversions against exact arithmetic over every 16-bit number.
#include "cpu/convert.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>

namespace anyflash::cpu {
namespace {

bool is_nan(Float16 x) { return (x.bits & 0x7fff) > 0x7c00; }
bool is_nan(BFloat16 x) { return (x.bits & 0x7fff) > 0x7f80; }

/// The value of a 16-bit number from its fields.
double value_of(uint16_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double magnitude =
      exponent ? std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)
               : std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return bits & 0x8000 ? -magnitude : magnitude;
}

template <class T>
T from_double(double x) {
  T result;
  store(x, result);
  return result;
}

template <class T>
struct Format;
template <>
struct Format<Float16> {
  static constexpr int exponent_bits = 5;
  static constexpr uint16_t infinity = 0x7c00;
  static Float16 from_float(float x) { return to_float16(x); }
};
template <>
struct Format<BFloat16> {
  static constexpr int exponent_bits = 8;
  static constexpr uint16_t infinity = 0x7f80;
  static BFloat16 from_float(float x) { return to_bfloat16(x); }
};

template <class T>
struct Convert : testing::Test {};
using Types = testing::Types<Float16, BFloat16>;
TYPED_TEST_SUITE(Convert, Types);

TYPED_TEST(Convert, EveryNumberSurvivesTheRoundTrip) {
  using F = Format<TypeParam>;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const TypeParam x{static_cast<uint16_t>(bits)};
    const float wide = to_float(x);
    if (is_nan(x)) {
      EXPECT_TRUE(std::isnan(wide));
      EXPECT_TRUE(is_nan(F::from_float(wide)));
      EXPECT_TRUE(is_nan(from_double<TypeParam>(wide)));
      continue;
    }
    if ((bits & 0x7fff) == F::infinity) {
      EXPECT_EQ(wide, bits & 0x8000 ? -INFINITY : INFINITY);
    } else {
      EXPECT_EQ(wide, value_of(x.bits, F::exponent_bits));
    }
    EXPECT_EQ(F::from_float(wide).bits, x.bits);
    EXPECT_EQ(from_double<TypeParam>(wide).bits, x.bits);
  }
}

TYPED_TEST(Convert, RoundsToNearestTiesToEven) {
  using F = Format<TypeParam>;
  for (uint16_t bits = 0; bits + 1 < F::infinity; ++bits) {
    const double low = value_of(bits, F::exponent_bits),
                 high = value_of(bits + 1, F::exponent_bits);
    const double tie = (low + high) / 2;
    const uint16_t even = bits & 1 ? bits + 1 : bits;
    const float tie_float = static_cast<float>(tie);
    ASSERT_EQ(tie_float, tie) << "ties are exact in float";
    EXPECT_EQ(F::from_float(tie_float).bits, even);
    EXPECT_EQ(F::from_float(-tie_float).bits, even | 0x8000);
    EXPECT_EQ(F::from_float(std::nextafter(tie_float, 0.0f)).bits, bits);
    EXPECT_EQ(F::from_float(std::nextafter(tie_float, INFINITY)).bits, bits + 1);
    // A double closer to the tie than any float must not be rounded twice.
    EXPECT_EQ(from_double<TypeParam>(tie).bits, even);
    EXPECT_EQ(from_double<TypeParam>(std::nextafter(tie, 0.0)).bits, bits);
    EXPECT_EQ(from_double<TypeParam>(-std::nextafter(tie, INFINITY)).bits, (bits + 1) | 0x8000);
  }
}

TYPED_TEST(Convert, OverflowIsInfinity) {
  using F = Format<TypeParam>;
  const uint16_t largest = F::infinity - 1;
  const double step = value_of(largest, F::exponent_bits) - value_of(largest - 1, F::exponent_bits);
  const double limit = value_of(largest, F::exponent_bits) + step / 2;
  EXPECT_EQ(from_double<TypeParam>(limit).bits, F::infinity);
  EXPECT_EQ(from_double<TypeParam>(std::nextafter(limit, 0.0)).bits, largest);
  EXPECT_EQ(from_double<TypeParam>(1e300).bits, F::infinity);
  EXPECT_EQ(from_double<TypeParam>(-1e300).bits, F::infinity | 0x8000);
  EXPECT_EQ(F::from_float(std::numeric_limits<float>::max()).bits, F::infinity);
  EXPECT_TRUE(is_nan(from_double<TypeParam>(NAN)));
}

} // namespace
} // namespace anyflash::cpu
