// NEON: 4 floats a vector, 32 registers. Every 64-bit Arm processor has it.
#include <arm_neon.h>

#include "cpu/instruction_set.h"

namespace anyflash::cpu {
namespace {

struct Neon {
  using Vector = float32x4_t;
  static constexpr int width = 4;
  static constexpr int tile_rows = 6; // 24 accumulators, 4 of B, 1 of A: 29 of 32 registers
  static constexpr int tile_vectors = 4;

  static Vector set(float x) { return vdupq_n_f32(x); }
  static Vector iota() {
    const float numbers[4] = {0, 1, 2, 3};
    return vld1q_f32(numbers);
  }
  static Vector load(const float* x) { return vld1q_f32(x); }
  static Vector load(const Float16* x) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&x->bits)));
  }
  static Vector load(const BFloat16* x) {
    return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&x->bits), 16));
  }
  static void store(float* to, Vector x) { vst1q_f32(to, x); }
  static void store(Float16* to, Vector x) {
    vst1_u16(&to->bits, vreinterpret_u16_f16(vcvt_f16_f32(x)));
  }
  static void store(BFloat16* to, Vector x) {
    const uint32x4_t bits = vreinterpretq_u32_f32(x);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    const uint32x4_t right = vbslq_u32(vceqq_f32(x, x), rounded, quiet);
    vst1_u16(&to->bits, vshrn_n_u32(right, 16));
  }

  static Vector add(Vector a, Vector b) { return vaddq_f32(a, b); }
  static Vector sub(Vector a, Vector b) { return vsubq_f32(a, b); }
  static Vector multiply(Vector a, Vector b) { return vmulq_f32(a, b); }
  static Vector divide(Vector a, Vector b) { return vdivq_f32(a, b); }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return vfmaq_f32(c, a, b); }
  static Vector max(Vector a, Vector b) { return vmaxq_f32(a, b); }
  static Vector abs(Vector x) { return vabsq_f32(x); }
  static Vector copy_sign(Vector x, Vector sign) {
    return vbslq_f32(vdupq_n_u32(0x80000000u), sign, x);
  }
  static Vector add_exponent(Vector x, Vector shifted) {
    return vreinterpretq_f32_u32(
        vaddq_u32(vreinterpretq_u32_f32(x), vshlq_n_u32(vreinterpretq_u32_f32(shifted), 23)));
  }
  static Vector keep_between(Vector x, Vector low, Vector column, Vector high) {
    const uint32x4_t keep = vandq_u32(vcleq_f32(low, column), vcltq_f32(column, high));
    return vbslq_f32(keep, x, set(-infinity));
  }

  static float first(Vector x) { return vgetq_lane_f32(x, 0); }
  static float highest(Vector x) { return vmaxvq_f32(x); }
  static float total(Vector x) { return vaddvq_f32(x); }

  static void transpose(Vector (&x)[4]) {
    const float32x4x2_t low = vtrnq_f32(x[0], x[1]);
    const float32x4x2_t high = vtrnq_f32(x[2], x[3]);
    x[0] = vcombine_f32(vget_low_f32(low.val[0]), vget_low_f32(high.val[0]));
    x[1] = vcombine_f32(vget_low_f32(low.val[1]), vget_low_f32(high.val[1]));
    x[2] = vcombine_f32(vget_high_f32(low.val[0]), vget_high_f32(high.val[0]));
    x[3] = vcombine_f32(vget_high_f32(low.val[1]), vget_high_f32(high.val[1]));
  }
};

bool always() { return true; }

} // namespace

const InstructionSet neon = instruction_set<Neon>("neon", always);

} // namespace anyflash::cpu
