// Tiles from global to shared memory by all threads of a block.
#pragma once

#include "cuda/tile/shared_tile.h"

namespace anyflash {

/// Eight 16-bit elements from any address, the first `valid` of which exist; the others are 0.
DEVICE uint4 gather_8(const uint16_t* from, int valid) {
  uint32_t pairs[4] = {};
  UNROLL
  for (int i = 0; i < 8; ++i)
    if (i < valid) pairs[i / 2] |= uint32_t{from[i]} << i % 2 * 16;
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

/// The same; aligned: `from` is on 16 bytes and valid a multiple of 8.
template <bool any_alignment>
DEVICE uint4 load_chunk(const uint16_t* from, int valid, bool aligned) {
  if (any_alignment && !aligned) return gather_8(from, valid);
  return valid > 0 ? *reinterpret_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
}

/// Copies [rows, columns] tiles of one [N, d] matrix. Rows at and past `rows_valid`, and columns at
/// and past d, become zeros: padding takes part in products, and what lies beyond the lengths may
/// be NaN. aligned: rows start on 16 bytes; otherwise `any_alignment` must be set, and elements are
/// copied one by one.
template <class Tile, int threads, bool any_alignment>
class TileLoader {
public:
  /// matrix: element (0, 0); row_stride in elements; d: columns that exist, a multiple of 8 if
  /// aligned.
  DEVICE TileLoader(const void* matrix, int64_t row_stride, int d, bool aligned)
      : matrix_(static_cast<const uint16_t*>(matrix)), row_stride_(row_stride), d_(d),
        aligned_(aligned) {
    matrix_ += row() * row_stride_ + chunk() * 8;
  }

  /// Starts copying rows [first_row, first_row + Tile::rows) to shared memory at `tile`; of these,
  /// rows_valid exist. offset: elements from the matrix to the one meant (another head).
  DEVICE void load(uint32_t tile, int64_t first_row, int rows_valid, int64_t offset = 0) const {
    const uint16_t* const source = matrix_ + offset + first_row * row_stride_;
    const uint32_t target = tile + Tile::offset(row(), chunk());
    if (any_alignment && !aligned_) return copy_elements(target, source, rows_valid);
    const int columns = d_ - static_cast<int>(recomputed(threadIdx.x)) % Tile::chunks * 8;
    UNROLL
    for (int pass = 0; pass < passes; ++pass) {
      const bool row_valid = row() + pass * rows_per_pass < rows_valid;
      UNROLL
      for (int page = 0; page < Tile::pages; ++page)
        cp_async_16(target + shared_step(pass, page), source + global_step(pass, page),
                    row_valid && columns > page * Tile::page_columns);
    }
  }

  /// Moves to the matrix that begins so many elements later.
  DEVICE void advance(int64_t elements) { matrix_ += elements; }

private:
  static constexpr int rows_per_pass = threads / Tile::chunks;
  static constexpr int passes = Tile::rows / rows_per_pass;
  static_assert(Tile::rows % rows_per_pass == 0 && rows_per_pass % 8 == 0);

  DEVICE static int row() { return threadIdx.x / Tile::chunks; }
  DEVICE static int chunk() { return threadIdx.x % Tile::chunks; }

  /// From this thread's chunk of the first pass and page to that of another.
  DEVICE static uint32_t shared_step(int pass, int page) {
    return page * Tile::page_bytes + pass * rows_per_pass * Tile::row_bytes;
  }
  DEVICE int64_t global_step(int pass, int page) const {
    return pass * rows_per_pass * row_stride_ + page * Tile::page_columns;
  }

  /// load() where rows may start anywhere. Rolled loops: rare, and registers are dear.
  DEVICE void copy_elements(uint32_t target, const uint16_t* source, int rows_valid) const {
    ROLLED
    for (int pass = 0; pass < passes; ++pass) {
      ROLLED
      for (int page = 0; page < Tile::pages; ++page) {
        const bool row_valid = row() + pass * rows_per_pass < rows_valid;
        st_shared(target + shared_step(pass, page),
                  gather_8(source + global_step(pass, page),
                           row_valid ? d_ - chunk() * 8 - page * Tile::page_columns : 0));
      }
    }
  }

  const uint16_t* matrix_; // this thread's first element
  int64_t row_stride_;
  int d_;
  bool aligned_;
};

} // namespace anyflash
