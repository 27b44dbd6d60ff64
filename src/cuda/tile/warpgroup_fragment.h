// The accumulator of one warpgroup's matrix product, which knows its own rows and columns.
#pragma once

#include "cuda/ptx/math.h"
#include "cuda/ptx/wgmma.h"

namespace anyflash {

/// f32 [64, columns]: what Accumulator is to a warp; warp w of the warpgroup holds rows [16 w, 16 w
/// + 16), and row(r) counts within these. Flat, as wgmma takes it.
template <int width_>
struct WarpgroupAccumulator {
  static constexpr int width = width_;
  static constexpr int rows = 2;            // that this thread holds
  static constexpr int columns = width / 4; // of each
  static constexpr int size = width / 2;

  float x[size];

  DEVICE float& operator()(int r, int c) { return x[c / 2 * 4 + 2 * r + c % 2]; }
  DEVICE float operator()(int r, int c) const { return x[c / 2 * 4 + 2 * r + c % 2]; }

  DEVICE static int first_row() { return lane_index() / 4; }
  DEVICE static int first_column() { return lane_index() % 4 * 2; }
  static constexpr DEVICE int row_offset(int r) { return r * 8; }
  static constexpr DEVICE int column_offset(int c) { return c / 2 * 8 + c % 2; }
  DEVICE static int row(int r) { return first_row() + row_offset(r); }
  DEVICE static int column(int c) { return first_column() + column_offset(c); }

  DEVICE void clear() {
    UNROLL
    for (int i = 0; i < size; ++i) x[i] = 0;
  }
};

/// [64, columns] of 16-bit values as A of a product: registers a[4 k .. 4 k + 3] for columns
/// [16 k, 16 k + 16). Accumulators become A fragments by rounding, without moving between threads.
template <class T, int columns>
struct WarpgroupOperand {
  static constexpr int size = columns / 4;
  uint32_t a[size];

  DEVICE void round(const WarpgroupAccumulator<columns>& from) {
    UNROLL
    for (int i = 0; i < size; ++i) a[i] = pack<T>(from.x[2 * i], from.x[2 * i + 1]);
  }
};

} // namespace anyflash
