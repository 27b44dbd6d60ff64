// Accumulators to shared tiles, and shared tiles to global memory.
#pragma once

#include "cuda/ptx/math.h"
#include "cuda/tile/fragment.h"
#include "cuda/tile/shared_tile.h"

namespace anyflash {

/// Address of this thread's first element of an Accumulator whose tile starts at (first_row,
/// first_column) of a shared tile; what first_column may be: FragmentReader::from_column.
template <class Tile, class Fragment>
DEVICE uint32_t fragment_address(uint32_t tile, int first_row, int first_column) {
  return tile + Tile::at_chunk(first_row + Fragment::first_row(), first_column / 8) +
         Fragment::first_column() * 2;
}

/// Rounds an Accumulator to T and stores it. Every address is the first one with an XOR (its chunk)
/// and constants (its row and page). parts: the accumulator holds every parts-th step of 16
/// columns.
template <class T, class Tile, int parts = 1, class Fragment>
DEVICE void store_fragments(uint32_t address, const Fragment& x) {
  UNROLL
  for (int r = 0; r < Fragment::rows; ++r) {
    UNROLL
    for (int c = 0; c < Fragment::columns; c += 2) {
      const int tile = c / 2; // of 8 columns
      const int chunk = tile / 2 * 2 * parts + tile % 2;
      st_shared((address ^ (chunk % Tile::chunks << 4)) + chunk / Tile::chunks * Tile::page_bytes +
                    Fragment::row_offset(r) * Tile::row_bytes,
                pack<T>(x(r, c), x(r, c + 1)));
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
