// What follows from a row of the table for the forward: tiles, fragments, barriers.
#pragma once

#include "cuda/ptx/warpgroup.h"
#include "cuda/sm90/params.h"
#include "cuda/sm90/shared_memory.h"
#include "cuda/sm90/warp_arrival.h"
#include "cuda/tile/matrix_descriptor.h"
#include "cuda/tile/warpgroup_fragment.h"

namespace anyflash::sm90 {

template <class Row>
struct Forward {
  static constexpr int consumers = Row::Br / 64; // warpgroups that multiply; one more loads
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

  /// When S of the next tile is started: as early as its Q is there. Fragments of Q in registers
  /// come last: waiting for them would hold up O.
  enum Start { before_o, before_store, after_store };
  static constexpr Start start = Row::q_stages == 2    ? before_o
                                 : Row::q_in_registers ? after_store
                                                       : before_store;

  // 504 registers of each of 128 threads for three warpgroups, 512 for four.
  static constexpr int consumer_registers = consumers == 2 ? 232 : consumers == 3 ? 160 : 112;
  static constexpr int producer_registers = consumers == 2 ? 40 : consumers == 3 ? 32 : 24;
};

/// A barrier for each stage of a ring, and for what the producer says about its tiles.
template <class Row>
struct ForwardBarriers {
  uint32_t base;

  DEVICE uint32_t q_full(int stage) const { return base + 8 * stage; }
  DEVICE uint32_t q_empty(int stage) const { return base + 16 + 8 * stage; }
  DEVICE uint32_t tile() const { return base + 32; } // 32 bytes
  DEVICE uint32_t tile_full() const { return base + 192; }
  DEVICE uint32_t tile_empty() const { return base + 200; }
  DEVICE uint32_t k_full(int stage) const { return base + 64 + 8 * stage; }
  DEVICE uint32_t k_empty(int stage) const { return base + 96 + 8 * stage; }
  DEVICE uint32_t v_full(int stage) const { return base + 128 + 8 * stage; }
  DEVICE uint32_t v_empty(int stage) const { return base + 160 + 8 * stage; }
  static_assert(Row::stages <= 4 && Row::q_stages <= 2 && 208 <= ForwardShared::barrier_bytes);

  /// By one thread.
  DEVICE void init() const {
    constexpr int warpgroups = Forward<Row>::consumers;
    mbarrier_init(tile_full(), 1);
    mbarrier_init(tile_empty(), warpgroups * warpgroup_arrivals);
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

/// The tile at hand: one block of queries of one head of one sequence. The producer finds it and
/// hands it over through shared memory.
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

} // namespace anyflash::sm90
