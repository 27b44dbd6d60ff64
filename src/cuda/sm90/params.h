// Kernel parameters of the sm90 family: those that every family reads, and how the copy engine
// finds the tensors.
#pragma once

#include "cuda/params.h"
#include "cuda/sm90/tile_order.h"

namespace anyflash::sm90 {

/// A [batch, rows, heads, d] tensor and a box of it, as the driver encodes them (CUtensorMap).
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

/// Boxes are one page of a shared tile wide, and Br or Bc rows high, for O the 16 rows of a warp.
struct ForwardParams : anyflash::ForwardParams {
  TileOrder order;
  TensorMap q_map, k_map, v_map, o_map; // V of packed sequences: ragged_tensor_map
};

/// Boxes of one page of a shared tile, Br or Bc rows, whose first rows may be cut off: see
/// tma_load_ragged.
struct BackwardParams : anyflash::BackwardParams {
  TensorMap q_map, k_map, v_map, dout_map;
  int32_t* tickets;     // workspace: key blocks handed out so far
  uint32_t key_blocks;  // over all key heads of all sequences
  uint32_t heads_ahead; // key heads whose sums of dQ the kernel before zeroes, if not all
  int32_t* zeroed;      // workspace: of each key head, parts of its sums that are 0; or null
};

static_assert(sizeof(TensorMap) == 128);
static_assert(sizeof(ForwardParams) % 64 == 0);
static_assert(sizeof(ForwardParams) - sizeof(anyflash::ForwardParams) - sizeof(TileOrder) -
                  4 * sizeof(TensorMap) <
              64);

} // namespace anyflash::sm90
