// O = softmax(Q K^T) V with mma.sync: Ampere, Ada, and newer GPUs until they have kernels of their
// own. Schedule, budgets and experiments: docs/kernels/sm80_forward.md.
#pragma once

#include "cuda/attn/epilogue.h"
#include "cuda/attn/mask.h"
#include "cuda/attn/query_block.h"
#include "cuda/attn/score.h"
#include "cuda/attn/softmax.h"
#include "cuda/ptx/mma.h"
#include "cuda/sm80/shared_memory.h"
#include "cuda/tile/fragment.h"
#include "cuda/tile/tile_loader.h"

namespace anyflash::sm80 {

/// What follows from a row of the table.
template <class Row>
struct Forward {
  static constexpr bool general = Row::general;
  static constexpr int threads = 32 * Row::warps;
  static constexpr int warp_rows = Row::Br / Row::warps;
  static constexpr int m_tiles = warp_rows / 16;
  static constexpr int d_steps = Row::d / 16;    // of 16 columns, in Q K^T
  static constexpr int key_steps = Row::Bc / 16; // of 16 keys, in P V
  static_assert(warp_rows % 16 == 0 && Row::Br % Row::warps == 0);

  using QTile = SharedTile<Row::Br, Row::d>;
  using KTile = SharedTile<Row::Bc, Row::d>;
  using VTile = SharedTile<Row::Bc, Row::dv>;
  using OTile = SharedTile<Row::Br, Row::dv>;

  using Scores = Accumulator<m_tiles, Row::Bc / 8>;
  using Output = Accumulator<m_tiles, Row::dv / 8>;
  using State = SoftmaxState<2 * m_tiles>;

  static constexpr int k_begin = QTile::bytes; // offsets in shared memory
  static constexpr int v_begin = k_begin + Row::k_stages * KTile::bytes;
  static constexpr int v_end = v_begin + Row::v_stages * VTile::bytes;
  static_assert((v_end > OTile::bytes ? v_end : OTile::bytes) ==
                forward_shared_bytes(Row::d, Row::dv, Row::Br, Row::Bc, Row::k_stages,
                                     Row::v_stages));
};

/// The queries of one warp as A fragments: kept in registers, or read from shared memory for each
/// step.
template <class Row>
struct Queries {
  using F = Forward<Row>;
  FragmentReader<typename F::QTile> shared;
  uint32_t registers[Row::q_in_registers ? F::d_steps : 1][F::m_tiles][4];

  DEVICE Queries(uint32_t tile, int first_row)
      : shared(FragmentReader<typename F::QTile>::rows_first(tile, first_row)) {}

  /// Call once the tile has landed.
  DEVICE void keep() {
    if constexpr (Row::q_in_registers) {
      UNROLL
      for (int k = 0; k < F::d_steps; ++k) {
        UNROLL
        for (int i = 0; i < F::m_tiles; ++i) shared.read(registers[k][i], i, k);
      }
    }
  }

  DEVICE void fragments(uint32_t (&a)[F::m_tiles][4], int k) const {
    UNROLL
    for (int i = 0; i < F::m_tiles; ++i) {
      if constexpr (Row::q_in_registers) {
        UNROLL
        for (int e = 0; e < 4; ++e) a[i][e] = registers[k][i][e];
      } else {
        shared.read(a[i], i, k);
      }
    }
  }
};

/// S = Q K_j^T for the rows of this warp. K in shared memory.
template <class Row>
DEVICE void multiply_queries_keys(typename Forward<Row>::Scores& s, const Queries<Row>& q,
                                  const FragmentReader<typename Forward<Row>::KTile>& keys,
                                  uint32_t stage_bytes) {
  using F = Forward<Row>;
  s.clear();
  UNROLL
  for (int k = 0; k < F::d_steps; ++k) {
    uint32_t a[F::m_tiles][4];
    q.fragments(a, k);
    UNROLL
    for (int j = 0; j < F::key_steps; ++j) {
      uint32_t b[4];
      keys.read(b, j, k, stage_bytes);
      UNROLL
      for (int i = 0; i < F::m_tiles; ++i) {
        mma_m16n8k16<typename Row::T>(s.x[i][2 * j], a[i], b[0], b[1]);
        mma_m16n8k16<typename Row::T>(s.x[i][2 * j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

/// P = exp2(factor S - m), O += P V_j, 16 keys at a time: the exponentials of the next keys run
/// while the tensor cores multiply these.
template <class Row>
DEVICE void
exponentiate_and_multiply_values(typename Forward<Row>::Output& o, typename Forward<Row>::Scores& s,
                                 typename Forward<Row>::State& state, float factor,
                                 const FragmentReader<typename Forward<Row>::VTile>& values,
                                 uint32_t stage_bytes) {
  using F = Forward<Row>;
  UNROLL
  for (int k = 0; k < F::key_steps; ++k) {
    state.exponentiate(s, factor, 4 * k, 4 * k + 4);
    uint32_t p[F::m_tiles][4]; // accumulators are A fragments once rounded
    UNROLL
    for (int i = 0; i < F::m_tiles; ++i) {
      UNROLL
      for (int e = 0; e < 4; ++e) {
        const float* const pair = &s.x[i][2 * k + e / 2][2 * (e % 2)];
        p[i][e] = pack<typename Row::T>(pair[0], pair[1]);
      }
    }
    UNROLL
    for (int j = 0; j < Row::dv / 16; ++j) {
      uint32_t b[4];
      values.read_transposed(b, k, j, stage_bytes);
      UNROLL
      for (int i = 0; i < F::m_tiles; ++i) {
        mma_m16n8k16<typename Row::T>(o.x[i][2 * j], p[i], b[0], b[1]);
        mma_m16n8k16<typename Row::T>(o.x[i][2 * j + 1], p[i], b[2], b[3]);
      }
    }
  }
}

/// Streams the keys and values of one (sequence, head) through their stages in shared memory, from
/// the last block to the first. With two stages a block is loaded while the one before it is used;
/// with one, K_{j-1} is loaded while V_j is used, and V_j while K_j is used.
///
///   stages K / V   barriers a block
///   2 / 2          1
///   2 / 1, 1 / 1   2
template <class Row>
class KeyValueLoader {
  using F = Forward<Row>;

public:
  DEVICE KeyValueLoader(const ForwardParams& p, const QueryBlock<Row>& block,
                        const KeyBlocks& blocks, uint32_t shared)
      : k_(static_cast<const uint16_t*>(p.k) + block.k_offset, p.k_strides.row, p.d, p.aligned),
        v_(static_cast<const uint16_t*>(p.v) + block.v_offset, p.v_strides.row, p.dv, p.aligned),
        shared_(shared), seqlen_k_(block.seqlen_k), first_(blocks.begin) {}

  /// Before the loop over j = last .. first.
  DEVICE void start(int last) {
    load_keys(last, 0);
    if constexpr (Row::v_stages == 2) load_values(last, 0);
    cp_async_commit();
  }

  /// K_j has landed, and every warp is done with block j + 1.
  DEVICE void wait_keys(int j) {
    cp_async_wait<0>();
    __syncthreads();
    if constexpr (Row::v_stages == 1) {
      load_values(j, 0);
      cp_async_commit();
    }
    if constexpr (Row::k_stages == 2) load_keys(j - 1, stage_ ^ 1);
    if constexpr (Row::v_stages == 2) load_values(j - 1, stage_ ^ 1);
    if constexpr (Row::k_stages == 2) cp_async_commit();
  }

  /// V_j has landed, and every warp is done with K_j.
  DEVICE void wait_values(int j) {
    if constexpr (Row::v_stages == 1) {
      cp_async_wait<Row::k_stages - 1>();
      __syncthreads();
      if constexpr (Row::k_stages == 1) {
        load_keys(j - 1, 0);
        cp_async_commit();
      }
    }
  }

  DEVICE void next() {
    if constexpr (Row::k_stages == 2) stage_ ^= 1;
  }

  /// Bytes from the first stage to the current one.
  DEVICE uint32_t k_stage_bytes() const {
    return Row::k_stages == 2 ? stage_ * F::KTile::bytes : 0;
  }
  DEVICE uint32_t v_stage_bytes() const {
    return Row::v_stages == 2 ? stage_ * F::VTile::bytes : 0;
  }

private:
  DEVICE void load_keys(int j, int stage) {
    if (j >= first_)
      k_.load(shared_ + F::k_begin + stage * F::KTile::bytes, int64_t{j} * Row::Bc,
              seqlen_k_ - j * Row::Bc);
  }
  DEVICE void load_values(int j, int stage) {
    if (j >= first_)
      v_.load(shared_ + F::v_begin + stage * F::VTile::bytes, int64_t{j} * Row::Bc,
              seqlen_k_ - j * Row::Bc);
  }

  TileLoader<typename F::KTile, F::threads, F::general> k_;
  TileLoader<typename F::VTile, F::threads, F::general> v_;
  uint32_t shared_;
  int seqlen_k_;
  int first_;
  int stage_ = 0;
};

/// FlashAttention-2, Algorithm 1: one block of Br queries of one head.
template <class Row>
DEVICE void forward(const ForwardParams& p) {
  using F = Forward<Row>;
  using T = typename Row::T;
  extern __shared__ __align__(1024) char shared_memory[];

  const QueryBlock<Row> block(p, blockIdx.x);
  if (block.outside()) return;
  const KeyBlocks blocks = block.keys(p);
  const uint32_t shared = shared_address(shared_memory);
  const int warp_row = warp_index() * F::warp_rows;
  const int first_query = block.first_query + warp_row;

  typename F::Output o;
  typename F::State state;
  o.clear();

  if (!blocks.empty()) {
    const TileLoader<typename F::QTile, F::threads, F::general> q_loader(
        static_cast<const uint16_t*>(p.q) + block.q_offset, p.q_strides.row, p.d, p.aligned);
    q_loader.load(shared, block.first_query, block.seqlen_q - block.first_query);
    KeyValueLoader<Row> loader(p, block, blocks, shared);
    loader.start(blocks.end - 1);

    Queries<Row> q(shared, warp_row);
    const auto keys = FragmentReader<typename F::KTile>::columns_first(shared + F::k_begin);
    const auto values = FragmentReader<typename F::VTile>::rows_first(shared + F::v_begin, 0);
    const float slope = F::general ? alibi_slope(p, block.sequence, block.head) : 0;
    const float factor = p.factor; // folded into the exponent: P = exp2(factor S - m)
    if constexpr (Row::q_in_registers) {
      cp_async_wait<0>();
      __syncthreads();
      q.keep();
    }

    ROLLED
    for (int j = blocks.end - 1; j >= blocks.begin; --j) {
      typename F::Scores s;
      loader.wait_keys(j);
      multiply_queries_keys<Row>(s, q, keys, loader.k_stage_bytes());
      if constexpr (F::general) {
        apply_softcap(s, p);
        apply_alibi(s, block, slope, first_query, j * Row::Bc);
      }
      if (blocks.on_edge(j)) mask<true>(s, p, block, first_query, j * Row::Bc);
      state.move_to_maximum(s, factor, o);
      loader.wait_values(j);
      exponentiate_and_multiply_values<Row>(o, s, state, factor, values, loader.v_stage_bytes());
      loader.next();
    }
  }

  const QueryBlock<Row> out(p, recomputed(blockIdx.x));
  normalise(o, state, p, out, first_query);
  // O leaves through the shared memory of Q, each warp through its own rows; where V is wider, past
  // them.
  if constexpr (F::OTile::bytes > F::QTile::bytes) __syncthreads();
  store_output<T, typename F::OTile, F::general>(o, shared, warp_row, p, out, first_query);
}

} // namespace anyflash::sm80
