// dQ, dK, dV with mma.sync: Ampere, Ada, and newer GPUs until they have kernels of their own.
// FlashAttention-2, Algorithm 2. Schedule, budgets, experiments: docs/kernels/sm80_backward.md.
#pragma once

#include "cuda/attn/key_block.h"
#include "cuda/attn/mask.h"
#include "cuda/attn/query_block.h"
#include "cuda/attn/score.h"
#include "cuda/ptx/atomic.h"
#include "cuda/ptx/mma.h"
#include "cuda/sm80/query_stream.h"
#include "cuda/sm80/turns.h"
#include "cuda/tile/tile_loader.h"
#include "cuda/tile/tile_store.h"

namespace anyflash::sm80 {

/// c = begin + A B over `steps` steps of 16: a(r, i, k) reads the fragment of rows 16 i, b(r, j, k)
/// that of columns 16 j, begin(c, i, n) gives the four elements of c that tile (i, n) starts from.
template <class T, int steps, class C, class Begin, class A, class B>
DEVICE void multiply(C& c, Begin begin, A a, B b) {
  UNROLL
  for (int k = 0; k < steps; ++k) {
    uint32_t rows[C::m][4];
    UNROLL
    for (int i = 0; i < C::m; ++i) a(rows[i], i, k);
    UNROLL
    for (int j = 0; j < C::n / 2; ++j) {
      uint32_t columns[4];
      b(columns, j, k);
      UNROLL
      for (int i = 0; i < C::m; ++i) {
        UNROLL
        for (int h = 0; h < 2; ++h) {
          float(&tile)[4] = c.x[i][2 * j + h];
          if (k == 0)
            mma_m16n8k16<T>(tile, rows[i], columns[2 * h], columns[2 * h + 1],
                            begin(c, i, 2 * j + h));
          else
            mma_m16n8k16<T>(tile, rows[i], columns[2 * h], columns[2 * h + 1], tile);
        }
      }
    }
  }
}

/// Beginnings of products: what is there, or zero.
struct Onto {
  template <class C>
  DEVICE const float (&operator()(const C& c, int i, int n) const)[4] {
    return c.x[i][n];
  }
};
struct FromZero {
  float zero[4] = {};
  template <class C>
  DEVICE const float (&operator()(const C&, int, int) const)[4] {
    return zero;
  }
};

DEVICE void copy(uint32_t (&to)[4], const uint32_t (&from)[4]) {
  UNROLL
  for (int e = 0; e < 4; ++e) to[e] = from[e];
}

/// K as B of S = Q K^T and V as B of dP = dO V^T: this warp's part, from shared memory or, with
/// `kv_in_registers`, kept in registers. With `split` a warp has one of them: own().
template <class Row>
class KeyOperands {
  using F = Backward<Row>;
  static constexpr bool held = Row::kv_in_registers;
  static constexpr int n = held ? F::s_columns / 16 : 1;
  static constexpr int k_steps = held ? Row::d / 16 : 1;
  static constexpr int v_steps = held ? Row::dv / 16 : 1;

public:
  DEVICE KeyOperands(const Readers<Row>& read, const WarpParts<Row>& part)
      : read_(read), own_begin_(part.makes_dp ? F::v_begin : F::k_begin) {}

  /// Once both tiles have landed.
  DEVICE void hold() {
    if constexpr (!held) return;
    UNROLL
    for (int j = 0; j < n; ++j) {
      UNROLL
      for (int k = 0; k < k_steps; ++k)
        read_.k_rows.read(k_[j][k], j, k, Row::split ? own_begin_ : F::k_begin);
      if constexpr (Row::split) continue;
      UNROLL
      for (int k = 0; k < v_steps; ++k) read_.v_rows.read(v_[j][k], j, k, F::v_begin);
    }
  }

  DEVICE void k(uint32_t (&r)[4], int j, int step) const {
    held ? copy(r, k_[j % n][step % k_steps]) : read_.k_rows.read(r, j, step, F::k_begin);
  }
  DEVICE void v(uint32_t (&r)[4], int j, int step) const {
    held ? copy(r, v_[j % n][step % v_steps]) : read_.v_rows.read(r, j, step, F::v_begin);
  }
  DEVICE void own(uint32_t (&r)[4], int j, int step) const {
    held ? copy(r, k_[j % n][step % k_steps]) : read_.k_rows.read(r, j, step, own_begin_);
  }

private:
  const Readers<Row>& read_;
  uint32_t own_begin_;
  uint32_t k_[n][k_steps][4], v_[Row::split ? 1 : n][Row::split ? 1 : v_steps][4];
};

/// L of each row of queries, in log2 units; +inf where there is nothing to differentiate.
template <class Scores>
struct RowLse {
  float x[Scores::rows];

  DEVICE explicit RowLse(const float* stats) {
    UNROLL
    for (int r = 0; r < Scores::rows; ++r) x[r] = stats[2 * Scores::row(r)];
  }
};

/// Where dP - delta begins: -delta of each row, delta = rowsum(dO * O) - dL.
template <class Scores>
struct FromDelta {
  float rows[Scores::m][4];

  DEVICE explicit FromDelta(const float* stats) {
    UNROLL
    for (int r = 0; r < Scores::rows; ++r)
      rows[r / 2][r % 2 * 2] = rows[r / 2][r % 2 * 2 + 1] = stats[2 * Scores::row(r) + 1];
  }
  DEVICE const float (&operator()(const Scores&, int i, int) const)[4] { return rows[i]; }

  /// For a product that was not begun here.
  DEVICE void add_to(Scores& dp) const {
    UNROLL
    for (int r = 0; r < Scores::rows; ++r) {
      UNROLL
      for (int c = 0; c < Scores::columns; ++c) dp(r, c) += rows[r / 2][r % 2 * 2];
    }
  }
};

/// S becomes P = exp2(factor S - L).
template <class Scores>
DEVICE void probabilities(Scores& s, const RowLse<Scores>& lse, float factor) {
  UNROLL
  for (int r = 0; r < Scores::rows; ++r) {
    UNROLL
    for (int c = 0; c < Scores::columns; ++c)
      s(r, c) = exp2_approx(fmaf(s(r, c), factor, -lse.x[r]));
  }
}

/// dP - delta becomes dS = P (dP - delta).
template <class Scores>
DEVICE void score_gradients(Scores& dp, const Scores& p) {
  UNROLL
  for (int r = 0; r < Scores::rows; ++r) {
    UNROLL
    for (int c = 0; c < Scores::columns; ++c) dp(r, c) *= p(r, c);
  }
}

/// 1 - tanh^2 of the scores, in 16 bit: tanh itself is no more exact. Only where softcap can be on.
template <class Scores, bool general>
struct SoftcapDerivative {
  uint32_t pairs[general ? Scores::rows : 1][general ? Scores::columns / 2 : 1];

  DEVICE void keep(const Scores& t, const AttentionParams& p) {
    if (p.softcap_in == 0) return;
    UNROLL
    for (int r = 0; r < Scores::rows; ++r) {
      UNROLL
      for (int c = 0; c < Scores::columns; c += 2)
        pairs[r][c / 2] = pack<fp16>(1 - t(r, c) * t(r, c), 1 - t(r, c + 1) * t(r, c + 1));
    }
  }

  /// P becomes the factor of dP - delta in the gradient of Q K^T.
  DEVICE void apply(Scores& probabilities, const AttentionParams& p) const {
    if (p.softcap_in == 0) return;
    UNROLL
    for (int r = 0; r < Scores::rows; ++r) {
      UNROLL
      for (int c = 0; c < Scores::columns; c += 2) {
        const float2 derivative = unpack<fp16>(pairs[r][c / 2]);
        probabilities(r, c) *= derivative.x;
        probabilities(r, c + 1) *= derivative.y;
      }
    }
  }
};

/// Element e of fragment (m, n) of a warp's part of dQ in the workspace: the order of registers, so
/// that a warp adds to neighbouring addresses.
template <class Fragment>
DEVICE int64_t fragment_order(int m, int n, int e) {
  const int within = has_vector_red ? lane_index() * 4 + e : e * warp_size + lane_index();
  return (m * Fragment::n + n) * 4 * warp_size + within;
}

template <class Fragment>
DEVICE void add_fragment(float* sum, int m, int n, const float (&x)[4]) {
  if constexpr (has_vector_red) {
    red_add_4(sum + fragment_order<Fragment>(m, n, 0), x);
  } else {
    UNROLL
    for (int e = 0; e < 4; ++e) red_add(sum + fragment_order<Fragment>(m, n, e), x[e]);
  }
}

/// sum += A B in global memory, as multiply makes it; 16 columns at a time where the fragments of A
/// fit registers, so that the additions of each leave under the product of the next.
template <class T, int steps, class Fragment, class A, class B>
DEVICE void add_product(float* sum, A a, B b) {
  constexpr bool held = steps <= 4;
  constexpr int n = held ? 2 : Fragment::n;
  uint32_t rows[held ? steps : 1][Fragment::m][4];
  if constexpr (held) {
    UNROLL
    for (int k = 0; k < steps; ++k) {
      UNROLL
      for (int i = 0; i < Fragment::m; ++i) a(rows[k][i], i, k);
    }
  }
  UNROLL
  for (int begin = 0; begin < Fragment::n; begin += n) {
    Accumulator<Fragment::m, n> x;
    multiply<T, steps>(
        x, FromZero{},
        [&](auto& r, int i, int k) {
          held ? copy(r, rows[k % (held ? steps : 1)][i]) : a(r, i, k);
        },
        [&](auto& r, int j, int k) { b(r, begin / 2 + j, k); });
    UNROLL
    for (int i = 0; i < Fragment::m; ++i) {
      UNROLL
      for (int j = 0; j < n; ++j) add_fragment<Fragment>(sum, i, begin + j, x.x[i][j]);
    }
  }
}

/// One key block: dK, dV of it, and its part of dQ of every query that sees it.
template <class Row>
DEVICE void backward(const BackwardParams& p) {
  using F = Backward<Row>;
  using T = typename Row::T;
  using STile = typename F::STile;
  extern __shared__ __align__(1024) char shared_memory[];

  const BlockFacts<Row> facts(p, blockIdx.x);
  if (facts.keys.outside()) return;
  const KeyBlock<Row>& block = facts.keys;
  const uint32_t shared = shared_address(shared_memory);

  const TileLoader<typename F::KTile, F::threads, F::general> k_loader(
      static_cast<const uint16_t*>(p.k) + block.key_offset(p.k_strides), p.k_strides.row, p.d,
      p.aligned);
  const TileLoader<typename F::VTile, F::threads, F::general> v_loader(
      static_cast<const uint16_t*>(p.v) + block.key_offset(p.v_strides), p.v_strides.row, p.dv,
      p.aligned);
  k_loader.load(shared + F::k_begin, block.first_key, block.seqlen_k - block.first_key);
  v_loader.load(shared + F::v_begin, block.first_key, block.seqlen_k - block.first_key);
  QueryStream<Row> stream(p, block, facts.queries, shared);
  stream.start();

  const WarpParts<Row> part;
  const Readers<Row> read(shared, part);
  KeyOperands<Row> keys(read, part);
  if constexpr (Row::kv_in_registers) {
    cp_async_wait<0>();
    __syncthreads();
    keys.hold();
  }
  Turns<Row> turns(p, facts, stream);
  typename F::KeyGradient dk;
  typename F::ValueGradient dv;
  dk.clear();
  dv.clear();

  ROLLED
  for (; !stream.done(); stream.next()) {
    const Position at = stream.position();
    const int first_query = at.i * Row::Br + part.s_row;
    const uint32_t q_tile = stream.q_tile(), o_tile = stream.o_tile();
    stream.wait();
    turns.look();

    const float* const stats = p.row_stats + (facts.row_of(p, at) + part.s_row) * 2;
    const RowLse<typename F::Scores> lse(stats);
    const auto scores_to_probabilities = [&](typename F::Scores& s, auto& cap) {
      if constexpr (F::general) {
        apply_softcap(s, p);
        cap.keep(s, p);
        apply_alibi(s, block, alibi_slope(p, block.sequence, block.head_k * p.group.divisor + at.g),
                    first_query, block.first_key + part.s_column);
      }
      if (facts.queries.on_edge(at.i))
        mask<true>(s, p, block, first_query, block.first_key + part.s_column);
      probabilities(s, lse, p.factor);
      store_fragments<T, STile>(read.s_store + F::p_begin, s);
      if constexpr (F::general) cap.apply(s, p);
    };
    SoftcapDerivative<typename F::Scores, F::general> cap;
    if constexpr (Row::split) {
      typename F::Scores x;
      multiply<T, Row::d / 16>( // S = Q K^T, or dP = dO V^T
          x, FromZero{},
          [&](auto& r, int i, int k) {
            read.q_rows.read(r, i, k, part.makes_dp ? o_tile : q_tile);
          },
          [&](auto& r, int j, int k) { keys.own(r, j, k); });
      if (!part.makes_dp) {
        scores_to_probabilities(x, cap);
        if (F::general && p.softcap_in != 0)
          store_fragments<T, STile>(read.s_store + F::ds_begin, x);
      }
      __syncthreads();
      if (part.makes_dp) {
        typename F::Scores s;
        load_fragments<T, STile>(
            read.s_store + (F::general && p.softcap_in != 0 ? F::ds_begin : F::p_begin), s);
        FromDelta<typename F::Scores>(stats).add_to(x);
        score_gradients(x, s);
        store_fragments<T, STile>(read.s_store + F::ds_begin, x);
      }
    } else {
      typename F::Scores s, dp;
      multiply<T, Row::d / 16>( // S = Q K^T
          s, FromZero{}, [&](auto& r, int i, int k) { read.q_rows.read(r, i, k, q_tile); },
          [&](auto& r, int j, int k) { keys.k(r, j, k); });
      const FromDelta<typename F::Scores> from_delta(stats);
      scores_to_probabilities(s, cap);
      multiply<T, Row::dv / 16>( // dP - delta = dO V^T - delta
          dp, from_delta, [&](auto& r, int i, int k) { read.o_rows.read(r, i, k, o_tile); },
          [&](auto& r, int j, int k) { keys.v(r, j, k); });
      score_gradients(dp, s);
      store_fragments<T, STile>(read.s_store + F::ds_begin, dp);
      turns.await();
      __syncthreads();
      turns.pass_on();
    }

    multiply<T, Row::Br / 16>( // dV += P^T dO
        dv, Onto{},
        [&](auto& r, int i, int k) { read.s_columns.read_transposed(r, k, i, F::p_begin); },
        [&](auto& r, int j, int k) {
          read.o_columns.read_transposed(r, k, F::kv_parts * j, o_tile);
        });
    if constexpr (Row::split) {
      turns.await();
      __syncthreads(); // dS is whole
      turns.pass_on();
    }
    stream.release_gradients();
    multiply<T, Row::Br / 16>( // dK += dS^T Q
        dk, Onto{},
        [&](auto& r, int i, int k) { read.s_columns.read_transposed(r, k, i, F::ds_begin); },
        [&](auto& r, int j, int k) {
          read.q_columns.read_transposed(r, k, F::kv_parts * j, q_tile);
        });
    stream.release_queries();
    add_product<T, Row::Bc / 16, typename F::QueryGradient>( // dQ += dS K
        p.dq_sum + facts.row_of(p, at) * Row::d + warp_index() * (F::q_rows * F::q_columns),
        [&](auto& r, int i, int k) { read.s_rows.read(r, i, k, F::ds_begin); },
        [&](auto& r, int j, int k) {
          read.k_columns.read_transposed(r, k, F::q_parts * j, F::k_begin);
        });
  }

  // dK and dV leave through the tiles of K and V.
  UNROLL
  for (auto& row : dk.x) {
    UNROLL
    for (auto& tile : row) {
      UNROLL
      for (float& x : tile) x *= p.scale;
    }
  }
  cp_async_wait<0>(); // without a query that sees these keys, K and V are still on their way
  __syncthreads();
  turns.pass_on();
  const int column = part.kv_part * 16;
  store_fragments<T, typename F::KTile, F::kv_parts>(
      fragment_address<typename F::KTile, typename F::KeyGradient>(shared + F::k_begin, part.kv_row,
                                                                   column),
      dk);
  store_fragments<T, typename F::VTile, F::kv_parts>(
      fragment_address<typename F::VTile, typename F::ValueGradient>(shared + F::v_begin,
                                                                     part.kv_row, column),
      dv);
  __syncthreads();
  const KeyBlock<Row> out(p, recomputed(blockIdx.x));
  const int rows = out.rows - out.first_key;
  copy_rows<typename F::KTile, Row::Bc, F::threads, F::general>(
      shared + F::k_begin, threadIdx.x,
      static_cast<uint16_t*>(p.dk) + out.key_offset(p.dk_strides) +
          int64_t{out.first_key} * p.dk_strides.row,
      p.dk_strides.row, rows, p.d, p.aligned);
  copy_rows<typename F::VTile, Row::Bc, F::threads, F::general>(
      shared + F::v_begin, threadIdx.x,
      static_cast<uint16_t*>(p.dv_out) + out.key_offset(p.dv_strides) +
          int64_t{out.first_key} * p.dv_strides.row,
      p.dv_strides.row, rows, p.dv, p.aligned);
}

/// Before the main kernel, one block of Br queries of one head: row_stats; dq_sum and turns = 0.
template <class Row>
DEVICE void backward_pre(const BackwardParams& p) {
  using F = Backward<Row>;
  using T = typename Row::T;
  // A group of lanes takes a row, 8 columns a lane.
  constexpr int lanes = Row::dv <= 64 ? 8 : Row::dv <= 128 ? 16 : 32;
  const QueryBlock<Row> block(p, blockIdx.x);
  if (block.outside()) return;
  const int64_t first_row = workspace_row<Row>(p, block.sequence, block.head) + block.first_query;

  float4* const sum = reinterpret_cast<float4*>(p.dq_sum + first_row * Row::d) + threadIdx.x;
  UNROLL
  for (int i = 0; i < Row::Br * Row::d / 4 / F::threads; ++i) sum[i * F::threads] = {0, 0, 0, 0};
  if (p.turns && threadIdx.x == 0) p.turns[first_row / Row::Br] = 0;

  const uint16_t* const o = static_cast<const uint16_t*>(p.o) + block.o_offset;
  const uint16_t* const dout = static_cast<const uint16_t*>(p.dout) + block.offset(p.dout_strides);
  const int column = threadIdx.x % lanes * 8;
  UNROLL
  for (int pass = 0; pass < Row::Br * lanes / F::threads; ++pass) {
    const int row = pass * (F::threads / lanes) + threadIdx.x / lanes;
    const int query = block.first_query + row;
    const bool used = query < block.seqlen_q;
    const uint4 a = load_chunk<F::general>(o + query * p.o_strides.row + column,
                                           used ? p.dv - column : 0, p.aligned);
    const uint4 b = load_chunk<F::general>(dout + query * p.dout_strides.row + column,
                                           used ? p.dv - column : 0, p.aligned);
    float delta = dot<T>(a.x, b.x) + dot<T>(a.y, b.y) + dot<T>(a.z, b.z) + dot<T>(a.w, b.w);
    UNROLL
    for (int distance = lanes / 2; distance; distance /= 2)
      delta += __shfl_xor_sync(0xffffffff, delta, distance);
    if (column == 0) {
      const float lse = used ? p.lse[block.lse_offset + query] : -infinity();
      if (used && p.dlse) delta -= p.dlse[block.lse_offset + query];
      const bool empty = lse == -infinity();
      reinterpret_cast<float2*>(p.row_stats)[first_row + row] = {empty ? infinity() : lse * log2_e,
                                                                 empty ? 0 : -delta};
    }
  }
}

/// After the main kernel, one block of Br queries of one head: dQ = scale dq_sum in T.
template <class Row>
DEVICE void backward_post(const BackwardParams& p) {
  using F = Backward<Row>;
  using T = typename Row::T;
  using Fragment = typename F::QueryGradient;
  __shared__ __align__(1024) char shared_memory[F::QTile::bytes];
  const QueryBlock<Row> block(p, blockIdx.x);
  if (block.outside()) return;
  const uint32_t tile = shared_address(shared_memory);
  const WarpParts<Row> part;
  const float* const sum =
      p.dq_sum + (workspace_row<Row>(p, block.sequence, block.head) + block.first_query) * Row::d +
      warp_index() * (F::q_rows * F::q_columns);
  Fragment dq;
  UNROLL
  for (int m = 0; m < Fragment::m; ++m) {
    UNROLL
    for (int n = 0; n < Fragment::n; ++n) {
      UNROLL
      for (int e = 0; e < 4; ++e) dq.x[m][n][e] = sum[fragment_order<Fragment>(m, n, e)] * p.scale;
    }
  }
  store_fragments<T, typename F::QTile, F::q_parts>(
      fragment_address<typename F::QTile, Fragment>(tile, part.q_row, part.q_part * 16), dq);
  __syncthreads();
  copy_rows<typename F::QTile, Row::Br, F::threads, F::general>(
      tile, threadIdx.x,
      static_cast<uint16_t*>(p.dq) + block.offset(p.dq_strides) +
          int64_t{block.first_query} * p.dq_strides.row,
      p.dq_strides.row, block.rows - block.first_query, p.d, p.aligned);
}

} // namespace anyflash::sm80
