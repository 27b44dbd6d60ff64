// SharedTiles as wgmma reads them. PTX ISA, "Matrix descriptor" and "Strides"; the copy engine
// writes the same layout with its swizzle of 128 (or 64) bytes.
#pragma once

#include "cuda/ptx/wgmma.h"
#include "cuda/tile/shared_tile.h"

namespace anyflash {

/// Descriptors of a SharedTile, whose base is on 1024 bytes. A step is 16 columns or 16 rows,
/// whatever the product sums over; adding what at_* gives to a descriptor moves it there.
template <class Tile>
struct MatrixDescriptor {
  static constexpr uint64_t swizzle = Tile::page_columns == 64 ? 1 : 2; // of 128, of 64 bytes
  static constexpr uint32_t atom_bytes = 8 * Tile::row_bytes;           // 8 rows

  /// Stored [m or n, k]: the product sums over columns. first_row: of the operand, a multiple of 8.
  DEVICE static uint64_t k_major(uint32_t tile, int first_row = 0) {
    return make(tile + first_row * Tile::row_bytes, 16);
  }
  /// Stored [k, m or n]: the product sums over rows; the operand takes columns from first_column
  /// on, a multiple of the page's, or of 16 if it ends in the same page.
  DEVICE static uint64_t mn_major(uint32_t tile, int first_column = 0) {
    return make(tile + first_column / Tile::page_columns * Tile::page_bytes +
                    first_column % Tile::page_columns * 2,
                Tile::page_bytes);
  }

  static constexpr DEVICE uint64_t at_columns(int step) { // for k_major
    constexpr int steps = Tile::page_columns / 16;
    return (step / steps * Tile::page_bytes + step % steps * 32) >> 4;
  }
  static constexpr DEVICE uint64_t at_rows(int step) { // for mn_major
    return (step * 16 * Tile::row_bytes) >> 4;
  }
  /// The next stage, `bytes` bytes on.
  static constexpr DEVICE uint64_t at_bytes(uint32_t bytes) { return bytes >> 4; }

private:
  DEVICE static uint64_t make(uint32_t address, uint32_t leading_bytes) {
    return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{leading_bytes >> 4} << 16 |
           uint64_t{atom_bytes >> 4} << 32 | swizzle << 62;
  }
};

} // namespace anyflash
