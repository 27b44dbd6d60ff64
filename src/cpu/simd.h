// What every file compiled for an instruction set shares: macros, and functions of vectors.
//
// NOTE: all of it is in an unnamed namespace, and it calls nothing that is inline elsewhere (not
// even std::min): the linker keeps one copy of an inline function for the whole library, and that
// copy might be the one with instructions that this machine lacks. The same holds for tiles.h,
// panels.h, flash.h and flash_backward.h.
#pragma once

#include <cstdint>

#if defined(__clang__)
#define ANYFLASH_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define ANYFLASH_UNROLL _Pragma("GCC unroll 32")
#else
#define ANYFLASH_UNROLL
#endif
#if defined(__GNUC__)
#define ANYFLASH_INLINE __attribute__((always_inline)) inline
#define ANYFLASH_NOINLINE __attribute__((noinline))
#else
#define ANYFLASH_INLINE __forceinline
#define ANYFLASH_NOINLINE __declspec(noinline)
#endif

namespace anyflash::cpu {
namespace {

constexpr float log2_e = 1.44269504088896341f;
constexpr float ln_2 = 0.69314718055994531f;
constexpr float infinity = __builtin_huge_valf();

template <class T>
constexpr T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
constexpr T max(T a, T b) {
  return a > b ? a : b;
}
constexpr int round_up(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

/// 2^x for x <= 127; exactly 0 for x <= -127. x = i + f with |f| <= 1/2: 2^f by a polynomial whose
/// constant term is exactly 1, and i is added to the exponent. Relative error 8.2e-8 (fine)
/// or 3.7e-6 (enough where O has 16 bits). The polynomial goes by pairs (Estrin): its chain of
/// dependent instructions, not their number, is what limits the speed.
template <class Simd, bool fine>
ANYFLASH_INLINE typename Simd::Vector exp2(typename Simd::Vector x) {
  using Vector = typename Simd::Vector;
  const auto set = [](float constant) { return Simd::set(constant); };
  const Vector magic = set(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer
  x = Simd::max(set(-127.0f), x);        // in this order x86 keeps a NaN
  const Vector shifted = Simd::add(x, magic);
  const Vector f = Simd::sub(x, Simd::sub(shifted, magic));
  const Vector f2 = Simd::multiply(f, f);
  Vector p;
  if constexpr (fine) {
    const Vector low = Simd::multiply_add(f, set(2.40226528e-1f), set(6.93147215e-1f));
    const Vector middle = Simd::multiply_add(f, set(9.61769297e-3f), set(5.55031055e-2f));
    const Vector high = Simd::multiply_add(f, set(1.5594678e-4f), set(1.34066439e-3f));
    p = Simd::multiply_add(Simd::multiply_add(high, f2, middle), f2, low);
  } else {
    const Vector low = Simd::multiply_add(f, set(2.40207111e-1f), set(6.93113604e-1f));
    const Vector high = Simd::multiply_add(f, set(9.78291264e-3f), set(5.59768836e-2f));
    p = Simd::multiply_add(high, f2, low);
  }
  return Simd::add_exponent(Simd::multiply_add(p, f, set(1.0f)), shifted);
}

/// tanh(x) = 1 - 2 / (1 + e^(2x)), in e^(-2|x|) so that nothing overflows.
template <class Simd>
ANYFLASH_INLINE typename Simd::Vector tanh(typename Simd::Vector x) {
  using Vector = typename Simd::Vector;
  const Vector e = exp2<Simd, true>(Simd::multiply(Simd::abs(x), Simd::set(-2 * log2_e)));
  const Vector one = Simd::set(1.0f);
  const Vector t = Simd::divide(Simd::sub(one, e), Simd::add(one, e));
  return Simd::copy_sign(t, x);
}

} // namespace
} // namespace anyflash::cpu
