// How a row of the sm90 backward lays out shared memory, and its barriers.
#pragma once

#include "cuda/sm90/backward/shared_memory.h"
#include "cuda/sm90/warp_arrival.h"
#include "cuda/tile/matrix_descriptor.h"
#include "cuda/tile/warpgroup_fragment.h"

namespace anyflash::sm90 {

/// What follows from a row of the table. Warpgroup 0 loads, the others compute. Scores are
/// transposed, [keys, queries]. Up to head dim 128 each of two consumers owns 64 of a block's 128
/// keys; above, both work on the same 64 keys, and each owns a part of the head dim. Where there is
/// a third warpgroup, it does apart from them what both would have to wait for: dQ up to head dim
/// 128, P and dS above.
template <class Row>
struct Backward {
  static constexpr bool general = Row::general;
  /// Where key blocks add to dQ in turns, the last one finishes it. Not where registers are few.
  static constexpr bool finishes = !general;
  static constexpr bool by_keys = Row::Bc == 128;
  static constexpr bool apart = Row::warps == 16;
  static constexpr bool dq_apart = apart && by_keys, scores_apart = apart && !by_keys;
  /// Two thread blocks with neighbouring blocks of keys exchange dS; each adds to a part of dQ,
  /// over the keys of both.
  static constexpr bool pair = Row::cluster == 2;
  static_assert(!pair || apart && Row::d % 64 == 0);
  static_assert(pair ? Row::peer_stages == 1 || Row::peer_stages == 2 : Row::peer_stages == 0);
  /// Each takes its own queries, those that see its own keys, and adds what comes from the other
  /// one to dQ of more; otherwise both take all that see any of their keys.
  static constexpr bool own_queries = pair && dq_apart;
  /// Where there are registers for it: shared memory is what limits the speed.
  static constexpr bool v_in_registers = dq_apart && Row::dv <= 96;
  /// The last columns of V, which go straight to registers; of who owns keys, all or none.
  static constexpr int direct_v = Row::direct_v;
  static_assert(direct_v == 0 || (v_in_registers ? direct_v == Row::dv : pair && !by_keys));
  static constexpr int consumers = 2;
  static constexpr int adders = dq_apart ? 1 : consumers; // warpgroups with a part of dQ
  static constexpr int readers = apart ? 3 : consumers;   // warpgroups that follow Work
  /// Registers of a thread; 24 for those that load. In all, 512 times 128 threads.
  static constexpr int consumer_registers = !apart ? 240 : by_keys ? 208 : 192;
  static constexpr int apart_registers = by_keys ? 72 : 104;
  static_assert(!scores_apart || pair);
  static_assert(!apart || 24 + 2 * consumer_registers + apart_registers == 512);
  static_assert(by_keys ? Row::d <= 128 : Row::Bc == 64 && Row::Br == 64);
  static_assert(Row::d == Row::dv || scores_apart && Row::dv == 128);

  using QTile = SharedTile<Row::Br, Row::d>;
  using OTile = SharedTile<Row::Br, Row::dv>; // dO
  using KTile = SharedTile<Row::Bc, Row::d>;
  using VTile = SharedTile<Row::Bc, Row::dv - direct_v>;
  using STile = SharedTile<Row::Br, Row::Bc>;     // dS; by_keys: a page of it is a consumer's
  static constexpr int stats_bytes = Row::Br * 8; // L of the queries, then their delta

  using Scores = WarpgroupAccumulator<by_keys || apart ? Row::Br : Row::Br / 2>; // S^T, dP^T
  using KeyGradient = WarpgroupAccumulator<Row::d>;
  using ValueGradient = WarpgroupAccumulator<Row::dv>;

  /// A part of dQ is 64 queries: a consumer's own where a block has 128; otherwise all, and
  /// q_columns columns, or what is left of them for the second.
  static constexpr bool split_queries = Row::Br == 128;
  static constexpr int q_columns =
      by_keys ? (split_queries || Row::d > 64 ? 64 : 32) : (pair ? Row::d / 2 : 128);
  static_assert(split_queries ? Row::d == 64 : Row::Br == 64);
  /// Columns of dK and of dV of the first consumer where consumers own columns; the second has the
  /// rest. A product begins at a page of 64 columns.
  static constexpr int k_columns = 128, v_columns = Row::dv == Row::d ? 128 : Row::dv / 2;
  /// In a pair, a block's part is what would be that of the consumer of its rank. It needs all keys
  /// of the other block, and of these:
  using PeerSTile = SharedTile<64, Row::Bc>; // dS of the part's queries; pages as in STile
  using PeerKTile = SharedTile<Row::Bc, split_queries ? Row::d : (q_columns + 63) / 64 * 64>;
  DEVICE static int first_of_peer_k() { return rank() * (Row::d - PeerKTile::columns); }
  using QueryGradient = WarpgroupAccumulator<q_columns>;
  /// Of dQ: the first row and the first column of a part, and how many 8-column tiles it has.
  DEVICE static int part_row(int part) { return split_queries ? part * 64 : 0; }
  DEVICE static int part_column(int part) { return split_queries ? 0 : part * q_columns; }
  DEVICE static int q_tiles(int part) {
    return (split_queries || part == 0 ? q_columns : Row::d - q_columns) / 8;
  }

  static constexpr int work_bytes = backward_work_bytes(pair);
  static constexpr BackwardShared at =
      backward_shared(Row::d, Row::dv, Row::Br, Row::Bc, Row::kv_stages, Row::q_stages,
                      Row::o_stages, Row::cluster, Row::peer_stages, Row::direct_v);

  /// The keys of one ticket, as KeyBlock wants to know them.
  struct Keys {
    static constexpr int Bc = Row::Bc * Row::cluster, Br = Row::Br;
  };
  /// The place of this block in its pair.
  DEVICE static int rank() { return pair ? recomputed(blockIdx.x) % 2 : 0; }
};

/// Position in a ring of stages, and the parity of the phase in which its stage is filled.
template <int stages>
struct Ring {
  int stage_ = 0;
  uint32_t phase_ = 0;

  DEVICE int stage() const { return stage_; }
  DEVICE int before() const { return stage_ ? stage_ - 1 : stages - 1; }
  DEVICE uint32_t phase() const { return phase_; }
  DEVICE void advance() {
    if (++stage_ == stages) stage_ = 0, phase_ ^= 1;
  }
  DEVICE Ring next() const {
    Ring ring = *this;
    ring.advance();
    return ring;
  }
};

/// Two stages: one register.
template <>
struct Ring<2> {
  uint32_t count = 0;

  DEVICE int stage() const { return count & 1; }
  DEVICE int before() const { return ~count & 1; }
  DEVICE uint32_t phase() const { return count >> 1 & 1; }
  DEVICE void advance() { ++count; }
  DEVICE Ring next() const { return {count + 1}; }
};

/// Blocks of queries; steps: over all heads of a group.
struct Queries {
  int32_t begin, end, steps;
};
template <class Range>
DEVICE bool contains(const volatile Range& queries, int i) {
  return i >= queries.begin && i < queries.end;
}

/// A block of keys and the queries that see it, in shared memory, where it costs no registers.
/// Written by the loader.
struct Work {
  int64_t first_row;            // in the workspace: query 0 of the first head of the group
  int64_t dk_offset, dv_offset; // elements to the first of these keys
  int32_t rows;                 // of dK and dV that exist from there on
  uint32_t ticket;              // at or past the last: there is no more work
  int32_t steps;                // blocks of queries that see these keys, over the group's heads
  int32_t first_key;
  int32_t seqlen_q, seqlen_k;
  int32_t diagonal;                         // query i is aligned with key i + diagonal
  int32_t begin, end, full_begin, full_end; // blocks of queries: KeyBlocks
  int32_t head, head_k;                     // the first query head of the group, and the key head
  int32_t sequence;
  int32_t batch, first_q, first_k; // where the tensors' rows of the sequence are
  int32_t last_steps;              // so many steps before the end the loader wants more work
};
static_assert(sizeof(Work) <= backward_work_bytes(false));

/// In a pair also: the queries that see keys of either block, and those that see the other one's.
struct PairWork : Work {
  Queries of_pair, of_peer;
};
static_assert(sizeof(PairWork) <= backward_work_bytes(true));
DEVICE const volatile PairWork& in_pair(const volatile Work& work) {
  return static_cast<const volatile PairWork&>(work);
}

/// What they know of a block of queries.
struct Step {
  int64_t first_row; // in the workspace
  int32_t first_query;
  int32_t on_edge; // some of these queries do not see some of the keys
  int32_t head;
};
static_assert(sizeof(Step) <= backward_step_bytes);

/// Of a block of queries whose turn it is: what has become of its sums so far, and where its dQ is.
/// Written by the warp that looks for turns.
struct Turn {
  int64_t dq_offset; // elements to its first query; this and rows only for the last
  int32_t rows;      // of dQ that exist from there on
  int32_t first;     // nobody has added: there are no sums yet
  int32_t last;      // nobody will add after this
};
static_assert(sizeof(Turn) <= backward_turn_bytes);

/// The barriers of a thread block: "full" is for those who read, "empty" for who fills anew.
template <class Row>
struct BackwardBarriers {
  uint32_t begin;

  DEVICE uint32_t work_full(int slot) const { return begin + 8 * slot; }
  DEVICE uint32_t work_empty(int slot) const { return begin + 16 + 8 * slot; }
  DEVICE uint32_t ds_full(int stage) const { return begin + 32 + 8 * stage; }
  // begin + 48: BackwardShared::finder
  DEVICE uint32_t work_wanted() const { return begin + 56; }
  DEVICE uint32_t ds_empty(int stage) const { return begin + 64 + 8 * stage; }
  DEVICE uint32_t p_full() const { return begin + 80; } // scores apart
  DEVICE uint32_t ticket() const { return begin + 88; } // an int
  DEVICE uint32_t q_full(int stage) const { return begin + 96 + 8 * stage; }
  DEVICE uint32_t q_empty(int stage) const { return q_full(Row::q_stages + stage); }
  DEVICE uint32_t o_full(int stage) const { return q_full(2 * Row::q_stages + stage); }
  DEVICE uint32_t o_empty(int stage) const { return o_full(Row::o_stages + stage); }
  DEVICE uint32_t k_full(int stage) const { return o_full(2 * Row::o_stages + stage); }
  DEVICE uint32_t k_empty(int stage) const { return k_full(Row::kv_stages + stage); }
  DEVICE uint32_t v_full(int stage) const { return k_full(2 * Row::kv_stages + stage); }
  DEVICE uint32_t v_empty(int stage) const { return k_full(3 * Row::kv_stages + stage); }
  // In a pair.
  DEVICE uint32_t peer_ds_full(int stage) const { return v_empty(Row::kv_stages + stage); }
  DEVICE uint32_t p_empty() const { return peer_ds_full(2); }
  DEVICE uint32_t peer_wants_ticket() const { return peer_ds_full(3); }
  DEVICE uint32_t ticket_full() const { return peer_ds_full(4); }
  DEVICE uint32_t peer_k_full() const { return peer_ds_full(5); }
  DEVICE uint32_t peer_k_empty() const { return peer_ds_full(6); }
  // Of turns (turns.h): known to the adders; added, known to who passes on; passed on.
  DEVICE uint32_t turn(int stage) const { return first_of_turns() + 8 * stage; }
  DEVICE uint32_t added(int stage) const { return turn(2 + stage); }
  DEVICE uint32_t passed(int stage) const { return turn(4 + stage); }

  /// By one thread. others: warps that read Work besides those that load and compute.
  DEVICE void init(int others) const {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(work_full(i), 1);
      mbarrier_init(work_empty(i), 1 + F::readers * warpgroup_arrivals + others * warp_arrivals);
      mbarrier_init(ds_full(i), (F::scores_apart ? 1 : F::consumers) * warpgroup_arrivals);
      mbarrier_init(ds_empty(i), F::pair ? 2 * F::adders : 1);
      mbarrier_init(turn(i), 1);
      mbarrier_init(added(i), F::adders * warpgroup_arrivals);
      mbarrier_init(passed(i), 1);
    }
    mbarrier_init(work_wanted(), 1);
    mbarrier_init(p_full(), warpgroup_arrivals);
    if constexpr (F::pair) {
      for (int i = 0; i < Row::peer_stages; ++i) mbarrier_init(peer_ds_full(i), 1);
      mbarrier_init(p_empty(), F::consumers);
      mbarrier_init(peer_wants_ticket(), 1);
      mbarrier_init(ticket_full(), 1);
      mbarrier_init(peer_k_full(), 1);
      mbarrier_init(peer_k_empty(), F::adders);
    }
    init<Row::q_stages>(q_full(0), F::consumers * warpgroup_arrivals);
    init<Row::o_stages>(o_full(0), F::scores_apart ? 3 : F::consumers);
    init<Row::kv_stages>(k_full(0), F::adders);
    init<Row::kv_stages>(v_full(0), F::scores_apart ? 1 : F::consumers);
    fence_barrier_init();
  }

private:
  using F = Backward<Row>;

  DEVICE uint32_t first_of_turns() const {
    return begin + F::at.turns - F::at.barriers + 2 * backward_turn_bytes;
  }

  /// The "full" barriers of a ring, filled by one thread, and then its "empty" ones.
  template <int stages>
  DEVICE static void init(uint32_t ring, int arrivals) {
    for (int stage = 0; stage < stages; ++stage) {
      mbarrier_init(ring + 8 * stage, 1);
      mbarrier_init(ring + 8 * (stages + stage), arrivals);
    }
  }
};

} // namespace anyflash::sm90
