// What the loading warpgroup of the sm90 backward does: key blocks one after the other, and for
// each the queries that see it.
#pragma once

#include "cuda/attn/key_block.h"
#include "cuda/attn/score.h"
#include "cuda/ptx/atomic.h"
#include "cuda/ptx/cluster.h"
#include "cuda/ptx/copy.h"
#include "cuda/ptx/ldmatrix.h"
#include "cuda/ptx/warpgroup.h"
#include "cuda/sm90/backward/layout.h"
#include "cuda/sm90/backward/tickets.h"
#include "cuda/sm90/params.h"
#include "cuda/sm90/ragged_load.h"

namespace anyflash::sm90 {

/// Reads what the loader wrote about one block of keys after the other.
template <class Row>
class WorkReader {
public:
  DEVICE WorkReader(const char* shared_memory)
      : work_(shared_memory + Backward<Row>::at.work),
        barriers_{shared_address(shared_memory) + Backward<Row>::at.barriers} {}

  DEVICE const volatile Work& wait() const {
    mbarrier_wait(barriers_.work_full(at_.stage()), at_.phase());
    return *reinterpret_cast<const volatile Work*>(work_ + at_.stage() * Backward<Row>::work_bytes);
  }
  /// By all lanes of a warp, after its last use of what wait() gave.
  DEVICE void next() {
    warp_arrive(barriers_.work_empty(at_.stage()));
    at_.advance();
  }
  DEVICE void next_of_thread() {
    mbarrier_arrive(barriers_.work_empty(at_.stage()));
    at_.advance();
  }

private:
  const char* work_;
  BackwardBarriers<Row> barriers_;
  Ring<2> at_;
};

/// By one warp or more of those that follow the loader: visit(work) for one block of keys after the
/// other.
template <class Row, class Visit>
DEVICE void for_each_work(const BackwardParams& p, const char* shared_memory, Visit visit) {
  WorkReader<Row> reader(shared_memory);
  ROLLED
  while (true) {
    const volatile Work& work = reader.wait();
    if (work.ticket >= p.key_blocks) return;
    visit(work);
    reader.next();
  }
}

/// The queries whose dQ is added to here: of a pair, those that see keys of either block.
template <class Row>
DEVICE const volatile auto& added_queries(const volatile Work& work) {
  if constexpr (Backward<Row>::pair)
    return in_pair(work).of_pair;
  else
    return work;
}

/// The blocks of queries of a key block, one after the other, each of all heads of the group. The
/// last queries come first: under a causal mask all blocks of keys then begin with the same ones,
/// which they find in the L2 cache, and whose dQ nobody waits long for. Head by head instead, those
/// with few queries would wait at each head for those with many.
struct QueryCursor {
  int i;
  int head; // of the group

  template <class Range>
  DEVICE QueryCursor(const volatile Range& queries) : i(queries.end - 1), head(0) {}
  DEVICE void advance(const BackwardParams& p) {
    if (++head < static_cast<int>(p.group.divisor)) return;
    head = 0;
    --i;
  }
  /// In the workspace.
  DEVICE int64_t first_row(const volatile Work& work, int64_t padded_rows, int Br) const {
    return work.first_row + head * padded_rows + i * Br;
  }
};

/// The thread that decides which block of keys comes next. They are handed out by a counter in
/// global memory, in their order, and as late as the loader can do with: who holds work early makes
/// others wait at the end. Blocks wait for parts of dQ, of those before in this order, which
/// therefore run.
template <class Row>
class Scheduler {
  using F = Backward<Row>;

public:
  DEVICE Scheduler(const BackwardParams& p, char* shared_memory)
      : p_(p), work_(shared_memory + F::at.work),
        barriers_{shared_address(shared_memory) + F::at.barriers} {}

  DEVICE void run() {
    finder().sequence = finder().before = 0;
    ROLLED
    while (true) {
      const uint32_t ticket = next_ticket();
      mbarrier_wait(barriers_.work_empty(at_.stage()), at_.phase() ^ 1);
      slot().ticket = ticket;
      const bool over = ticket >= p_.key_blocks;
      if (!over) {
        wait_for_zeros(ticket);
        describe(ticket);
      }
      mbarrier_arrive(barriers_.work_full(at_.stage()));
      if (over) return;
      mbarrier_wait(barriers_.work_wanted(), at_.count & 1);
      at_.advance();
    }
  }

private:
  DEVICE uint32_t next_ticket() const {
    if constexpr (F::pair)
      return next_ticket_of_pair();
    else
      return draw();
  }
  DEVICE uint32_t draw() const { return finder().find(p_, atomicAdd(p_.tickets, 1)); }
  /// Block 0 of a pair draws for both, when both want it; at_ counts what was drawn.
  DEVICE uint32_t next_ticket_of_pair() const {
    const uint32_t parity = at_.count & 1;
    if (F::rank() == 0) {
      mbarrier_wait(barriers_.peer_wants_ticket(), parity);
      const uint32_t ticket = draw();
      cluster_store(shared_of(1, barriers_.ticket()), ticket);
      cluster_arrive_after_writes(shared_of(1, barriers_.ticket_full()));
      return ticket;
    }
    cluster_arrive(shared_of(0, barriers_.peer_wants_ticket()));
    cluster_wait_for_writes(barriers_.ticket_full(), parity);
    return ld_shared(barriers_.ticket());
  }
  DEVICE volatile TicketFinder<Row>& finder() const {
    return *reinterpret_cast<volatile TicketFinder<Row>*>(work_ + F::at.finder - F::at.work);
  }
  DEVICE volatile Work& slot() const {
    return *reinterpret_cast<volatile Work*>(work_ + recomputed(at_.stage()) * F::work_bytes);
  }

  /// The parts of this head's sums belong to tickets before this one, of a head heads_ahead before.
  DEVICE void wait_for_zeros(uint32_t ticket) const {
    if (!p_.zeroed) return;
    const uint32_t head_index = divide(ticket, p_.key_section_blocks);
    if (head_index < p_.heads_ahead) return;
    const int before = divide(head_index - p_.heads_ahead, p_.key_heads); // the sequence
    const int parts = tickets_of_head<Row>(p_, before) * Row::cluster;
    while (load_relaxed(p_.zeroed + head_index) != parts) {
    }
    __threadfence();
  }

  DEVICE void describe(uint32_t ticket) const {
    volatile Work& work = slot();
    const KeyBlock<typename F::Keys> block(p_, ticket);
    work.first_key = block.first_key + place_in_pair() * Row::Bc;
    work.seqlen_q = block.seqlen_q;
    work.seqlen_k = block.seqlen_k;
    work.diagonal = block.diagonal();
    work.head_k = block.head_k;
    work.head = block.head_k * p_.group.divisor;
    work.sequence = block.sequence;
    work.batch = p_.cu_seqlens_q ? 0 : block.sequence;
    work.first_q = static_cast<int>(block.first_q);
    work.first_k = static_cast<int>(block.first_k);
    work.first_row = workspace_row<Row>(p_, block.sequence, block.head_k * p_.group.divisor);
    work.rows = block.rows - work.first_key;
    if constexpr (F::pair) describe_pair(static_cast<volatile PairWork&>(work), block);
    const KeyBlocks queries =
        F::own_queries ? block.queries(p_, work.first_key, Row::Bc) : block.queries(p_);
    work.begin = queries.begin;
    work.end = queries.end;
    work.full_begin = queries.full_begin;
    work.full_end = queries.full_end;
    const bool nothing = block.outside() || queries.empty();
    work.steps = nothing ? 0 : (queries.end - queries.begin) * p_.group.divisor;
    work.last_steps = 1 + steps_alone(work);
    work.dk_offset = offset(work, p_.dk_strides);
    work.dv_offset = offset(work, p_.dv_strides);
  }

  /// Which of a pair's keys are this block's: under a causal mask the second half is seen by fewer
  /// queries, so that they take turns; not where the order of additions must be the same.
  DEVICE int place_in_pair() const {
    return F::rank() ^ (F::own_queries && !p_.turns ? at_.count & 1 : 0);
  }

  /// How many steps the other block of the pair is done before this one: it wants more work then.
  DEVICE int steps_alone(const volatile Work& work) const {
    if constexpr (!F::own_queries) return 0;
    const int blocks = in_pair(work).of_peer.begin - work.begin;
    return max(0, min(blocks * static_cast<int>(p_.group.divisor), work.steps - 1));
  }

  template <class Block>
  DEVICE void describe_pair(volatile PairWork& work, const Block& block) const {
    describe_queries(work.of_pair, block.queries(p_));
    describe_queries(work.of_peer, F::own_queries
                                       ? block.queries(p_, work.first_key ^ Row::Bc, Row::Bc)
                                       : block.queries(p_));
  }
  DEVICE void describe_queries(volatile Queries& to, const KeyBlocks& queries) const {
    to.begin = queries.begin;
    to.end = queries.end;
    to.steps = (queries.end - queries.begin) * p_.group.divisor;
  }

  /// Elements to the first key; from shared memory, since registers are few here.
  DEVICE static int64_t offset(const volatile Work& work, const Strides& strides) {
    return work.sequence * strides.batch + (int64_t{work.first_k} + work.first_key) * strides.row +
           work.head_k * strides.head;
  }

  const BackwardParams& p_;
  char* work_;
  BackwardBarriers<Row> barriers_;
  Ring<2> at_;
};

/// Zeroes all tiles, by all threads, where some pages will not be loaded: they have no columns.
template <class Row>
DEVICE void zero_missing_pages(const BackwardParams& p, uint32_t shared) {
  using F = Backward<Row>;
  using Q = typename F::QTile;
  using O = typename F::OTile;
  if (pages_with<Q>(p.d) == Q::pages && pages_with<O>(p.dv) == O::pages) return;
  ROLLED
  for (int at = threadIdx.x * 16; at < F::at.stats; at += Row::warps * (32 * 16))
    st_shared(shared + at, uint4{0, 0, 0, 0});
  fence_async_shared();
}

/// The thread that starts the copies from global memory.
template <class Row>
class Loader {
  using F = Backward<Row>;

public:
  DEVICE Loader(const BackwardParams& p, char* shared_memory)
      : p_(p), memory_(shared_memory), shared_(shared_address(shared_memory)),
        barriers_{shared_ + F::at.barriers} {}

  DEVICE void run() {
    WorkReader<Row> reader(memory_);
    ROLLED
    while (true) {
      const volatile Work& work = reader.wait();
      if (work.ticket >= p_.key_blocks) return;
      load(work);
      reader.next_of_thread();
    }
  }

private:
  /// Queries before keys: their stages are free while the consumers still read the K and V before.
  DEVICE void load(const volatile Work& work) {
    QueryCursor at(work);
    if (work.steps == 0) mbarrier_arrive(barriers_.work_wanted());
    ROLLED
    for (int left = work.steps; left > 0; --left) {
      const bool first = left == work.steps;
      if (left == work.last_steps) mbarrier_arrive(barriers_.work_wanted());
      load_queries(work, at);
      if (first)
        load_keys<typename F::KTile>(work, p_.d, &p_.k_map, F::at.k, barriers_.k_full(kv_.stage()),
                                     barriers_.k_empty(kv_.stage()));
      load_gradients(work, at);
      if (first) {
        load_keys<typename F::VTile>(work, p_.dv, &p_.v_map, F::at.v, barriers_.v_full(kv_.stage()),
                                     barriers_.v_empty(kv_.stage()));
        kv_.advance();
      }
      at.advance(p_);
      q_.advance();
      if constexpr (!one_ring) o_.advance();
    }
  }

  DEVICE void load_queries(const volatile Work& work, const QueryCursor& at) {
    mbarrier_wait(barriers_.q_empty(q_.stage()), q_.phase() ^ 1);
    const int64_t first_row = at.first_row(work, p_.padded_rows, Row::Br);
    auto& step =
        *reinterpret_cast<volatile Step*>(memory_ + F::at.steps + q_.stage() * backward_step_bytes);
    step.first_row = first_row;
    step.first_query = at.i * Row::Br;
    step.on_edge = at.i < work.full_begin || at.i >= work.full_end;
    step.head = work.head + at.head;
    const uint32_t full = barriers_.q_full(q_.stage());
    using Tile = typename F::QTile;
    const int pages = pages_with<Tile>(p_.d);
    mbarrier_arrive_expect(full, pages * Tile::page_bytes + F::stats_bytes);
    bulk_load(shared_ + F::at.stats + q_.stage() * F::stats_bytes, p_.row_stats + first_row * 2,
              F::stats_bytes, full);
    load_rows<Tile>(shared_ + F::at.q + q_.stage() * Tile::bytes, pages, &p_.q_map, full, 0,
                    work.first_q, at.i * Row::Br, work.seqlen_q, work.head + at.head, work.batch);
  }

  DEVICE void load_gradients(const volatile Work& work, const QueryCursor& at) {
    const auto& o = gradients();
    const uint32_t full = barriers_.o_full(o.stage());
    mbarrier_wait(barriers_.o_empty(o.stage()), o.phase() ^ 1);
    using Tile = typename F::OTile;
    const int pages = pages_with<Tile>(p_.dv);
    mbarrier_arrive_expect(full, pages * Tile::page_bytes);
    load_rows<Tile>(shared_ + F::at.o + o.stage() * Tile::bytes, pages, &p_.dout_map, full, 0,
                    work.first_q, at.i * Row::Br, work.seqlen_q, work.head + at.head, work.batch);
  }

  template <class Tile>
  DEVICE void load_keys(const volatile Work& work, int columns, const TensorMap* map, int offset,
                        uint32_t full, uint32_t empty) {
    const int pages = pages_with<Tile>(columns);
    mbarrier_wait(empty, kv_.phase() ^ 1);
    mbarrier_arrive_expect(full, pages * Tile::page_bytes);
    load_rows<Tile>(shared_ + offset + kv_.stage() * Tile::bytes, pages, map, full, 0, work.first_k,
                    work.first_key, work.seqlen_k, work.head_k, work.batch);
  }

  DEVICE const Ring<Row::o_stages>& gradients() const {
    if constexpr (one_ring)
      return q_;
    else
      return o_;
  }

  static constexpr bool one_ring = Row::q_stages == Row::o_stages; // registers are few here
  const BackwardParams& p_;
  char* memory_;
  uint32_t shared_;
  BackwardBarriers<Row> barriers_;
  Ring<Row::q_stages> q_;
  Ring<Row::o_stages> o_;
  Ring<Row::kv_stages> kv_;
};

} // namespace anyflash::sm90
