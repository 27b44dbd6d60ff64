// Problem -> what the kernels of the sm90 family read.
#pragma once

#include "core/problem.h"
#include "core/row.h"
#include "cuda/sm90/params.h"

namespace anyflash {

/// The order of the tiles of `heads` heads (of all sequences) with `blocks` query blocks each, over
/// `grid` thread blocks. by_size: the tiles of a head grow with their index, as under a causal
/// mask; the last of them, about as many as the cache holds the keys of, are dealt by size.
sm90::TileOrder make_tile_order(int64_t blocks, int64_t heads, int64_t grid, bool by_size,
                                int64_t cached_tiles);

/// Parameters of the forward kernel of a row, for a grid of this many thread blocks. The problem is
/// valid, has something to write, and why_not_tensor_maps is empty. Needs the driver.
sm90::ForwardParams hopper_forward_params(const Problem& problem, const Row& row, uint32_t grid);

} // namespace anyflash
