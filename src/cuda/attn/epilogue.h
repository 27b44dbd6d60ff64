// O and L from the accumulators to global memory.
#pragma once

#include "cuda/attn/softmax.h"
#include "cuda/tile/shared_tile.h"

namespace anyflash {

constexpr float ln_2 = 0.6931471805599453f;

/// O /= l and L = ln(2^m l) for the rows of one warp, which start at query `first_query`. Rows
/// without a key, and those past the used length, get O = 0, L = -inf.
template <class Output, class State, class Block>
DEVICE void normalise(Output& o, State& state, const ForwardParams& p, const Block& block,
                      int first_query) {
  UNROLL
  for (int r = 0; r < Output::rows; ++r) {
    const int query = first_query + Output::row(r);
    const float l = row_sum(state.l[r]);
    const bool empty = !(l > 0) || query >= block.seqlen_q;
    const float inverse = empty ? 0 : 1 / l;
    UNROLL
    for (int c = 0; c < Output::columns; ++c) o(r, c) *= inverse;
    if (p.lse && lane_index() % 4 == 0 && query < block.rows)
      p.lse[block.lse_offset + query] = empty ? -infinity() : (state.m[r] + __log2f(l)) * ln_2;
  }
}

/// Writes the rows of one warp, [16 m, columns] of them from query `first_query` on, through its
/// own rows [first_row, ...) of a shared tile, so that global memory sees 16 bytes a thread. The
/// warp must be done with these bytes. any_alignment: rows of O may start anywhere.
template <class T, class Tile, bool any_alignment, class Output, class Block>
DEVICE void store_output(const Output& o, uint32_t tile, int first_row, const ForwardParams& p,
                         const Block& block, int first_query) {
  constexpr int tile_rows = 16 * Output::m;
  UNROLL
  for (int r = 0; r < Output::rows; ++r) {
    UNROLL
    for (int c = 0; c < Output::columns; c += 2) {
      // A multiple of 8: this thread's pair lies inside the chunk that starts there.
      const int column = Output::column_offset(c);
      st_shared(tile + Tile::at_chunk(first_row + Output::row(r), column / 8) +
                    Output::first_column() * 2,
                pack<T>(o(r, c), o(r, c + 1)));
    }
  }
  __syncwarp();

  uint16_t* const base = static_cast<uint16_t*>(p.o) + block.o_offset;
  constexpr int chunks = Tile::columns / 8; // a row
  UNROLL
  for (int i = 0; i < tile_rows * chunks / warp_size; ++i) {
    const int index = i * warp_size + lane_index();
    const int row = index / chunks, column = index % chunks * 8;
    const uint4 value = ld_shared_16(tile + Tile::at_chunk(first_row + row, column / 8));
    if (first_query + row >= block.rows) continue;
    uint16_t* const to = base + (first_query + row) * p.o_strides.row + column;
    if (!any_alignment || p.aligned) {
      if (column < p.dv) *reinterpret_cast<uint4*>(to) = value;
    } else {
      const uint32_t pairs[4] = {value.x, value.y, value.z, value.w};
      UNROLL
      for (int e = 0; e < 8; ++e)
        if (column + e < p.dv) to[e] = static_cast<uint16_t>(pairs[e / 2] >> e % 2 * 16);
    }
  }
}

} // namespace anyflash
