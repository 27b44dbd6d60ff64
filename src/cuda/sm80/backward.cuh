// dQ, dK, dV with mma.sync: Ampere, Ada, and newer GPUs until they have kernels of their own.
// FlashAttention-2, Algorithm 2. Schedule, budgets, experiments: docs/kernels/sm80_backward.md.
#pragma once

#include "cuda/attn/key_block.h"
#include "cuda/attn/mask.h"
#include "cuda/attn/query_block.h"
#include "cuda/attn/score.h"
#include "cuda/ptx/atomic.h"
#include "cuda/ptx/mma.h"
#include "cuda/sm80/shared_memory.h"
#include "cuda/tile/tile_loader.h"
#include "cuda/tile/tile_store.h"

namespace anyflash::sm80 {

/// What follows from a row of the table. Each of the products spreads the warps over its result:
/// s_warps along the queries of S and dP, kv_warps along the keys of dK and dV, q_warps along the
/// queries of dQ; the others along the columns.
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
  static constexpr int s_columns = Row::Bc * Row::s_warps / Row::warps;
  static constexpr int kv_rows = Row::Bc / Row::kv_warps;
  static constexpr int k_columns = Row::d * Row::kv_warps / Row::warps;
  static constexpr int v_columns = Row::dv * Row::kv_warps / Row::warps;
  static constexpr int q_rows = Row::Br / Row::q_warps;
  static constexpr int q_columns = Row::d * Row::q_warps / Row::warps;

  using Scores = Accumulator<s_rows / 16, s_columns / 8>;
  using KeyGradient = Accumulator<kv_rows / 16, k_columns / 8>;
  using ValueGradient = Accumulator<kv_rows / 16, v_columns / 8>;
  using QueryGradient = Accumulator<q_rows / 16, q_columns / 8>;

  static constexpr int k_begin = 0; // offsets in shared memory
  static constexpr int v_begin = k_begin + KTile::bytes;
  static constexpr int q_begin = v_begin + VTile::bytes;
  static constexpr int o_begin = q_begin + Row::q_stages * QTile::bytes;
  static constexpr int p_begin = o_begin + Row::o_stages * OTile::bytes;
  static constexpr int ds_begin = p_begin + STile::bytes;
};

/// c += A B over `steps` steps of 16: a(r, i, k) reads the fragment of rows 16 i, b(r, j, k) that of
/// columns 16 j.
template <class T, int steps, class C, class A, class B>
DEVICE void multiply(C& c, A a, B b) {
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
        mma_m16n8k16<T>(c.x[i][2 * j], rows[i], columns[0], columns[1]);
        mma_m16n8k16<T>(c.x[i][2 * j + 1], rows[i], columns[2], columns[3]);
      }
    }
  }
}

/// Which query head of the group and which block of queries comes next: heads outermost.
struct Position {
  int g, i;
};

/// Streams Q and dO of the queries that see a key block through their stages in shared memory, for
/// each query head of the group. With two stages a block is loaded while the one before is used.
template <class Row>
class QueryStream {
  using F = Backward<Row>;

public:
  DEVICE QueryStream(const BackwardParams& p, const KeyBlock<Row>& block, const KeyBlocks& blocks,
                     uint32_t shared)
      : q_(static_cast<const uint16_t*>(p.q) +
               block.query_offset(p.q_strides, block.head_k * p.group.divisor),
           p.q_strides.row, p.d, p.aligned),
        o_(static_cast<const uint16_t*>(p.dout) +
               block.query_offset(p.dout_strides, block.head_k * p.group.divisor),
           p.dout_strides.row, p.dv, p.aligned),
        p_(p), shared_(shared),
        seqlen_q_(block.seqlen_q), begin_(blocks.begin), end_(blocks.end),
        heads_(blocks.empty() ? 0 : p.group.divisor), now_{0, blocks.begin} {}

  /// Before the loop; K and V belong to the same group of copies.
  DEVICE void start() {
    load_queries(now_, 0);
    load_gradients(now_, 0);
    cp_async_commit();
  }

  DEVICE bool done() const { return now_.g >= heads_; }
  DEVICE Position position() const { return now_; }

  /// This block's Q and dO have landed, and every warp is done with the block before.
  DEVICE void wait() {
    cp_async_wait<0>();
    __syncthreads();
    if constexpr (Row::q_stages == 2) load_queries(following(), stage_ ^ 1);
    if constexpr (Row::o_stages == 2) load_gradients(following(), stage_ ^ 1);
    if constexpr (Row::q_stages == 2 || Row::o_stages == 2) cp_async_commit();
  }

  /// This warp is done with dO, or with Q; the single stage is refilled once all warps are.
  DEVICE void release_gradients() {
    if constexpr (Row::o_stages == 1) {
      __syncthreads();
      load_gradients(following(), 0);
      cp_async_commit();
    }
  }
  DEVICE void release_queries() {
    if constexpr (Row::q_stages == 1) {
      __syncthreads();
      load_queries(following(), 0);
      cp_async_commit();
    }
  }

  DEVICE void next() {
    now_ = following();
    stage_ ^= 1;
  }

  /// Offsets of the current stages in shared memory.
  DEVICE uint32_t q_tile() const {
    return F::q_begin + (Row::q_stages == 2 ? stage_ * F::QTile::bytes : 0);
  }
  DEVICE uint32_t o_tile() const {
    return F::o_begin + (Row::o_stages == 2 ? stage_ * F::OTile::bytes : 0);
  }

private:
  DEVICE Position following() const {
    return now_.i + 1 < end_ ? Position{now_.g, now_.i + 1} : Position{now_.g + 1, begin_};
  }
  DEVICE void load_queries(Position at, int stage) {
    if (at.g < heads_)
      q_.load(shared_ + F::q_begin + stage * F::QTile::bytes, int64_t{at.i} * Row::Br,
              seqlen_q_ - at.i * Row::Br, at.g * p_.q_strides.head);
  }
  DEVICE void load_gradients(Position at, int stage) {
    if (at.g < heads_)
      o_.load(shared_ + F::o_begin + stage * F::OTile::bytes, int64_t{at.i} * Row::Br,
              seqlen_q_ - at.i * Row::Br, at.g * p_.dout_strides.head);
  }

  TileLoader<typename F::QTile, F::threads, F::general> q_;
  TileLoader<typename F::OTile, F::threads, F::general> o_;
  const BackwardParams& p_;
  uint32_t shared_;
  int seqlen_q_;
  int begin_, end_, heads_;
  Position now_;
  int stage_ = 0;
};

/// Where this warp's parts of the products lie.
template <class Row>
struct WarpParts {
  using F = Backward<Row>;
  int s_row, s_column;
  int kv_row, k_column, v_column;
  int q_row, q_column;

  DEVICE WarpParts() {
    const int warp = warp_index();
    s_row = warp % Row::s_warps * F::s_rows;
    s_column = warp / Row::s_warps * F::s_columns;
    kv_row = warp % Row::kv_warps * F::kv_rows;
    k_column = warp / Row::kv_warps * F::k_columns;
    v_column = warp / Row::kv_warps * F::v_columns;
    q_row = warp % Row::q_warps * F::q_rows;
    q_column = warp / Row::q_warps * F::q_columns;
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
        q_columns(Q::rows_first(shared, 0).from_column(part.k_column / 16)),
        o_columns(O::rows_first(shared, 0).from_column(part.v_column / 16)),
        s_rows(S::rows_first(shared, part.q_row)),
        k_columns(K::rows_first(shared, 0).from_column(part.q_column / 16)),
        s_store(fragment_address<typename F::STile, typename F::Scores>(shared, part.s_row,
                                                                        part.s_column)) {}
};

/// What the backward knows of a row of queries: L in log2 units, +inf where there is nothing to
/// differentiate, and delta = rowsum(dO * O) - dL.
template <class Scores>
struct RowStats {
  float lse[Scores::rows], delta[Scores::rows];

  DEVICE RowStats(const float* stats) {
    UNROLL
    for (int r = 0; r < Scores::rows; ++r) {
      const float2 pair = reinterpret_cast<const float2*>(stats)[Scores::row(r)];
      lse[r] = pair.x;
      delta[r] = pair.y;
    }
  }
};

/// S becomes P = exp2(factor S - L).
template <class Scores>
DEVICE void probabilities(Scores& s, const RowStats<Scores>& stats, float factor) {
  UNROLL
  for (int r = 0; r < Scores::rows; ++r) {
    UNROLL
    for (int c = 0; c < Scores::columns; ++c)
      s(r, c) = exp2_approx(fmaf(s(r, c), factor, -stats.lse[r]));
  }
}

/// dP becomes dS = P (dP - delta).
template <class Scores>
DEVICE void score_gradients(Scores& dp, const Scores& p, const RowStats<Scores>& stats) {
  UNROLL
  for (int r = 0; r < Scores::rows; ++r) {
    UNROLL
    for (int c = 0; c < Scores::columns; ++c) dp(r, c) = p(r, c) * (dp(r, c) - stats.delta[r]);
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
DEVICE void add_fragments(float* sum, const Fragment& x) {
  UNROLL
  for (int m = 0; m < Fragment::m; ++m) {
    UNROLL
    for (int n = 0; n < Fragment::n; ++n) {
      if constexpr (has_vector_red) {
        red_add_4(sum + fragment_order<Fragment>(m, n, 0), x.x[m][n]);
      } else {
        UNROLL
        for (int e = 0; e < 4; ++e) red_add(sum + fragment_order<Fragment>(m, n, e), x.x[m][n][e]);
      }
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

  const KeyBlock<Row> block(p, blockIdx.x);
  if (block.outside()) return;
  const KeyBlocks blocks = block.queries(p);
  const uint32_t shared = shared_address(shared_memory);

  const TileLoader<typename F::KTile, F::threads, F::general> k_loader(
      static_cast<const uint16_t*>(p.k) + block.key_offset(p.k_strides), p.k_strides.row, p.d,
      p.aligned);
  const TileLoader<typename F::VTile, F::threads, F::general> v_loader(
      static_cast<const uint16_t*>(p.v) + block.key_offset(p.v_strides), p.v_strides.row, p.dv,
      p.aligned);
  k_loader.load(shared + F::k_begin, block.first_key, block.seqlen_k - block.first_key);
  v_loader.load(shared + F::v_begin, block.first_key, block.seqlen_k - block.first_key);
  QueryStream<Row> stream(p, block, blocks, shared);
  stream.start();

  const int first_head = block.head_k * p.group.divisor;
  const int64_t head_row = workspace_row<Row>(p, block.sequence, first_head);
  const WarpParts<Row> part;
  const Readers<Row> read(shared, part);
  typename F::KeyGradient dk;
  typename F::ValueGradient dv;
  dk.clear();
  dv.clear();

  ROLLED
  for (; !stream.done(); stream.next()) {
    const Position at = stream.position();
    const int64_t first_row = head_row + at.g * p.padded_rows + at.i * Row::Br;
    const int first_query = at.i * Row::Br + part.s_row;
    const uint32_t q_tile = stream.q_tile(), o_tile = stream.o_tile();
    stream.wait();

    const RowStats<typename F::Scores> stats(p.row_stats + (first_row + part.s_row) * 2);
    typename F::Scores s, dp;
    s.clear();
    multiply<T, Row::d / 16>( // S = Q K^T
        s, [&](auto& r, int i, int k) { read.q_rows.read(r, i, k, q_tile); },
        [&](auto& r, int j, int k) { read.k_rows.read(r, j, k, F::k_begin); });
    SoftcapDerivative<typename F::Scores, F::general> cap;
    if constexpr (F::general) {
      apply_softcap(s, p);
      cap.keep(s, p);
      apply_alibi(s, block, alibi_slope(p, block.sequence, first_head + at.g), first_query,
                  block.first_key + part.s_column);
    }
    if (blocks.on_edge(at.i)) mask<true>(s, p, block, first_query, block.first_key + part.s_column);
    probabilities(s, stats, p.factor);
    store_fragments<T, STile>(read.s_store + F::p_begin, s);
    if constexpr (F::general) cap.apply(s, p);
    dp.clear();
    multiply<T, Row::dv / 16>( // dP = dO V^T
        dp, [&](auto& r, int i, int k) { read.o_rows.read(r, i, k, o_tile); },
        [&](auto& r, int j, int k) { read.v_rows.read(r, j, k, F::v_begin); });
    score_gradients(dp, s, stats);
    store_fragments<T, STile>(read.s_store + F::ds_begin, dp);
    __syncthreads();

    multiply<T, Row::Br / 16>( // dV += P^T dO
        dv, [&](auto& r, int i, int k) { read.s_columns.read_transposed(r, k, i, F::p_begin); },
        [&](auto& r, int j, int k) { read.o_columns.read_transposed(r, k, j, o_tile); });
    stream.release_gradients();
    multiply<T, Row::Br / 16>( // dK += dS^T Q
        dk, [&](auto& r, int i, int k) { read.s_columns.read_transposed(r, k, i, F::ds_begin); },
        [&](auto& r, int j, int k) { read.q_columns.read_transposed(r, k, j, q_tile); });
    stream.release_queries();
    typename F::QueryGradient dq;
    dq.clear();
    multiply<T, Row::Bc / 16>( // dQ = dS K
        dq, [&](auto& r, int i, int k) { read.s_rows.read(r, i, k, F::ds_begin); },
        [&](auto& r, int j, int k) { read.k_columns.read_transposed(r, k, j, F::k_begin); });
    add_fragments(p.dq_sum + first_row * Row::d + warp_index() * (F::q_rows * F::q_columns), dq);
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
  store_fragments<T, typename F::KTile>(
      fragment_address<typename F::KTile, typename F::KeyGradient>(shared + F::k_begin, part.kv_row,
                                                                   part.k_column),
      dk);
  store_fragments<T, typename F::VTile>(
      fragment_address<typename F::VTile, typename F::ValueGradient>(
          shared + F::v_begin, part.kv_row, part.v_column),
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

/// Before the main kernel, one block of Br queries of one head: row_stats, and dq_sum = 0.
template <class Row>
DEVICE void backward_pre(const BackwardParams& p) {
  using F = Backward<Row>;
  using T = typename Row::T;
  // A group of lanes takes a row, 8 columns a lane.
  constexpr int lanes = Row::dv <= 64 ? 8 : Row::dv <= 128 ? 16 : 32;
  const QueryBlock<Row> block(p, blockIdx.x);
  if (block.outside()) return;
  const int64_t first_row =
      workspace_row<Row>(p, block.sequence, block.head) + block.first_query;

  float4* const sum = reinterpret_cast<float4*>(p.dq_sum + first_row * Row::d) + threadIdx.x;
  UNROLL
  for (int i = 0; i < Row::Br * Row::d / 4 / F::threads; ++i) sum[i * F::threads] = {0, 0, 0, 0};

  const uint16_t* const o = static_cast<const uint16_t*>(p.o) + block.o_offset;
  const uint16_t* const dout = static_cast<const uint16_t*>(p.dout) +
                               block.offset(p.dout_strides);
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
      reinterpret_cast<float2*>(p.row_stats)[first_row + row] = {
          empty ? infinity() : lse * log2_e, empty ? 0 : delta};
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
      p.dq_sum +
      (workspace_row<Row>(p, block.sequence, block.head) + block.first_query) * Row::d +
      warp_index() * (F::q_rows * F::q_columns);
  Fragment dq;
  UNROLL
  for (int m = 0; m < Fragment::m; ++m) {
    UNROLL
    for (int n = 0; n < Fragment::n; ++n) {
      UNROLL
      for (int e = 0; e < 4; ++e)
        dq.x[m][n][e] = sum[fragment_order<Fragment>(m, n, e)] * p.scale;
    }
  }
  store_fragments<T, typename F::QTile>(
      fragment_address<typename F::QTile, Fragment>(tile, part.q_row, part.q_column), dq);
  __syncthreads();
  copy_rows<typename F::QTile, Row::Br, F::threads, F::general>(
      tile, threadIdx.x,
      static_cast<uint16_t*>(p.dq) + block.offset(p.dq_strides) +
          int64_t{block.first_query} * p.dq_strides.row,
      p.dq_strides.row, block.rows - block.first_query, p.d, p.aligned);
}

} // namespace anyflash::sm80
