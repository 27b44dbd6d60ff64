// Tensors as Hopper's copy engine addresses them.
#pragma once

#include <string>

#include "core/problem.h"
#include "cuda/sm90/params.h"

namespace anyflash {

/// The sizes of a view, [batch, rows, heads, d]; packed tensors are one batch of all rows.
struct Extents {
  int64_t batch, rows, heads, d;
};
Extents query_extents(const Problem& problem, int64_t d);
Extents key_extents(const Problem& problem, int64_t d);

/// Columns of a box: those of a page of a shared tile of `columns` columns (tile/shared_tile.h).
constexpr int box_columns(int columns) { return columns % 64 == 0 ? 64 : 32; }

/// The map of a view of 16-bit elements with boxes of `box_rows` rows by `columns` columns, 64 or
/// 32, swizzled over the bytes of a row. The view is not empty. Needs the driver; throws
/// RuntimeError.
sm90::TensorMap tensor_map(const View& view, const Extents& extents, DType dtype, int columns,
                           int box_rows);

/// The same for boxes of which only the first `valid` rows count, and the others become zeros,
/// whatever lies there: the rows of a packed sequence, or those in use. The rows are two dimensions
/// with the same stride: a box begins at box_rows - valid of the first, past whose end there are
/// zeros, and at row + valid of the second, which makes up for that and for a base that is box_rows
/// rows too low. No box may be empty: of one that holds nothing, also for its columns, the copy
/// engine touches the base of the map, which may be where there is no memory (seen on an H100).
sm90::TensorMap ragged_tensor_map(const View& view, const Extents& extents, DType dtype,
                                  int columns, int box_rows);

/// Why the copy engine cannot address a tensor of this problem; empty if it can. Pure.
std::string why_not_tensor_maps(const Problem& problem);

} // namespace anyflash
