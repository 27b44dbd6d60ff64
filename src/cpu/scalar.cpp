// Plain C++ for any processor: a "vector" is four floats and a loop, which the compiler may map to
// whatever the processor's baseline offers.
#include <bit>
#include <cmath>

#include "cpu/instruction_set.h"

namespace anyflash::cpu {
namespace {

struct Scalar {
  struct Vector {
    float x[4];
  };
  static constexpr int width = 4;
  static constexpr int tile_rows = 4;
  static constexpr int tile_vectors = 2;

  /// A vector of f(lane).
  template <class F>
  static ANYFLASH_INLINE Vector make(F f) {
    Vector v;
    ANYFLASH_UNROLL for (int i = 0; i < width; ++i) v.x[i] = f(i);
    return v;
  }

  static Vector set(float x) {
    return make([&](int) { return x; });
  }
  static Vector iota() {
    return make([](int i) { return static_cast<float>(i); });
  }
  template <class T>
  static Vector load(const T* x) {
    return make([&](int i) { return to_float(x[i]); });
  }
  static void convert(float x, float& to) { to = x; }
  static void convert(float x, Float16& to) { to = to_float16(x); }
  static void convert(float x, BFloat16& to) { to = to_bfloat16(x); }
  template <class T>
  static void store(T* to, Vector v) {
    for (int i = 0; i < width; ++i) convert(v.x[i], to[i]);
  }

  static Vector add(Vector a, Vector b) {
    return make([&](int i) { return a.x[i] + b.x[i]; });
  }
  static Vector sub(Vector a, Vector b) {
    return make([&](int i) { return a.x[i] - b.x[i]; });
  }
  static Vector multiply(Vector a, Vector b) {
    return make([&](int i) { return a.x[i] * b.x[i]; });
  }
  static Vector divide(Vector a, Vector b) {
    return make([&](int i) { return a.x[i] / b.x[i]; });
  }
  static Vector multiply_add(Vector a, Vector b, Vector c) {
    return make([&](int i) { return a.x[i] * b.x[i] + c.x[i]; });
  }
  static Vector max(Vector a, Vector b) {
    return make([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; });
  }
  static Vector abs(Vector a) {
    return make([&](int i) { return std::fabs(a.x[i]); });
  }
  static Vector copy_sign(Vector a, Vector sign) {
    return make([&](int i) { return std::copysign(a.x[i], sign.x[i]); });
  }
  static Vector add_exponent(Vector a, Vector shifted) {
    return make([&](int i) {
      return std::bit_cast<float>(std::bit_cast<uint32_t>(a.x[i]) +
                                  (std::bit_cast<uint32_t>(shifted.x[i]) << 23));
    });
  }
  static Vector keep_between(Vector a, Vector low, Vector column, Vector high) {
    return make([&](int i) {
      return low.x[i] <= column.x[i] && column.x[i] < high.x[i] ? a.x[i] : -infinity;
    });
  }

  static float first(Vector a) { return a.x[0]; }
  static float highest(Vector a) {
    return cpu::max(cpu::max(a.x[0], a.x[1]), cpu::max(a.x[2], a.x[3]));
  }
  static float total(Vector a) { return (a.x[0] + a.x[1]) + (a.x[2] + a.x[3]); }

  static void transpose(Vector (&a)[4]) {
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < i; ++j) {
        const float x = a[i].x[j];
        a[i].x[j] = a[j].x[i];
        a[j].x[i] = x;
      }
  }
};

bool always() { return true; }

} // namespace

const InstructionSet scalar = instruction_set<Scalar>("scalar", always);

} // namespace anyflash::cpu
