// O and L from the accumulators to global memory.
#pragma once

#include "cuda/attn/softmax.h"
#include "cuda/tile/tile_store.h"

namespace anyflash {

/// O /= l and L = ln(2^m l) for the rows of one warp, which start at query `first_query`. Rows
/// without a key, and those past the used length, get O = 0, L = -inf; NaN stays NaN.
template <class Output, class State, class Block>
DEVICE void normalise(Output& o, State& state, const ForwardParams& p, const Block& block,
                      int first_query) {
  UNROLL
  for (int r = 0; r < Output::rows; ++r) {
    const int query = first_query + Output::row(r);
    const float l = row_sum(state.l[r]);
    const bool empty = l == 0 || query >= block.seqlen_q;
    const float inverse = empty ? 0 : 1 / l;
    UNROLL
    for (int c = 0; c < Output::columns; ++c) o(r, c) *= inverse;
    if (p.lse && lane_index() % 4 == 0 && query < block.rows)
      p.lse[block.lse_offset + query] = empty ? -infinity() : (state.m[r] + __log2f(l)) * ln_2;
  }
}

/// Writes the rows of one warp, [16 m, columns] of them from query `first_query` on, through its
/// own rows [first_row, ...) of a shared tile. The warp must be done with these bytes.
template <class T, class Tile, bool any_alignment, class Output, class Block>
DEVICE void store_output(const Output& o, uint32_t tile, int first_row, const ForwardParams& p,
                         const Block& block, int first_query) {
  constexpr int rows = 16 * Output::m;
  store_fragments<T, Tile>(fragment_address<Tile, Output>(tile, first_row, 0), o);
  __syncwarp();
  uint16_t* const to =
      static_cast<uint16_t*>(p.o) + block.o_offset + int64_t{first_query} * p.o_strides.row;
  copy_rows<Tile, rows, warp_size, any_alignment>(tile + first_row * Tile::row_bytes, lane_index(),
                                                  to, p.o_strides.row, block.rows - first_query,
                                                  p.dv, p.aligned);
}

} // namespace anyflash
