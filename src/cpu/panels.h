// Rows of a tensor of T brought into panels of fp32 for the products, and back.
#pragma once

#include "cpu/convert.h"
#include "cpu/simd.h"
#include "cpu/tiles.h"

namespace anyflash::cpu {
namespace {

template <class Simd, class T>
struct Panels {
  using Vector = typename Simd::Vector;
  static constexpr int width = Simd::width;
  static constexpr int panel = Tiles<Simd>::panel;

  /// The first n of width elements, zeros after them.
  static Vector load_first(const T* x, int n) {
    if (n >= width) return Simd::load(x);
    T padded[width] = {};
    for (int e = 0; e < n; ++e) padded[e] = x[e];
    return Simd::load(padded);
  }

  /// `count` rows of `columns` elements, `row` elements apart, into [columns / panel][capacity]
  /// [panel]; zero past the last column.
  static ANYFLASH_NOINLINE void pack_rows(const T* x, int64_t row, int count, int columns,
                                          int capacity, float* packed) {
    const int whole = columns / width * width, padded = round_up(columns, panel);
    for (int r = 0; r < count; ++r, x += row) {
      float* to = packed + r * panel;
      const auto place = [&](int e) {
        return to + int64_t{e / panel} * capacity * panel + e % panel;
      };
      for (int e = 0; e < whole; e += width) Simd::store(place(e), Simd::load(x + e));
      for (int e = whole; e < padded; e += width)
        Simd::store(place(e), load_first(x + min(e, columns), max(0, columns - e)));
    }
  }

  /// The same rows transposed, into [count / panel][columns][panel]; rows up to the end of a panel
  /// are zero.
  static ANYFLASH_NOINLINE void pack_columns(const T* x, int64_t row, int count, int columns,
                                             float* packed) {
    for (int j = 0; j < round_up(count, panel); j += width) {
      float* to = packed + int64_t{j / panel} * panel * columns + j % panel;
      const int rows = max(0, min(width, count - j));
      for (int e = 0; e < columns; e += width) {
        const int elements = min(width, columns - e);
        Vector square[width];
        if (rows == width && elements == width) {
          ANYFLASH_UNROLL for (int r = 0; r < width; ++r) square[r] =
              Simd::load(x + (j + r) * row + e);
        } else {
          for (int r = 0; r < width; ++r)
            square[r] = r < rows ? load_first(x + (j + r) * row + e, elements) : Simd::set(0.0f);
        }
        Simd::transpose(square);
        if (elements == width) {
          ANYFLASH_UNROLL for (int r = 0; r < width; ++r)
              Simd::store(to + (e + r) * panel, square[r]);
        } else {
          for (int r = 0; r < elements; ++r) Simd::store(to + (e + r) * panel, square[r]);
        }
      }
    }
  }

  /// The first n of width elements of x.
  template <class To>
  static void store_first(To* to, Vector x, int n) {
    if (n >= width) return Simd::store(to, x);
    To whole[width];
    Simd::store(whole, x);
    for (int e = 0; e < n; ++e) to[e] = whole[e];
  }

  /// One row of [columns / panel][capacity][panel], times `factor`.
  template <class To>
  static void store_row(To* to, const float* packed, int columns, int capacity, float factor) {
    for (int e = 0; e < columns; e += width) {
      const float* from = packed + e / panel * int64_t{capacity} * panel + e % panel;
      store_first(to + e, Simd::multiply(Simd::set(factor), Simd::load(from)), columns - e);
    }
  }
};

} // namespace
} // namespace anyflash::cpu
