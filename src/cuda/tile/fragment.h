// The accumulator of one warp's matrix product, which knows its own rows and columns.
#pragma once

#include "cuda/ptx/types.h"

namespace anyflash {

/// f32 [16 m, 8 n] tile of one warp. This thread holds `rows` rows and `columns` columns of it; (r,
/// c) counts those. Source: PTX ISA, "Matrix fragments for mma.m16n8k16", accumulators.
template <int m_, int n_>
struct Accumulator {
  static constexpr int m = m_;
  static constexpr int n = n_;
  static constexpr int rows = 2 * m;
  static constexpr int columns = 2 * n;

  float x[m][n][4];

  DEVICE float& operator()(int r, int c) { return x[r / 2][c / 2][2 * (r % 2) + c % 2]; }
  DEVICE float operator()(int r, int c) const { return x[r / 2][c / 2][2 * (r % 2) + c % 2]; }

  /// Row and column in the tile of this thread's first element, and how far its (r, c) element is
  /// from there.
  DEVICE static int first_row() { return lane_index() / 4; }
  DEVICE static int first_column() { return lane_index() % 4 * 2; }
  static constexpr DEVICE int row_offset(int r) { return r / 2 * 16 + r % 2 * 8; }
  static constexpr DEVICE int column_offset(int c) { return c / 2 * 8 + c % 2; }

  DEVICE static int row(int r) { return first_row() + row_offset(r); }
  DEVICE static int column(int c) { return first_column() + column_offset(c); }

  DEVICE void clear() {
    UNROLL
    for (int r = 0; r < rows; ++r) {
      UNROLL
      for (int c = 0; c < columns; ++c) (*this)(r, c) = 0;
    }
  }
};

/// The four threads that hold a row of an Accumulator are neighbours; these combine one value of
/// each.
DEVICE float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}
DEVICE float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

} // namespace anyflash
