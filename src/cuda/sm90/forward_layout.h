// What follows from a row of the table for the forward: tiles, fragments, barriers.
#pragma once

#include "cuda/ptx/copy.h"
#include "cuda/ptx/warpgroup.h"
#include "cuda/sm90/params.h"
#include "cuda/sm90/shared_memory.h"
#include "cuda/sm90/warp_arrival.h"
#include "cuda/tile/matrix_descriptor.h"
#include "cuda/tile/warpgroup_fragment.h"

namespace anyflash::sm90 {

template <class Row>
struct Forward {
  static constexpr int consumers = Row::Br / 64; // warpgroups that multiply
  static constexpr int producers = 2;            // warps that copy, of one more
  static_assert(Row::warps == 4 * (consumers + 1));

  using QTile = SharedTile<Row::Br, Row::d>;
  using KTile = SharedTile<Row::Bc, Row::d>;
  using VTile = SharedTile<Row::Bc, Row::dv>;
  using OTile = SharedTile<Row::Br, Row::dv / Row::o_parts>;

  using Scores = WarpgroupAccumulator<Row::Bc>;
  using Probabilities = WarpgroupOperand<typename Row::T, Row::Bc>;
  using Output = WarpgroupAccumulator<Row::dv>;

  static constexpr ForwardShared shared{Row::d,      Row::dv,       Row::Br,     Row::Bc,
                                        Row::stages, Row::q_stages, Row::o_parts};

  /// Of Q's columns the first q_in_registers are read from shared memory once a tile, the others in
  /// each block of keys.
  static constexpr bool all_queries_in_registers = Row::q_in_registers == Row::d;

  /// Whether Q of the next tile is there early, in a stage that this tile does not need. Then S of
  /// the next tile is started before O of this one is finished, otherwise before it is stored.
  static constexpr bool early_queries = Row::q_stages == 2 || all_queries_in_registers;

  // 504 registers of each of 128 threads for three warpgroups, 512 for four.
  static constexpr int consumer_registers = consumers == 2 ? 232 : consumers == 3 ? 160 : 112;
  static constexpr int producer_registers = consumers == 2 ? 40 : consumers == 3 ? 32 : 24;
};

/// A barrier for each stage of a ring; one of them is of tiles that have been found.
template <class Row>
struct ForwardBarriers {
  uint32_t base;

  DEVICE uint32_t q_full(int stage) const { return base + 8 * stage; }
  DEVICE uint32_t q_empty(int stage) const { return base + 16 + 8 * stage; }
  DEVICE uint32_t tile_full(int slot) const { return base + 32 + 8 * slot; }
  DEVICE uint32_t tile_empty(int slot) const { return base + 48 + 8 * slot; }
  DEVICE uint32_t k_full(int stage) const { return base + 64 + 8 * stage; }
  DEVICE uint32_t k_empty(int stage) const { return base + 96 + 8 * stage; }
  DEVICE uint32_t v_full(int stage) const { return base + 128 + 8 * stage; }
  DEVICE uint32_t v_empty(int stage) const { return base + 160 + 8 * stage; }
  DEVICE uint32_t tile(int slot) const { return base + 192 + tile_bytes * slot; }

  static constexpr int tile_bytes = 32 + 32 * Forward<Row>::consumers; // a tile, and its shares
  static_assert(Row::stages <= 4 && Row::q_stages <= 2);
  static_assert(192 + 2 * tile_bytes <= ForwardShared::barrier_bytes);

  /// By one thread.
  DEVICE void init() const {
    constexpr int warpgroups = Forward<Row>::consumers, producers = Forward<Row>::producers;
    UNROLL
    for (int slot = 0; slot < 2; ++slot) {
      mbarrier_init(tile_full(slot), warp_arrivals);
      mbarrier_init(tile_empty(slot), warpgroups * warpgroup_arrivals + producers * warp_arrivals);
    }
    UNROLL
    for (int stage = 0; stage < Row::q_stages; ++stage) {
      mbarrier_init(q_full(stage), 1);
      mbarrier_init(q_empty(stage), warpgroups * warpgroup_arrivals);
    }
    UNROLL
    for (int stage = 0; stage < Row::stages; ++stage) {
      mbarrier_init(k_full(stage), 1);
      mbarrier_init(k_empty(stage), warpgroups);
      mbarrier_init(v_full(stage), 1);
      mbarrier_init(v_empty(stage), warpgroups);
    }
    fence_barrier_init();
  }
};

/// A place in a ring of stages: the stage, and the parity of the phase that fills it.
template <int stages>
struct Place {
  int stage = 0;
  uint32_t parity = 0;

  DEVICE void next() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
};

/// The tile at hand: one block of queries of one head of one sequence.
struct QueryTile {
  int sequence; // -1: no more tiles
  int head;
  int first_query; // in its sequence
  int rows;        // of O that exist in this sequence; queries at and past seqlen_q give O = 0
  int seqlen_q, seqlen_k; // used lengths
  int first_q, first_k;   // rows of the sequence in packed tensors

  /// Query i is aligned with key i + diagonal.
  DEVICE int diagonal() const { return seqlen_k - seqlen_q; }

  /// At least one: where no query sees a key, a block of which the mask leaves nothing.
  template <class Row>
  DEVICE KeyBlocks keys(const AttentionParams& p) const {
    const KeyBlocks blocks = key_blocks(first_query, Row::Br, Row::Bc, seqlen_q, seqlen_k,
                                        p.window_left, p.window_right);
    return blocks.empty() ? KeyBlocks{0, 1, 1, 1} : blocks;
  }
};

/// The blocks of keys that a warpgroup's rows of a tile see, from the last to the first. All
/// warpgroups go through the same stages, but the first of them may hold nothing for this one.
struct TileShare {
  int begin, last;
  int skipped; // stages before the one of block `last`
  int full_begin, full_end;

  constexpr int end_of_tile() const { return last + 1 + skipped; }
  constexpr bool on_edge(int j) const { return j < full_begin || j >= full_end; }
};

template <class Row>
DEVICE TileShare share_of(const QueryTile& tile, const AttentionParams& p, int warpgroup) {
  const KeyBlocks all = tile.keys<Row>(p);
  const KeyBlocks own = key_blocks(tile.first_query + 64 * warpgroup, 64, Row::Bc, tile.seqlen_q,
                                   tile.seqlen_k, p.window_left, p.window_right);
  const int first = max(min(own.end, all.end), all.begin + 1); // past the last that it sees
  // NOTE: at most all stages but the one whose product may be under way: that one is given back
  // only later.
  const int skipped = tile.sequence < 0 ? 0 : min(all.end - first, Row::stages - 1);
  return {all.begin, all.end - 1 - skipped, skipped, own.full_begin, own.full_end};
}

/// Tiles on their way from the warp that finds them to those that load and compute.
template <class Row>
class TileQueue {
public:
  DEVICE explicit TileQueue(uint32_t shared) : barriers_{shared + Forward<Row>::shared.barriers} {}

  /// By a warp.
  DEVICE void push(const QueryTile& t, const AttentionParams& p) {
    const int lane = lane_index();
    const TileShare share = share_of<Row>(t, p, lane);
    const uint32_t slot = barriers_.tile(at_.stage);
    mbarrier_wait(barriers_.tile_empty(at_.stage), at_.parity ^ 1);
    if (lane == 0) {
      store(slot, t.sequence, t.head, t.first_query, t.rows);
      store(slot + 16, t.seqlen_q, t.seqlen_k, t.first_q, t.first_k);
    }
    if (lane < Forward<Row>::consumers) {
      store(share_at(slot, lane), share.begin, share.last, share.skipped, share.full_begin);
      store(share_at(slot, lane) + 16, share.full_end, 0, 0, 0);
    }
    warp_arrive(barriers_.tile_full(at_.stage));
    at_.next();
  }

  /// By every warp of those that want it: the tile, and a warpgroup's share of it.
  DEVICE void pop(QueryTile& tile, TileShare& share, int warpgroup) {
    const uint32_t slot = barriers_.tile(at_.stage), own = share_at(slot, warpgroup);
    mbarrier_wait(barriers_.tile_full(at_.stage), at_.parity);
    const uint4 a = ld_shared_16(slot), b = ld_shared_16(slot + 16);
    const uint4 c = ld_shared_16(own), d = ld_shared_16(own + 16);
    warp_arrive_after(a.x ^ b.x ^ c.x ^ d.x, barriers_.tile_empty(at_.stage));
    at_.next();
    tile = {int(a.x), int(a.y), int(a.z), int(a.w), int(b.x), int(b.y), int(b.z), int(b.w)};
    share = {int(c.x), int(c.y), int(c.z), int(c.w), int(d.x)};
  }

private:
  DEVICE static uint32_t share_at(uint32_t slot, int warpgroup) {
    return slot + 32 + 32 * warpgroup;
  }
  DEVICE static void store(uint32_t shared, int a, int b, int c, int d) {
    st_shared(shared, uint4{uint32_t(a), uint32_t(b), uint32_t(c), uint32_t(d)});
  }

  ForwardBarriers<Row> barriers_;
  Place<2> at_;
};

} // namespace anyflash::sm90
