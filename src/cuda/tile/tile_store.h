// Accumulators to shared tiles, and shared tiles to global memory.
#pragma once

#include "cuda/ptx/math.h"
#include "cuda/ptx/stmatrix.h"
#include "cuda/tile/fragment.h"
#include "cuda/tile/shared_tile.h"

namespace anyflash {

/// Address of this thread's part of an Accumulator whose tile starts at (first_row, first_column)
/// of a shared tile; what first_column may be: FragmentReader::from_column. That is the row that it
/// names to stmatrix, or its first element.
template <class Tile, class Fragment>
DEVICE uint32_t fragment_address(uint32_t tile, int first_row, int first_column) {
  if constexpr (has_stmatrix)
    return tile +
           Tile::at_chunk(first_row + lane_index() % 16, first_column / 8 + lane_index() / 16);
  else
    return tile + Tile::at_chunk(first_row + Fragment::first_row(), first_column / 8) +
           Fragment::first_column() * 2;
}

/// Rounds an Accumulator to T and stores it. Every address is the first one with an XOR (its chunk)
/// and constants (its row and page). parts: the accumulator holds every parts-th step of 16
/// columns.
template <class T, class Tile, int parts = 1, class Fragment>
DEVICE void store_fragments(uint32_t address, const Fragment& x) {
  UNROLL
  for (int m = 0; m < Fragment::m; ++m) {
    UNROLL
    for (int n = 0; n < Fragment::n; n += 2) {
      const uint32_t at = Tile::at_step(address, n / 2 * parts) + m * 16 * Tile::row_bytes;
      const float(&left)[4] = x.x[m][n], (&right)[4] = x.x[m][n + 1];
      const uint32_t pairs[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]),
                                 pack<T>(right[0], right[1]), pack<T>(right[2], right[3])};
      if constexpr (has_stmatrix) {
        stmatrix_x4(at, pairs[0], pairs[1], pairs[2], pairs[3]);
      } else {
        UNROLL
        for (int e = 0; e < 4; ++e)
          st_shared((at ^ (e / 2 << 4)) + e % 2 * 8 * Tile::row_bytes, pairs[e]);
      }
    }
  }
}

/// What store_fragments stored there, by the thread that has the same place in its warp.
template <class T, class Tile, class Fragment>
DEVICE void load_fragments(uint32_t address, Fragment& x) {
  UNROLL
  for (int m = 0; m < Fragment::m; ++m) {
    UNROLL
    for (int n = 0; n < Fragment::n; n += 2) {
      const uint32_t at = Tile::at_step(address, n / 2) + m * 16 * Tile::row_bytes;
      uint32_t pairs[4];
      if constexpr (has_stmatrix) {
        ldmatrix_x4(pairs, at);
      } else {
        UNROLL
        for (int e = 0; e < 4; ++e)
          pairs[e] = ld_shared((at ^ (e / 2 << 4)) + e % 2 * 8 * Tile::row_bytes);
      }
      UNROLL
      for (int e = 0; e < 4; ++e) {
        const float2 pair = unpack<T>(pairs[e]);
        x.x[m][n + e / 2][e % 2 * 2] = pair.x;
        x.x[m][n + e / 2][e % 2 * 2 + 1] = pair.y;
      }
    }
  }
}

/// Copies `rows` rows of a shared tile to a matrix in global memory, 16 bytes a thread; of these,
/// rows_valid exist, with `columns` columns. any_alignment and not aligned: element by element.
template <class Tile, int rows, int threads, bool any_alignment>
DEVICE void copy_rows(uint32_t tile, int thread, uint16_t* matrix, int64_t row_stride,
                      int rows_valid, int columns, bool aligned) {
  constexpr int chunks = Tile::columns / 8; // a row
  static_assert(rows * chunks % threads == 0);
  UNROLL
  for (int i = 0; i < rows * chunks / threads; ++i) {
    const int index = i * threads + thread;
    const int row = index / chunks, column = index % chunks * 8;
    const uint4 value = ld_shared_16(tile + Tile::at_chunk(row, column / 8));
    if (row >= rows_valid) continue;
    uint16_t* const to = matrix + row * row_stride + column;
    if (!any_alignment || aligned) {
      if (column < columns) *reinterpret_cast<uint4*>(to) = value;
    } else {
      const uint32_t pairs[4] = {value.x, value.y, value.z, value.w};
      UNROLL
      for (int e = 0; e < 8; ++e)
        if (column + e < columns) to[e] = static_cast<uint16_t>(pairs[e / 2] >> e % 2 * 16);
    }
  }
}

} // namespace anyflash
