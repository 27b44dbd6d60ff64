// How a row of the backward spreads tiles over shared memory, and products over warps.
#pragma once

#include "cuda/sm80/shared_memory.h"
#include "cuda/tile/fragment.h"
#include "cuda/tile/shared_tile.h"
#include "cuda/tile/tile_store.h"

namespace anyflash::sm80 {

/// What follows from a row of the table. Each of the products spreads the warps over its result:
/// s_warps along the queries of S and dP, kv_warps along the keys of dK and dV, q_warps along the
/// queries of dQ; the others along the columns. With `split`, one half of the warps makes S and the
/// other dP, in tiles of twice the size: fewer operands leave shared memory. Columns of a head dim
/// are dealt out in steps of 16, in turn: any head dim divides, and a warp's place costs one XOR.
template <class Row>
struct Backward {
  static constexpr bool general = Row::general;
  static constexpr int threads = 32 * Row::warps;

  using QTile = SharedTile<Row::Br, Row::d>;
  using OTile = SharedTile<Row::Br, Row::dv>; // dO
  using KTile = SharedTile<Row::Bc, Row::d>;
  using VTile = SharedTile<Row::Bc, Row::dv>;
  using STile = SharedTile<Row::Br, Row::Bc>; // P, dS

  static constexpr int s_rows = Row::Br / Row::s_warps;
  static constexpr int score_warps = Row::warps / (Row::split ? 2 : 1); // warps that share S
  static constexpr int s_columns = Row::Bc * Row::s_warps / score_warps;
  static constexpr int kv_rows = Row::Bc / Row::kv_warps;
  static constexpr int kv_parts = Row::warps / Row::kv_warps; // of the columns of dK and dV
  static constexpr int q_rows = Row::Br / Row::q_warps;
  static constexpr int q_parts = Row::warps / Row::q_warps; // of the columns of dQ
  static constexpr int q_columns = Row::d / q_parts;
  static_assert(s_rows % 16 == 0 && s_columns % 16 == 0 && kv_rows % 16 == 0 && q_rows % 16 == 0);
  static_assert(Row::d % (16 * kv_parts) == 0 && Row::dv % (16 * kv_parts) == 0);
  static_assert(Row::d % (16 * q_parts) == 0);
  static_assert(!Row::split || Row::d == Row::dv); // one product serves as S and as dP

  using Scores = Accumulator<s_rows / 16, s_columns / 8>;
  using KeyGradient = Accumulator<kv_rows / 16, Row::d / kv_parts / 8>;
  using ValueGradient = Accumulator<kv_rows / 16, Row::dv / kv_parts / 8>;
  using QueryGradient = Accumulator<q_rows / 16, q_columns / 8>;

  static constexpr int k_begin = 0; // offsets in shared memory
  static constexpr int v_begin = k_begin + KTile::bytes;
  static constexpr int q_begin = v_begin + VTile::bytes;
  static constexpr int o_begin = q_begin + Row::q_stages * QTile::bytes;
  static constexpr int p_begin = o_begin + Row::o_stages * OTile::bytes;
  static constexpr int ds_begin = p_begin + STile::bytes;
  static_assert(ds_begin + STile::bytes == backward_shared_bytes(Row::d, Row::dv, Row::Br, Row::Bc,
                                                                 Row::q_stages, Row::o_stages));
};

/// Where this warp's parts of the products lie.
template <class Row>
struct WarpParts {
  using F = Backward<Row>;
  bool makes_dp; // with Row::split: dP and dS, not S and P
  int s_row, s_column;
  int kv_row, kv_part;
  int q_row, q_part;

  DEVICE WarpParts() {
    const int warp = warp_index();
    const int score_warp = warp % F::score_warps;
    makes_dp = warp >= F::score_warps;
    s_row = score_warp % Row::s_warps * F::s_rows;
    s_column = score_warp / Row::s_warps * F::s_columns;
    kv_row = warp % Row::kv_warps * F::kv_rows;
    kv_part = warp / Row::kv_warps;
    q_row = warp % Row::q_warps * F::q_rows;
    q_part = warp / Row::q_warps;
  }
};

/// This thread's place in the fragments of every operand, relative to the tiles: one register each.
template <class Row>
struct Readers {
  using F = Backward<Row>;
  using Q = FragmentReader<typename F::QTile>;
  using O = FragmentReader<typename F::OTile>;
  using K = FragmentReader<typename F::KTile>;
  using V = FragmentReader<typename F::VTile>;
  using S = FragmentReader<typename F::STile>;

  Q q_rows;         // Q as A: by queries
  O o_rows;         // dO as A
  K k_rows;         // K as B: by keys
  V v_rows;         // V as B
  S s_columns;      // P, dS as A, transposed: by keys
  Q q_columns;      // Q as B, transposed: by columns of d
  O o_columns;      // dO as B, transposed
  S s_rows;         // dS as A: by queries
  K k_columns;      // K as B, transposed
  uint32_t s_store; // where the accumulator of S goes

  DEVICE Readers(uint32_t shared, const WarpParts<Row>& part)
      : q_rows(Q::rows_first(shared, part.s_row)), o_rows(O::rows_first(shared, part.s_row)),
        k_rows(K::columns_first(shared, part.s_column)),
        v_rows(V::columns_first(shared, part.s_column)),
        s_columns(S::columns_first(shared).from_column(part.kv_row / 16)),
        q_columns(Q::rows_first(shared, 0).from_column(part.kv_part)),
        o_columns(O::rows_first(shared, 0).from_column(part.kv_part)),
        s_rows(S::rows_first(shared, part.q_row)),
        k_columns(K::rows_first(shared, 0).from_column(part.q_part)),
        s_store(fragment_address<typename F::STile, typename F::Scores>(shared, part.s_row,
                                                                        part.s_column)) {}
};

} // namespace anyflash::sm80
