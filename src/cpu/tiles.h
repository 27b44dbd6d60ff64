// Products of matrices, one register tile at a time. Matrices are fp32; one that a tile reads row
// by row (B) is stored in panels of that tile's columns.
#pragma once

#include "cpu/simd.h"

namespace anyflash::cpu {
namespace {

template <class Simd>
struct Tiles {
  using Vector = typename Simd::Vector;
  static constexpr int width = Simd::width;         // floats a vector
  static constexpr int tile_rows = Simd::tile_rows; // register tile of the products
  static constexpr int tile_vectors = Simd::tile_vectors;
  static constexpr int panel = tile_vectors * width; // columns of a panel

  /// A register tile.
  template <int rows>
  using C = Vector[rows][tile_vectors];

  template <int rows>
  static ANYFLASH_INLINE void clear(C<rows>& c) {
    ANYFLASH_UNROLL for (int r = 0; r < rows; ++r) {
      ANYFLASH_UNROLL for (int n = 0; n < tile_vectors; ++n) c[r][n] = Simd::set(0.0f);
    }
  }

  /// Element (r, n) of memory at from[r * row + n].
  template <int rows, int row>
  static ANYFLASH_INLINE void load(C<rows>& c, const float* from) {
    ANYFLASH_UNROLL for (int r = 0; r < rows; ++r) {
      ANYFLASH_UNROLL for (int n = 0; n < tile_vectors; ++n) c[r][n] =
          Simd::load(from + r * row + n * width);
    }
  }
  template <int rows, int row>
  static ANYFLASH_INLINE void store(float* to, const C<rows>& c) {
    ANYFLASH_UNROLL for (int r = 0; r < rows; ++r) {
      ANYFLASH_UNROLL for (int n = 0; n < tile_vectors; ++n)
          Simd::store(to + r * row + n * width, c[r][n]);
    }
  }

  /// C [rows, panel] += A B: element (r, k) of A at a[r * a_row + k * a_column], row k of B at
  /// b[k * panel]. C lives in registers throughout.
  template <int rows, int a_row, int a_column>
  static ANYFLASH_INLINE void multiply_add(C<rows>& c, const float* a, const float* b, int depth) {
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 2
#endif
    for (int k = 0; k < depth; ++k) {
      Vector row_of_b[tile_vectors];
      ANYFLASH_UNROLL for (int n = 0; n < tile_vectors; ++n) row_of_b[n] =
          Simd::load(b + n * width);
      ANYFLASH_UNROLL for (int r = 0; r < rows; ++r) {
        const Vector x = Simd::set(a[r * a_row]);
        ANYFLASH_UNROLL for (int n = 0; n < tile_vectors; ++n) c[r][n] =
            Simd::multiply_add(x, row_of_b[n], c[r][n]);
      }
      a += a_column;
      b += panel;
    }
  }

  /// Calls visit<rows>(row) for groups of tile_rows rows of [begin, end) and the rest.
  template <class Visit>
  static ANYFLASH_INLINE void for_each_tile(int begin, int end, Visit visit) {
    int r = begin;
    for (; r + tile_rows <= end; r += tile_rows) visit.template operator()<tile_rows>(r);
    rest<tile_rows - 1>(end - r, r, visit);
  }

private:
  template <int n, class Visit>
  static ANYFLASH_INLINE void rest(int rows, int r, Visit& visit) {
    if constexpr (n > 0) {
      if (rows == n) return visit.template operator()<n>(r);
      rest<n - 1>(rows, r, visit);
    }
  }
};

} // namespace
} // namespace anyflash::cpu
