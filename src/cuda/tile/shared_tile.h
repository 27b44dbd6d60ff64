// A [rows, columns] tile of 16-bit values in shared memory, swizzled so that neither copies of 16
// bytes nor ldmatrix meet bank conflicts.
#pragma once

#include "cuda/ptx/copy.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/types.h"

namespace anyflash {

/// The tile is stored as pages of 64 columns (128 bytes a row), or of 32 (64 bytes) where columns
/// is not a multiple of
/// 64. Inside a page the 16-byte chunk c of row r sits at chunk c ^ (r % 8), or c ^ (r / 2 % 4) in
/// the narrow form. Base addresses must be multiples of 1024 bytes.
template <int rows_, int columns_>
struct SharedTile {
  static constexpr int rows = rows_;
  static constexpr int columns = columns_;
  static constexpr int page_columns = columns % 64 == 0 ? 64 : 32;
  static constexpr int chunks = page_columns / 8; // of 16 bytes, a row of a page
  static constexpr int row_bytes = page_columns * 2;
  static constexpr int pages = columns / page_columns;
  static constexpr int page_bytes = rows * row_bytes;
  static constexpr int bytes = pages * page_bytes;
  static_assert(columns % 32 == 0 && rows % 8 == 0);

  /// Byte offset of chunk `chunk` of row `row` inside a page.
  DEVICE static constexpr int offset(int row, int chunk) {
    const int swizzle = page_columns == 64 ? row & 7 : (row >> 1) & 3;
    return row * row_bytes + ((chunk ^ swizzle) << 4);
  }

  /// Byte offset of chunk `chunk` of a whole row of the tile.
  DEVICE static constexpr int at_chunk(int row, int chunk) {
    return chunk / chunks * page_bytes + offset(row, chunk % chunks);
  }

  /// Byte offset that moves an address with a swizzled chunk from columns [0, 16) to columns [16 k,
  /// 16 k + 16): exact because a step of 16 columns flips whole bits of the chunk's index.
  DEVICE static constexpr uint32_t at_step(uint32_t address, int k) {
    constexpr int steps = page_columns / 16;
    return (address ^ ((k % steps) << 5)) + (k / steps) * page_bytes;
  }
};

/// Reads 16x16 tiles of a SharedTile as fragments. `address` is this lane's row and chunk for the
/// tile at (0, 0); everything else is an immediate or one XOR.
template <class Tile>
struct FragmentReader {
  uint32_t address;

  /// For A of a product, [m, k] as stored: registers in the order of mma's a0..a3. Also for B
  /// stored as [k, n], read with transposition: registers {b0, b1} of the first 8 columns, then of
  /// the second.
  DEVICE static FragmentReader rows_first(uint32_t tile, int first_row) {
    const int lane = lane_index();
    return {tile + Tile::offset(lane % 16, lane / 16) + first_row * Tile::row_bytes};
  }

  /// For B of a product stored as [n, k]: registers {b0, b1} of the first 8 rows, then of the
  /// second.
  DEVICE static FragmentReader columns_first(uint32_t tile, int first_row = 0) {
    const int lane = lane_index();
    return {tile + Tile::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2) +
            first_row * Tile::row_bytes};
  }

  /// The reader of a part of the columns: from column 16 j on, where the part is aligned to its
  /// width, a power of two up to a page; or the steps j, j + parts, j + 2 parts, ... of 16 columns,
  /// where parts is a power of two.
  DEVICE FragmentReader from_column(int j) const { return {Tile::at_step(address, j)}; }

  /// The 16x16 tile at row 16 i, column 16 j, in the tile that starts `stage_bytes` later.
  DEVICE void read(uint32_t (&r)[4], int i, int j, uint32_t stage_bytes = 0) const {
    ldmatrix_x4(r, Tile::at_step(address, j) + stage_bytes + i * 16 * Tile::row_bytes);
  }
  DEVICE void read_transposed(uint32_t (&r)[4], int i, int j, uint32_t stage_bytes = 0) const {
    ldmatrix_x4_trans(r, Tile::at_step(address, j) + stage_bytes + i * 16 * Tile::row_bytes);
  }
};

} // namespace anyflash
