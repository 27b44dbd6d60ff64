// What comes before and after the main kernel of the sm90 backward, and what leaves it.
#pragma once

#include "cuda/attn/key_block.h"
#include "cuda/attn/query_block.h"
#include "cuda/ptx/dependent.h"
#include "cuda/ptx/store.h"
#include "cuda/sm90/backward/layout.h"
#include "cuda/sm90/params.h"
#include "cuda/tile/tile_loader.h"
#include "cuda/tile/tile_store.h"

namespace anyflash::sm90 {

/// Where thread `thread` of a consumer finds its first four sums of dQ of a block of queries: those
/// of the next 8 columns are 4 * 128 floats further on.
template <class Row>
DEVICE float* query_sums(const anyflash::BackwardParams& p, int64_t first_row, int consumer,
                         int thread) {
  return p.dq_sum + first_row * Row::d + consumer * (64 * Backward<Row>::q_columns) + thread * 4;
}

/// Rows of a matrix in global memory that one warp of an accumulator's writes, 16 of them.
struct RowsOut {
  uint16_t* first;
  int64_t row_stride;
  int rows_valid, columns; // that exist from there on
};

/// Rounds 32 columns of these rows, times `scale`, and stores them; c: the accumulator's first of
/// them. The four threads of a row hold 2 columns each of every 8; they exchange what they have, so
/// that each stores 8 columns, 16 bytes.
template <class Row, class Fragment>
DEVICE void store_32_columns(const Fragment& x, int c, float scale, const RowsOut& to) {
  using T = typename Row::T;
  const int lane = lane_index();
  const bool odd = lane & 1, high = lane & 2;
  UNROLL
  for (int r = 0; r < Fragment::rows; ++r) {
    uint32_t pairs[4];
    UNROLL
    for (int i = 0; i < 4; ++i)
      pairs[i] = pack<T>(x(r, c + 2 * i) * scale, x(r, c + 2 * i + 1) * scale);
    // Neighbours: even threads get 8-column tiles 0 and 2, odd ones 1 and 3, two pairs of each.
    const uint32_t got_0 = __shfl_xor_sync(0xffffffff, odd ? pairs[0] : pairs[1], 1);
    const uint32_t got_2 = __shfl_xor_sync(0xffffffff, odd ? pairs[2] : pairs[3], 1);
    const uint2 low = odd ? uint2{got_0, pairs[1]} : uint2{pairs[0], got_0};
    const uint2 tall = odd ? uint2{got_2, pairs[3]} : uint2{pairs[2], got_2};
    // Two apart: the lower threads get the rest of tiles 0 and 1, the higher of 2 and 3.
    const uint32_t rest_x = __shfl_xor_sync(0xffffffff, high ? low.x : tall.x, 2);
    const uint32_t rest_y = __shfl_xor_sync(0xffffffff, high ? low.y : tall.y, 2);
    const int row = Fragment::row(r), column = c * 4 + lane % 4 * 8;
    if (row >= to.rows_valid || column >= to.columns) continue;
    uint16_t* const at = to.first + row * to.row_stride + column;
    const uint4 eight =
        high ? uint4{rest_x, rest_y, tall.x, tall.y} : uint4{low.x, low.y, rest_x, rest_y};
    if constexpr (Backward<Row>::general)
      *reinterpret_cast<uint4*>(at) = eight; // four neighbouring registers are too many to ask for
    else
      store_16(at, eight);
  }
}

/// dQ = 0 of a block of queries that see no key: nobody will add to it.
template <class Row>
DEVICE void zero_query_gradient(const BackwardParams& p, const QueryBlock<Row>& block) {
  constexpr int chunks = Row::d / 8; // a row
  auto* const dq = static_cast<uint16_t*>(p.dq) + block.offset(p.dq_strides);
  ROLLED
  for (int i = threadIdx.x; i < Row::Br * chunks; i += Row::end_threads) {
    const int row = block.first_query + i / chunks, column = i % chunks * 8;
    if (row < block.rows && column < p.d)
      *reinterpret_cast<uint4*>(dq + row * p.dq_strides.row + column) = {0, 0, 0, 0};
  }
}

/// Before the main kernel, one block of Br queries of one head: row_stats; turns and counters = 0,
/// and dq_sum, as far as the main kernel does not do it itself (zero_sums.h) or in turns stores
/// first.
template <class Row>
DEVICE void backward_pre(const BackwardParams& p) {
  using T = typename Row::T;
  constexpr int threads = Row::end_threads;
  // A group of lanes takes a row, 8 columns a lane.
  constexpr int lanes = Row::dv <= 64 ? 8 : Row::dv <= 128 ? 16 : 32;
  let_next_kernel_start();
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.tickets = 0;
  if (p.zeroed && threadIdx.x == 0 && blockIdx.x < p.key_heads.divisor * p.batch)
    p.zeroed[blockIdx.x] = 0;
  const QueryBlock<Row> block(p, blockIdx.x);
  if (block.outside()) return;
  const int64_t first_row = workspace_row<Row>(p, block.sequence, block.head) + block.first_query;

  const uint32_t head_index = block.sequence * p.key_heads.divisor + divide(block.head, p.group);
  if (!p.turns && (!p.zeroed || head_index < p.heads_ahead)) {
    float4* const sum = reinterpret_cast<float4*>(p.dq_sum + first_row * Row::d) + threadIdx.x;
    UNROLL
    for (int i = 0; i < Row::Br * Row::d / 4 / threads; ++i) sum[i * threads] = {0, 0, 0, 0};
  }
  if (p.turns && threadIdx.x == 0) p.turns[first_row / Row::Br] = 0;
  if (Backward<Row>::finishes && p.turns && block.keys(p).empty())
    zero_query_gradient<Row>(p, block);

  const uint16_t* const o = static_cast<const uint16_t*>(p.o) + block.o_offset;
  const uint16_t* const dout = static_cast<const uint16_t*>(p.dout) + block.offset(p.dout_strides);
  float* const stats = p.row_stats + first_row * 2;
  const int column = threadIdx.x % lanes * 8;
  UNROLL
  for (int pass = 0; pass < Row::Br * lanes / threads; ++pass) {
    const int row = pass * (threads / lanes) + threadIdx.x / lanes;
    const int query = block.first_query + row;
    const bool used = query < block.seqlen_q;
    const uint4 a =
        load_chunk<false>(o + query * p.o_strides.row + column, used ? p.dv - column : 0, true);
    const uint4 b = load_chunk<false>(dout + query * p.dout_strides.row + column,
                                      used ? p.dv - column : 0, true);
    float delta = dot<T>(a.x, b.x) + dot<T>(a.y, b.y) + dot<T>(a.z, b.z) + dot<T>(a.w, b.w);
    UNROLL
    for (int distance = lanes / 2; distance; distance /= 2)
      delta += __shfl_xor_sync(0xffffffff, delta, distance);
    if (column == 0) {
      const float lse = used ? p.lse[block.lse_offset + query] : -infinity();
      if (used && p.dlse) delta -= p.dlse[block.lse_offset + query];
      const bool empty = lse == -infinity();
      stats[row] = empty ? infinity() : lse * log2_e;
      stats[Row::Br + row] = empty ? 0 : delta;
    }
  }
}

/// After the main kernel, one block of Br queries of one head: dQ = scale dq_sum in T. Eight warps,
/// each with the sums of one of the main kernel's.
template <class Row>
DEVICE void backward_post(const BackwardParams& p) {
  using F = Backward<Row>;
  wait_for_kernel_before();
  const QueryBlock<Row> block(p, blockIdx.x);
  if (block.outside()) return;
  const int part = warp_index() / 4;
  const float* const sum =
      query_sums<Row>(p, workspace_row<Row>(p, block.sequence, block.head) + block.first_query,
                      part, threadIdx.x % warpgroup_size);
  const bool never_stored = p.turns && block.keys(p).empty();
  typename F::QueryGradient dq;
  dq.clear();
  UNROLL
  for (int tile = 0; tile < F::q_columns / 8; ++tile) {
    if (tile >= F::q_tiles(part) || never_stored) continue;
    const float4 four = *reinterpret_cast<const float4*>(sum + tile * 4 * warpgroup_size);
    dq.x[4 * tile] = four.x;
    dq.x[4 * tile + 1] = four.y;
    dq.x[4 * tile + 2] = four.z;
    dq.x[4 * tile + 3] = four.w;
  }
  const int row = F::part_row(part) + warp_index() % 4 * 16, column = F::part_column(part);
  const RowsOut to = {static_cast<uint16_t*>(p.dq) + block.offset(p.dq_strides) +
                          (int64_t{block.first_query} + row) * p.dq_strides.row + column,
                      p.dq_strides.row, block.rows - block.first_query - row,
                      min(p.d - column, F::q_tiles(part) * 8)};
  UNROLL
  for (int c = 0; c < dq.columns; c += 8) store_32_columns<Row>(dq, c, p.scale, to);
}

} // namespace anyflash::sm90
