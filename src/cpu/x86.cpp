// CPUID says what the processor has; XGETBV says which registers the operating system saves.
#include "cpu/x86.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#include <immintrin.h>

#include <cstdint>

namespace anyflash::cpu {
namespace {

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf) {
  Registers r;
  if (leaf <= __get_cpuid_max(0, nullptr)) __cpuid_count(leaf, 0, r.a, r.b, r.c, r.d);
  return r;
}

bool has(uint32_t word, int bit) { return word >> bit & 1; }

/// Register sets that the operating system saves (XCR0); 0 without XSAVE.
__attribute__((target("xsave"))) uint32_t saved_registers() {
  return has(cpuid(1).c, 27) ? static_cast<uint32_t>(_xgetbv(0)) : 0;
}

bool find_avx2() {
  const uint32_t ymm = 0x6; // SSE and AVX state
  const Registers one = cpuid(1), seven = cpuid(7);
  const bool avx = has(one.c, 28), fma = has(one.c, 12), f16c = has(one.c, 29);
  return avx && fma && f16c && has(seven.b, 5) && (saved_registers() & ymm) == ymm;
}

bool find_avx512() {
  const uint32_t zmm = 0xe6; // and the mask registers, the upper halves, the upper 16 registers
  const Registers seven = cpuid(7);
  const bool f = has(seven.b, 16), dq = has(seven.b, 17), bw = has(seven.b, 30),
             vl = has(seven.b, 31);
  return find_avx2() && f && dq && bw && vl && (saved_registers() & zmm) == zmm;
}

} // namespace

bool x86_has_avx2() {
  static const bool found = find_avx2();
  return found;
}

bool x86_has_avx512() {
  static const bool found = find_avx512();
  return found;
}

} // namespace anyflash::cpu
#endif
