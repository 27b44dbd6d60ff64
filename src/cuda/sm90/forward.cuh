// O = softmax(Q K^T) V for Hopper: the warps of one warpgroup copy, the others multiply. Schedule,
// budgets and experiments: docs/kernels/sm90_forward.md.
#pragma once

#include "cuda/attn/score.h"
#include "cuda/ptx/mma.h"
#include "cuda/ptx/stmatrix.h"
#include "cuda/sm90/forward_producer.h"
#include "cuda/sm90/mask.h"
#include "cuda/sm90/softmax.h"
#include "cuda/tile/tile_store.h"

namespace anyflash::sm90 {

/// Barriers by name; 0 is the block's. Each consumer has its turn to multiply, and a meeting of its
/// own four warps.
constexpr int turn_barrier = 1;
constexpr int meeting_barrier = 8;

/// The 64 queries of a consumer: fragments of the first columns, and the place in shared memory.
template <class Row>
struct Queries {
  using F = Forward<Row>;
  using Tile = typename F::QTile;
  static constexpr int steps = Row::d / 16, steps_in_registers = Row::q_in_registers / 16;

  uint64_t descriptor;
  uint32_t fragments[steps_in_registers ? 4 * steps_in_registers : 1];

  DEVICE void find(uint32_t tile, int first_row) {
    descriptor = MatrixDescriptor<Tile>::k_major(tile, first_row);
    if constexpr (steps_in_registers > 0) {
      const auto reader = FragmentReader<Tile>::rows_first(tile, first_row + warp_index() % 4 * 16);
      UNROLL
      for (int k = 0; k < steps_in_registers; ++k) {
        uint32_t a[4];
        reader.read(a, 0, k);
        UNROLL
        for (int e = 0; e < 4; ++e) fragments[4 * k + e] = a[e];
      }
    }
  }

  /// Starts S = Q K^T.
  DEVICE void multiply(typename F::Scores& s, uint32_t keys) {
    using Keys = MatrixDescriptor<typename F::KTile>;
    const uint64_t b = Keys::k_major(keys);
    keep(s.x);
    keep(fragments);
    wgmma_fence();
    UNROLL
    for (int k = 0; k < steps; ++k) {
      if (k < steps_in_registers)
        wgmma<typename Row::T, Major::k>(s.x, &fragments[4 * k], b + Keys::at_columns(k), k != 0);
      else
        wgmma<typename Row::T, Major::k, Major::k>(
            s.x, descriptor + MatrixDescriptor<Tile>::at_columns(k), b + Keys::at_columns(k),
            k != 0);
    }
    wgmma_commit();
    keep(s.x);
    keep(fragments);
  }

  /// S = Q K^T of 16 rows, by products that a warp makes by itself, whatever the others do.
  DEVICE void multiply_alone(typename F::Scores& s, uint32_t tile, int first_row,
                             uint32_t keys) const {
    s.clear();
    if constexpr (F::all_queries_in_registers) {
      UNROLL
      for (int k = 0; k < steps; ++k) {
        const uint32_t* const a = &fragments[4 * k];
        multiply_step(s, {a[0], a[1], a[2], a[3]}, keys, k);
      }
    } else {
      const auto reader = FragmentReader<Tile>::rows_first(tile, first_row);
      ROLLED // so that what is rare takes no registers from what is not
      for (int k = 0; k < steps; ++k) {
        uint32_t a[4];
        reader.read(a, 0, k);
        multiply_step(s, a, keys, k);
      }
    }
  }

private:
  DEVICE static void multiply_step(typename F::Scores& s, const uint32_t (&a)[4], uint32_t keys,
                                   int k) {
    const auto reader = FragmentReader<typename F::KTile>::columns_first(keys);
    UNROLL
    for (int i = 0; i < Row::Bc / 16; ++i) {
      uint32_t b[4];
      reader.read(b, i, k);
      UNROLL
      for (int half = 0; half < 2; ++half) {
        float(&d)[4] = reinterpret_cast<float(&)[4]>(s.x[8 * i + 4 * half]);
        mma_m16n8k16<typename Row::T>(d, a, b[2 * half], b[2 * half + 1]);
      }
    }
  }
};

/// Starts O += P V.
template <class Row>
DEVICE void multiply_values(typename Forward<Row>::Output& o,
                            typename Forward<Row>::Probabilities& p, uint32_t values) {
  using Values = MatrixDescriptor<typename Forward<Row>::VTile>;
  const uint64_t b = Values::mn_major(values);
  keep(o.x);
  keep(p.a);
  wgmma_fence();
  UNROLL
  for (int k = 0; k < Row::Bc / 16; ++k)
    wgmma<typename Row::T, Major::mn>(o.x, &p.a[4 * k], b + Values::at_rows(k), true);
  wgmma_commit();
  keep(o.x);
  keep(p.a);
}

/// A warpgroup that owns 64 rows of every tile: S of block j is multiplied while O of block j + 1
/// still is, and its softmax runs under that product and under the other warpgroups' products.
template <class Row>
class ForwardConsumer {
  using F = Forward<Row>;
  using T = typename Row::T;

public:
  DEVICE ForwardConsumer(const ForwardParams& p, uint32_t shared, int index)
      : p_(p), shared_(shared), barriers_{shared + F::shared.barriers}, index_(index), slope_(0),
        tiles_(shared) {}

  /// The end is a tile like the others, whose S nobody looks at: so no branch stands between a
  /// product and its end.
  DEVICE void run() {
    if (index_ == 0) named_barrier_arrive(turn_barrier, 2 * warpgroup_size); // has the first turn
    typename F::Scores s;
    Queries<Row> q;
    QueryTile next;
    start(next, q, s);
    ROLLED
    while (next.sequence >= 0) {
      tile_ = next;
      if constexpr (Row::general) slope_ = alibi_slope(p_, tile_.sequence, tile_.head);
      typename F::Output o;
      o.clear();
      softmax_.clear();
      const Place<Row::stages> last = attend(q, s, o);
      if constexpr (F::early_queries) {
        start(next, q, s);
        wgmma_wait<1>();
      } else {
        wgmma_wait<0>();
      }
      keep(o.x);
      release(barriers_.v_empty(last.stage));
      finish(o);
      if constexpr (!F::early_queries) start(next, q, s);
      store(o);
    }
    wgmma_wait<0>();
    if (lane_index() == 0) bulk_wait_read<0>(); // shared memory must stay until O has left
  }

private:
  /// Starts S of the last block of the next tile.
  DEVICE void start(QueryTile& next, Queries<Row>& q, typename F::Scores& s) {
    tiles_.pop(next, share_, index_);
    ROLLED
    for (int i = 0; i < share_.skipped; ++i) {
      mbarrier_wait(barriers_.k_full(ring_.stage), ring_.parity);
      mbarrier_wait(barriers_.v_full(ring_.stage), ring_.parity);
      meet(); // no product says that all warps have seen this phase
      release(barriers_.k_empty(ring_.stage));
      release(barriers_.v_empty(ring_.stage));
      ring_.next();
    }
    mbarrier_wait(barriers_.q_full(q_ring_.stage), q_ring_.parity);
    q.find(shared_ + F::shared.q + q_ring_.stage * F::QTile::bytes, 64 * index_);
    mbarrier_wait(barriers_.k_full(ring_.stage), ring_.parity);
    q.multiply(s, keys(ring_.stage));
    // Behind the product, which has waited for the fragments: see mbarrier_arrive_after.
    if constexpr (F::all_queries_in_registers) release_queries();
  }

  /// Behind S of block j, where no warp may want it again: gives K back, and behind the last S Q.
  DEVICE void release_operands(int j) {
    if constexpr (!Row::late_maximum) {
      release(barriers_.k_empty(ring_.stage));
      if (!F::all_queries_in_registers && j == share_.begin) release_queries();
    }
  }

  /// Everything but the end of the last product O += P V: that one's place in the ring.
  DEVICE Place<Row::stages> attend(Queries<Row>& q, typename F::Scores& s, typename F::Output& o) {
    typename F::Probabilities p;
    ROLLED
    for (int i = 0; i < share_.skipped; ++i) { // turns that it does not need
      take_turn();
      pass_turn();
    }
    first_scores(s, p, share_.last);
    ROLLED
    for (int j = share_.last - 1; j >= share_.begin; --j) step(q, s, p, o, j, share_.on_edge(j));
    if constexpr (Row::late_maximum && !F::all_queries_in_registers) release_queries();
    const Place<Row::stages> last = ring_;
    ring_.next();
    mbarrier_wait(barriers_.v_full(last.stage), last.parity);
    multiply_values<Row>(o, p, values(last.stage));
    if constexpr (Row::late_maximum) {
      meet(); // all warps have their P
      release(barriers_.k_empty(last.stage));
    }
    return last;
  }

  /// P of the last block.
  DEVICE void first_scores(typename F::Scores& s, typename F::Probabilities& p, int j) {
    float alpha[2];
    wgmma_wait<0>();
    keep(s.x);
    release_operands(j);
    change_scores(s, j, share_.on_edge(j));
    softmax_.exponentiate<true>(s, p_.factor, alpha);
    p.round(s);
  }

  /// O += P V of block j + 1, and P of block j. Late maximum: K of a block stays until the next
  /// one's turn, when all warps have their P, since a warp may need S again.
  DEVICE void step(Queries<Row>& q, typename F::Scores& s, typename F::Probabilities& p,
                   typename F::Output& o, int j, bool on_edge) {
    const Place<Row::stages> before = ring_;
    ring_.next();
    mbarrier_wait(barriers_.k_full(ring_.stage), ring_.parity);
    take_turn();
    if constexpr (Row::late_maximum) release(barriers_.k_empty(before.stage));
    q.multiply(s, keys(ring_.stage));
    mbarrier_wait(barriers_.v_full(before.stage), before.parity);
    multiply_values<Row>(o, p, values(before.stage));
    pass_turn();
    wgmma_wait<1>();
    keep(s.x);
    release_operands(j);
    change_scores(s, j, on_edge);
    if constexpr (Row::late_maximum) {
      exponentiate_by_old_m(q, s, p, o, j, on_edge);
    } else {
      float alpha[2];
      const bool moved = softmax_.exponentiate<false>(s, p_.factor, alpha);
      end_output(o, p);
      p.round(s);
      if (moved) rescale(o, alpha);
    }
    release(barriers_.v_empty(before.stage));
  }

  /// P with m as it was; where that would be too large, from S on again. Warps differ in that, so O
  /// ends before: all of a warpgroup must be at the same wait.
  DEVICE void exponentiate_by_old_m(const Queries<Row>& q, typename F::Scores& s,
                                    typename F::Probabilities& p, typename F::Output& o, int j,
                                    bool on_edge) {
    float growth[2], alpha[2];
    const bool fits = softmax_.exponentiate_by_old_m<T>(s, p_.factor, growth);
    end_output(o, p);
    if constexpr (Row::round_early) p.round(s);
    if (fits) {
      softmax_.add(growth);
    } else {
      q.multiply_alone(s, shared_ + F::shared.q + q_ring_.stage * F::QTile::bytes, warp_row(),
                       keys(ring_.stage));
      change_scores(s, j, on_edge);
      if (softmax_.exponentiate<false>(s, p_.factor, alpha)) rescale(o, alpha);
      if constexpr (Row::round_early) p.round(s);
    }
    if constexpr (!Row::round_early) p.round(s);
  }

  /// Ends O += P V; the tensor cores read p until here.
  DEVICE static void end_output(typename F::Output& o, typename F::Probabilities& p) {
    wgmma_wait<0>();
    keep(o.x);
    keep(p.a);
  }

  DEVICE static void rescale(typename F::Output& o, const float (&alpha)[2]) {
    UNROLL
    for (int r = 0; r < 2; ++r) {
      UNROLL
      for (int c = 0; c < F::Output::columns; ++c) o(r, c) *= alpha[r];
    }
  }

  /// Softcap, ALiBi, mask.
  DEVICE void change_scores(typename F::Scores& s, int j, bool on_edge) {
    const int query = first_query(), key = j * Row::Bc;
    if constexpr (Row::general) {
      apply_softcap(s, p_);
      apply_alibi(s, tile_, slope_, query, key);
    }
    if (on_edge) mask(s, p_, tile_, query, key);
  }

  /// O /= l, and L = ln(2^m l) to global memory. Rows without a key, and those past the used
  /// length, get O = 0, L = -inf; NaN stays NaN.
  DEVICE void finish(typename F::Output& o) {
    const int query = first_query();
    UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = query + F::Output::row(r);
      const float l = row_sum(softmax_.l[r]);
      const bool empty = l == 0 || row >= tile_.seqlen_q;
      const float inverse = __fdividef(1, l);
      UNROLL
      for (int c = 0; c < F::Output::columns; ++c) o(r, c) = empty ? 0 : o(r, c) * inverse;
      if (p_.lse && lane_index() % 4 == 0 && row < tile_.rows)
        p_.lse[tile_.sequence * p_.lse_batch + tile_.head * p_.lse_head + tile_.first_q + row] =
            empty ? -infinity() : (softmax_.m[r] + __log2f(l)) * ln_2;
    }
  }

  DEVICE void store(const typename F::Output& o) {
    UNROLL
    for (int part = 0; part < Row::o_parts; ++part) store_part(o, part);
  }

  /// Writes the 16 rows of this warp through its own rows of the shared tile: by the copy engine,
  /// or row by row where those past the end belong to another sequence.
  DEVICE void store_part(const typename F::Output& o, int part) {
    using Tile = typename F::OTile;
    const int row = warp_row(), query = tile_.first_query + row;
    const int first_column = part * Tile::columns;
    const uint32_t strip = shared_ + F::shared.o + row * Tile::row_bytes;
    if (lane_index() == 0) bulk_wait_read<0>(); // what was there has left
    __syncwarp();
    const uint32_t address = strip + Tile::offset(lane_index() % 16, lane_index() / 16);
    UNROLL
    for (int j = 0; j < Tile::columns / 16; ++j) {
      const float* const x = &o.x[first_column / 2 + 8 * j];
      stmatrix_x4(Tile::at_step(address, j), pack<T>(x[0], x[1]), pack<T>(x[2], x[3]),
                  pack<T>(x[4], x[5]), pack<T>(x[6], x[7]));
    }
    if (p_.cu_seqlens_q && query + 16 > tile_.rows) {
      __syncwarp();
      uint16_t* const to = static_cast<uint16_t*>(p_.o) + first_column +
                           (tile_.first_q + int64_t{query}) * p_.o_strides.row +
                           tile_.head * p_.o_strides.head;
      copy_rows<Tile, 16, warp_size, false>(strip, lane_index(), to, p_.o_strides.row,
                                            tile_.rows - query, p_.dv - first_column, true);
      __syncwarp();
    } else {
      fence_async_shared();
      __syncwarp();
      if (lane_index() == 0) {
        UNROLL
        for (int page = 0; page < Tile::pages; ++page)
          tma_store(&p_.o_map, strip + page * Tile::page_bytes,
                    first_column + page * Tile::page_columns, tile_.first_q + query, tile_.head,
                    p_.cu_seqlens_q ? 0 : tile_.sequence);
        bulk_commit();
      }
    }
  }

  DEVICE int warp_row() const { return 64 * index_ + warp_index() % 4 * 16; } // of the tile
  DEVICE int first_query() const { return tile_.first_query + warp_row(); }
  DEVICE uint32_t keys(int stage) const { return shared_ + F::shared.k + stage * F::KTile::bytes; }
  DEVICE uint32_t values(int stage) const { return shared_ + stage * F::VTile::bytes; }

  /// Warpgroups start their products one after the other, so that one has its softmax while the
  /// others multiply.
  DEVICE void take_turn() const { named_barrier_sync(turn_barrier + index_, 2 * warpgroup_size); }
  DEVICE void pass_turn() const {
    named_barrier_arrive(turn_barrier + (index_ + 1) % F::consumers, 2 * warpgroup_size);
  }

  DEVICE void meet() const { named_barrier_sync(meeting_barrier + index_, warpgroup_size); }

  /// One arrival of this warpgroup, after a product that it has seen done: all warps have started
  /// it, and so were past the barrier of its operands.
  DEVICE void release(uint32_t barrier) const {
    if (threadIdx.x % warpgroup_size == 0) mbarrier_arrive(barrier);
  }
  DEVICE void release_queries() {
    warp_arrive(barriers_.q_empty(q_ring_.stage));
    q_ring_.next();
  }

  const ForwardParams& p_;
  uint32_t shared_;
  ForwardBarriers<Row> barriers_;
  int index_; // of the consumers
  float slope_;
  QueryTile tile_;
  OnlineSoftmax softmax_;
  TileShare share_;
  Place<Row::stages> ring_;
  Place<Row::q_stages> q_ring_;
  TileQueue<Row> tiles_;
};

/// FlashAttention-3: thread blocks that stay, each a producer and two or three consumers.
template <class Row>
DEVICE void forward(const ForwardParams& p) {
  using F = Forward<Row>;
  extern __shared__ __align__(1024) char shared_memory[];
  const uint32_t shared = shared_address(shared_memory);
  if (threadIdx.x == 0) ForwardBarriers<Row>{shared + F::shared.barriers}.init();
  __syncthreads();
  const int role = warpgroup_index();
  if (role == 0) {
    fewer_registers<F::producer_registers>();
    if (warp_index() == 0)
      ForwardProducer<Row>(p, shared).copy_queries_and_keys();
    else if (warp_index() == 1)
      ForwardProducer<Row>(p, shared).copy_values();
    else if (warp_index() == 2)
      find_tiles<Row>(p, shared);
  } else {
    more_registers<F::consumer_registers>();
    ForwardConsumer<Row>(p, shared, role - 1).run();
  }
}

} // namespace anyflash::sm90
