// The backward's host side: cuts a problem into tasks, runs them on the pool, sums the parts.
//
// A task is one key head of one sequence with all its keys and a part of the queries that read it,
// those of every query head of the group. So dQ belongs to one task, and dK and dV are complete
// unless the queries had to be split to make enough tasks.
#include <algorithm>
#include <memory>
#include <vector>

#include "core/error.h"
#include "cpu/cpu.h"
#include "cpu/dispatch.h"
#include "cpu/pool.h"
#include "cpu/sequence.h"
#include "cpu/strips.h"

namespace anyflash::cpu {
namespace {

/// One key head of one sequence.
struct KeyHead {
  int64_t b, h_k;
  int parts;
  int64_t partial; // offset of its partial sums [parts][rows_k][d + dv]; not used if parts == 1
};

/// One task: strips [first_strip, last_strip) of a key head.
struct Item {
  int64_t key_head;
  int part;
  int64_t first_strip, last_strip;
  int64_t cost; // visible (strip, key) pairs
};

class Backward {
public:
  Backward(const Problem& problem, const Tiling& tiling)
      : problem_(problem), tiling_(tiling), set_(chosen_instruction_set()),
        kernels_(kernels_for(set_, problem.dtype)) {}

  void run() {
    make_items();
    const int threads = is_tiny() ? 1 : thread_count();
    if (partial_floats_ > 0)
      partials_ = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(partial_floats_));
    run_tasks(static_cast<int64_t>(items_.size()), threads,
              [&](int64_t i, Scratch& scratch) { run_item(items_[i], scratch); });
    if (partial_floats_ > 0) merge(threads);
  }

private:
  /// Strips of one query head, the used rows before the others.
  static int64_t used_strips(const Sequence& sequence) {
    return ceil_div(sequence.seqlen_q, gradient_rows);
  }
  static int64_t strips_per_head(const Sequence& sequence) {
    return used_strips(sequence) + ceil_div(sequence.rows_q - sequence.seqlen_q, gradient_rows);
  }

  /// Strip `index` of the key head: its first row, and the keys it sees.
  struct Place {
    int64_t h, row;
    Queries queries;
  };
  Place place(const KeyHead& head, const Sequence& sequence, int64_t index) const {
    const int64_t used = used_strips(sequence), n = index % strips_per_head(sequence);
    const int64_t h = head.h_k * problem_.group() + index / strips_per_head(sequence);
    if (n < used) {
      const int64_t row = n * gradient_rows;
      return {h, row, used_queries(problem_, sequence, head.b, h, row, gradient_rows)};
    }
    const int64_t row = sequence.seqlen_q + (n - used) * gradient_rows;
    return {h, row, unused_queries(sequence, row, gradient_rows)};
  }

  GradientStrip make_strip(const KeyHead& head, const Sequence& sequence, int64_t index) const {
    const Place at = place(head, sequence, index);
    const int64_t row = sequence.lse + at.h * sequence.lse_head + at.row;
    GradientStrip strip{};
    static_cast<Queries&>(strip) = at.queries;
    strip.q = row_of(problem_, problem_.q, sequence.q, at.row, at.h);
    strip.o = row_of(problem_, problem_.o, sequence.o, at.row, at.h);
    strip.dout = row_of(problem_, problem_.dout, sequence.dout, at.row, at.h);
    strip.dq = row_of(problem_, problem_.dq, sequence.dq, at.row, at.h);
    strip.lse = problem_.lse + row;
    if (problem_.dlse) strip.dlse = problem_.dlse + row;
    return strip;
  }

  void make_items() {
    for (int64_t b = 0; b < problem_.batch; ++b) {
      const Sequence sequence = sequence_of(problem_, b);
      if (sequence.rows_q == 0 && sequence.rows_k == 0) continue;
      for (int64_t h_k = 0; h_k < problem_.heads_k; ++h_k) add_key_head({b, h_k, 1, 0}, sequence);
    }
    // Heaviest first, so that no thread is left with much when the others are done.
    std::stable_sort(items_.begin(), items_.end(),
                     [](const Item& a, const Item& b) { return a.cost > b.cost; });
  }

  /// Splits the strips of a key head into parts of about the same cost.
  void add_key_head(KeyHead head, const Sequence& sequence) {
    const int64_t strips = problem_.group() * strips_per_head(sequence);
    std::vector<int64_t> cost(static_cast<size_t>(strips) + 1, 0); // of the strips before
    for (int64_t i = 0; i < strips; ++i) {
      const Queries queries = place(head, sequence, i).queries;
      cost[i + 1] = cost[i] + 1 + queries.key_end - queries.key_begin;
    }
    head.parts = static_cast<int>(std::clamp<int64_t>(strips, 1, tiling_.splits));
    if (head.parts > 1) {
      head.partial = partial_floats_;
      partial_floats_ += head.parts * partial_of_part(sequence);
    }
    int64_t first = 0;
    for (int part = 0; part < head.parts; ++part) {
      const int64_t until = cost[strips] * (part + 1) / head.parts;
      const int64_t last =
          std::upper_bound(cost.begin() + first, cost.end(), until) - cost.begin() - 1;
      items_.push_back(
          {static_cast<int64_t>(key_heads_.size()), part, first, last, cost[last] - cost[first]});
      first = last;
    }
    key_heads_.push_back(head);
  }

  /// Floats of one part's share of dK and dV.
  int64_t partial_of_part(const Sequence& sequence) const {
    return sequence.rows_k * (problem_.d + problem_.dv);
  }

  /// Too little work to wake another thread for.
  bool is_tiny() const {
    int64_t pairs = 0;
    for (const Item& item : items_) pairs += item.cost * gradient_rows;
    return pairs * (problem_.d + problem_.dv) < 200'000;
  }

  void run_item(const Item& item, Scratch& scratch) const {
    const KeyHead& head = key_heads_[item.key_head];
    const Sequence sequence = sequence_of(problem_, head.b);
    std::vector<GradientStrip> strips;
    for (int64_t i = item.first_strip; i < item.last_strip; ++i)
      strips.push_back(make_strip(head, sequence, i));
    GradientBlock block{};
    static_cast<BlockBase&>(block) = block_base(problem_, sequence, head.h_k);
    block.strips = strips.data();
    block.strip_count = static_cast<int>(strips.size());
    block.dk = row_of(problem_, problem_.dk, sequence.dk, 0, head.h_k);
    block.dv_out = row_of(problem_, problem_.dv_out, sequence.dv, 0, head.h_k);
    if (head.parts > 1)
      block.partial = partials_.get() + head.partial + item.part * partial_of_part(sequence);
    block.dout_row = problem_.dout.row;
    block.dq_row = problem_.dq.row;
    block.dk_row = problem_.dk.row;
    block.dv_out_row = problem_.dv_out.row;
    block.rows_k = static_cast<int>(sequence.rows_k);
    kernels_.backward(block,
                      scratch.floats(set_.backward_scratch(block.strip_count, block.d, block.dv)));
  }

  /// dK and dV of the key heads that have several parts.
  void merge(int threads) const {
    run_tasks(static_cast<int64_t>(key_heads_.size()), threads, [&](int64_t i, Scratch&) {
      const KeyHead& head = key_heads_[i];
      if (head.parts == 1) return;
      const Sequence sequence = sequence_of(problem_, head.b);
      const int64_t row = problem_.d + problem_.dv;
      PartialRows rows{partials_.get() + head.partial,
                       partial_of_part(sequence),
                       row,
                       head.parts,
                       static_cast<int>(sequence.rows_k),
                       static_cast<int>(problem_.d),
                       row_of(problem_, problem_.dk, sequence.dk, 0, head.h_k),
                       problem_.dk.row};
      kernels_.merge_gradients(rows);
      rows.partial += problem_.d;
      rows.columns = static_cast<int>(problem_.dv);
      rows.to = row_of(problem_, problem_.dv_out, sequence.dv, 0, head.h_k);
      rows.to_row = problem_.dv_out.row;
      kernels_.merge_gradients(rows);
    });
  }

  const Problem& problem_;
  const Tiling tiling_;
  const InstructionSet& set_;
  const Kernels& kernels_;
  std::vector<KeyHead> key_heads_;
  std::vector<Item> items_;
  int64_t partial_floats_ = 0;
  std::unique_ptr<float[]> partials_;
};

} // namespace

Tiling backward_tiling(const Problem& problem) {
  constexpr int64_t enough_tasks = 16, least_strips = 2; // of a part
  const int64_t key_heads = std::max<int64_t>(1, problem.batch * problem.heads_k);
  const int64_t strips =
      std::max<int64_t>(1, problem.group()) * ceil_div(problem.seqlen_q, gradient_rows);
  Tiling tiling;
  tiling.Br = gradient_rows;
  tiling.Bc = gradient_keys;
  tiling.splits = static_cast<int>(std::clamp<int64_t>(
      std::min(ceil_div(enough_tasks, key_heads), strips / least_strips), 1, enough_tasks));
  return tiling;
}

void backward(const Problem& problem, const Tiling& tiling) {
  if (problem.dtype == DType::float64)
    throw NotSupported("float64 is computed by the reference only");
  Backward(problem, tiling).run();
}

} // namespace anyflash::cpu
