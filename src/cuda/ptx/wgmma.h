// Asynchronous matrix products of one warpgroup: d [64, N] += A [64, 16] B [16, N]. PTX ISA,
// "Asynchronous warpgroup level matrix multiply-accumulate". sm_90a.
//
// A is in registers (fragments as of mma, 16 rows a warp) or in shared memory, B in shared memory;
// operands there are given by descriptors (tile/matrix_descriptor.h). From wgmma_fence to the
// wgmma_wait that retires a product, its registers belong to the tensor cores: nothing may read,
// write or copy them. keep() on them before wgmma_fence, after wgmma_commit and after wgmma_wait
// holds the compiler to that; it is no instruction.
#pragma once

#include "cuda/ptx/types.h"

namespace anyflash {

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/// Waits until all but the newest `pending` groups of this warpgroup are done.
template <int pending>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

template <int n>
DEVICE void keep(float (&x)[n]) {
  UNROLL
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int n>
DEVICE void keep(uint32_t (&x)[n]) {
  UNROLL
  for (int i = 0; i < n; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

/// Which way a 16-bit operand in shared memory runs: along k (as stored [m or n, k]), or along m or
/// n (as stored [k, m or n]).
enum class Major { k, mn };

namespace detail {

/// One instruction shape for each N; specialised below.
template <int n>
struct Wgmma;

// The text of one instruction. An asm statement needs its operands spelled out, so lists of them
// are built from pieces: D<r> names accumulators %0 to %(r - 1), C<r> binds them.
#define ANYFLASH_D10(tens)                                                                         \
  "%" #tens "0,%" #tens "1,%" #tens "2,%" #tens "3,%" #tens "4,%" #tens "5,%" #tens "6,%" #tens    \
  "7,%" #tens "8,%" #tens "9"
#define ANYFLASH_D16 ANYFLASH_D10() ",%10,%11,%12,%13,%14,%15"
#define ANYFLASH_D30 ANYFLASH_D10() "," ANYFLASH_D10(1) "," ANYFLASH_D10(2)
#define ANYFLASH_D32 ANYFLASH_D30 ",%30,%31"
#define ANYFLASH_D40 ANYFLASH_D30 "," ANYFLASH_D10(3)
#define ANYFLASH_D48 ANYFLASH_D40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define ANYFLASH_D50 ANYFLASH_D40 "," ANYFLASH_D10(4)
#define ANYFLASH_D56 ANYFLASH_D50 ",%50,%51,%52,%53,%54,%55"
#define ANYFLASH_D60 ANYFLASH_D50 "," ANYFLASH_D10(5)
#define ANYFLASH_D64 ANYFLASH_D60 ",%60,%61,%62,%63"
#define ANYFLASH_D80 ANYFLASH_D60 "," ANYFLASH_D10(6) "," ANYFLASH_D10(7)
#define ANYFLASH_D88 ANYFLASH_D80 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define ANYFLASH_D90 ANYFLASH_D80 "," ANYFLASH_D10(8)
#define ANYFLASH_D96 ANYFLASH_D90 ",%90,%91,%92,%93,%94,%95"
#define ANYFLASH_D120 ANYFLASH_D90 "," ANYFLASH_D10(9) "," ANYFLASH_D10(10) "," ANYFLASH_D10(11)
#define ANYFLASH_D128 ANYFLASH_D120 ",%120,%121,%122,%123,%124,%125,%126,%127"

#define ANYFLASH_C8(i)                                                                             \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),      \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define ANYFLASH_C16 ANYFLASH_C8(0), ANYFLASH_C8(8)
#define ANYFLASH_C32 ANYFLASH_C8(0), ANYFLASH_C8(8), ANYFLASH_C8(16), ANYFLASH_C8(24)
#define ANYFLASH_C40 ANYFLASH_C32, ANYFLASH_C8(32)
#define ANYFLASH_C48 ANYFLASH_C40, ANYFLASH_C8(40)
#define ANYFLASH_C56 ANYFLASH_C48, ANYFLASH_C8(48)
#define ANYFLASH_C64 ANYFLASH_C56, ANYFLASH_C8(56)
#define ANYFLASH_C80 ANYFLASH_C64, ANYFLASH_C8(64), ANYFLASH_C8(72)
#define ANYFLASH_C88 ANYFLASH_C80, ANYFLASH_C8(80)
#define ANYFLASH_C96 ANYFLASH_C88, ANYFLASH_C8(88)
#define ANYFLASH_C128                                                                              \
  ANYFLASH_C96, ANYFLASH_C8(96), ANYFLASH_C8(104), ANYFLASH_C8(112), ANYFLASH_C8(120)

#define ANYFLASH_WGMMA_SHARED(n, r, dtype, i0, i1, i2, i3, i4)                                     \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #i2 ", 0;\n"                                      \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." dtype "." dtype                   \
               " {" ANYFLASH_D##r "}, %" #i0 ", %" #i1 ", p, 1, 1, %" #i3 ", %" #i4 ";}"           \
               : ANYFLASH_C##r                                                                     \
               : "l"(a), "l"(b), "r"(int{accumulate}), "n"(int(a_major)), "n"(int(b_major)))

#define ANYFLASH_WGMMA_REGISTERS(n, r, dtype, i0, i1, i2, i3, i4, i5, i6)                          \
  asm volatile("{.reg .pred p; setp.ne.b32 p, %" #i5 ", 0;\n"                                      \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." dtype "." dtype                   \
               " {" ANYFLASH_D##r "}, {%" #i0 ",%" #i1 ",%" #i2 ",%" #i3 "}, %" #i4                \
                                  ", p, 1, 1, %" #i6 ";}"                                          \
               : ANYFLASH_C##r                                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{accumulate}),         \
                 "n"(int(b_major)))

// n, its number of accumulators a thread, and the numbers of the operands that follow these.
#define ANYFLASH_WGMMA(n, r, i0, i1, i2, i3, i4, i5, i6)                                           \
  template <>                                                                                      \
  struct Wgmma<n> {                                                                                \
    template <class T, Major a_major, Major b_major>                                               \
    DEVICE static void shared(float (&d)[r], uint64_t a, uint64_t b, bool accumulate) {            \
      if constexpr (same<T, bf16>)                                                                 \
        ANYFLASH_WGMMA_SHARED(n, r, "bf16", i0, i1, i2, i3, i4);                                   \
      else                                                                                         \
        ANYFLASH_WGMMA_SHARED(n, r, "f16", i0, i1, i2, i3, i4);                                    \
    }                                                                                              \
    template <class T, Major b_major>                                                              \
    DEVICE static void registers(float (&d)[r], const uint32_t* a, uint64_t b, bool accumulate) {  \
      if constexpr (same<T, bf16>)                                                                 \
        ANYFLASH_WGMMA_REGISTERS(n, r, "bf16", i0, i1, i2, i3, i4, i5, i6);                        \
      else                                                                                         \
        ANYFLASH_WGMMA_REGISTERS(n, r, "f16", i0, i1, i2, i3, i4, i5, i6);                         \
    }                                                                                              \
  };

ANYFLASH_WGMMA(32, 16, 16, 17, 18, 19, 20, 21, 22)
ANYFLASH_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
ANYFLASH_WGMMA(80, 40, 40, 41, 42, 43, 44, 45, 46)
ANYFLASH_WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54)
ANYFLASH_WGMMA(112, 56, 56, 57, 58, 59, 60, 61, 62)
ANYFLASH_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
ANYFLASH_WGMMA(160, 80, 80, 81, 82, 83, 84, 85, 86)
ANYFLASH_WGMMA(176, 88, 88, 89, 90, 91, 92, 93, 94)
ANYFLASH_WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102)
ANYFLASH_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)

} // namespace detail

/// d += A B, or d = A B; A and B in shared memory, T of 16 bits. d[4 j + i] is accumulator i of
/// columns [8 j, 8 j + 8), as of mma.
template <class T, Major a_major, Major b_major, int r>
DEVICE void wgmma(float (&d)[r], uint64_t a, uint64_t b, bool accumulate) {
  detail::Wgmma<2 * r>::template shared<T, a_major, b_major>(d, a, b, accumulate);
}

/// The same with A in registers: a[0..3].
template <class T, Major b_major, int r>
DEVICE void wgmma(float (&d)[r], const uint32_t* a, uint64_t b, bool accumulate) {
  detail::Wgmma<2 * r>::template registers<T, b_major>(d, a, b, accumulate);
}

} // namespace anyflash
