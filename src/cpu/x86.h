// What an x86-64 processor and its operating system offer.
#pragma once

namespace anyflash::cpu {

/// AVX2, FMA and F16C, and the operating system saves 256-bit registers.
bool x86_has_avx2();

/// AVX-512 F, BW, DQ and VL besides, and the operating system saves 512-bit registers.
bool x86_has_avx512();

} // namespace anyflash::cpu
