// Rows of one sequence of a packed tensor, by maps that cut off what follows its last
// (core/tensor_maps.h).
#pragma once

#include "cuda/ptx/tma.h"

namespace anyflash::sm90 {

/// Pages of a tile, from `column` on, that have columns of a tensor of `columns`. Only these are
/// loaded: the copy engine must not be asked for a box of a ragged map that holds nothing.
template <class Tile>
DEVICE int pages_with(int columns, int column = 0) {
  if constexpr (Tile::pages == 1) return 1;
  return max(0, min(Tile::pages, (columns - column + Tile::page_columns - 1) / Tile::page_columns));
}

/// Copies `pages` pages of a tile of the columns from `column` and the rows from `row` on of a
/// sequence that begins at row `first` of a packed tensor and has `length` rows, at least one; rows
/// past these are zeros. Where none are left it is the last one.
template <class Tile>
DEVICE void load_rows(uint32_t tile, int pages, const TensorMap* map, uint32_t barrier, int column,
                      int first, int row, int length, int head, int batch) {
  const int valid = max(1, min(Tile::rows, length - row));
  const int skip = Tile::rows - valid, end = first + min(row, length - 1) + valid;
  ROLLED
  for (int page = 0; page < pages; ++page)
    tma_load_ragged(tile + page * Tile::page_bytes, map, barrier,
                    column + page * Tile::page_columns, skip, end, head, batch);
}

} // namespace anyflash::sm90
