// AVX-512 F, BW, DQ and VL: 16 floats a vector, 32 registers.
#include <immintrin.h>

#include "cpu/instruction_set.h"
#include "cpu/x86.h"

namespace anyflash::cpu {
namespace {

struct Avx512 {
  using Vector = __m512;
  static constexpr int width = 16;
  static constexpr int tile_rows = 12; // 24 accumulators, 2 of B; A is broadcast from memory
  static constexpr int tile_vectors = 2;

  static Vector set(float x) { return _mm512_set1_ps(x); }
  static Vector iota() {
    return _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  }
  static Vector load(const float* x) { return _mm512_loadu_ps(x); }
  static Vector load(const Float16* x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  static Vector load(const BFloat16* x) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static void store(float* to, Vector x) { _mm512_storeu_ps(to, x); }
  static void store(Float16* to, Vector x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  static void store(BFloat16* to, Vector x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __m512i right =
        _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), rounded, quiet);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(right, 16)));
  }

  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector sub(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
  static Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
  static Vector divide(Vector a, Vector b) { return _mm512_div_ps(a, b); }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static Vector max(Vector a, Vector b) { return _mm512_max_ps(a, b); }
  static Vector abs(Vector x) { return _mm512_andnot_ps(set(-0.0f), x); }
  static Vector copy_sign(Vector x, Vector sign) {
    return _mm512_or_ps(x, _mm512_and_ps(set(-0.0f), sign));
  }
  static Vector add_exponent(Vector x, Vector shifted) {
    return _mm512_castsi512_ps(_mm512_add_epi32(
        _mm512_castps_si512(x), _mm512_slli_epi32(_mm512_castps_si512(shifted), 23)));
  }
  static Vector keep_between(Vector x, Vector low, Vector column, Vector high) {
    const __mmask16 keep =
        _mm512_cmp_ps_mask(low, column, _CMP_LE_OQ) & _mm512_cmp_ps_mask(column, high, _CMP_LT_OQ);
    return _mm512_mask_blend_ps(keep, set(-infinity), x);
  }

  static float first(Vector x) { return _mm512_cvtss_f32(x); }
  static float highest(Vector x) { return _mm512_reduce_max_ps(x); }
  static float total(Vector x) { return _mm512_reduce_add_ps(x); }

  static void transpose(Vector (&x)[16]) {
    Vector pairs[16], quads[16];
    ANYFLASH_UNROLL for (int i = 0; i < 16; i += 2) {
      pairs[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    ANYFLASH_UNROLL for (int i = 0; i < 16; i += 4) {
      quads[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
      quads[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
      quads[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
      quads[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
    // Lane a of quads[4 b + i] holds column 4 a + i of rows 4 b .. 4 b + 3: a 4 x 4 transpose of
    // lanes remains.
    ANYFLASH_UNROLL for (int i = 0; i < 4; ++i) {
      const Vector low01 = _mm512_shuffle_f32x4(quads[i], quads[4 + i], 0x44);
      const Vector high01 = _mm512_shuffle_f32x4(quads[i], quads[4 + i], 0xee);
      const Vector low23 = _mm512_shuffle_f32x4(quads[8 + i], quads[12 + i], 0x44);
      const Vector high23 = _mm512_shuffle_f32x4(quads[8 + i], quads[12 + i], 0xee);
      x[i] = _mm512_shuffle_f32x4(low01, low23, 0x88);
      x[4 + i] = _mm512_shuffle_f32x4(low01, low23, 0xdd);
      x[8 + i] = _mm512_shuffle_f32x4(high01, high23, 0x88);
      x[12 + i] = _mm512_shuffle_f32x4(high01, high23, 0xdd);
    }
  }
};

} // namespace

const InstructionSet avx512 = instruction_set<Avx512>("avx512", x86_has_avx512);

} // namespace anyflash::cpu
