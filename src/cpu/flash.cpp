// The tiled algorithm's host side: cuts a problem into tasks, runs them on the pool, merges splits.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "core/error.h"
#include "cpu/convert.h"
#include "cpu/cpu.h"
#include "cpu/dispatch.h"
#include "cpu/pool.h"
#include "cpu/sequence.h"
#include "cpu/strips.h"

namespace anyflash::cpu {
namespace {

constexpr int most_strips = 12; // of a task: its Q and O stay in the second-level cache

/// How the strips of the query heads that share a key head are dealt out to tasks: either each head
/// gives several tasks, or several short heads make one, so that packed keys serve as many queries
/// as possible.
struct Division {
  int64_t strips_per_head = 0;
  int64_t tasks_per_head = 1; // 1 when heads_per_task > 1
  int64_t strips_per_task = 0;
  int64_t heads_per_task = 1;
  int64_t tasks = 0; // of one key head of one sequence

  Division(int64_t used_rows, int64_t unused_rows, int64_t group, int Br) {
    const int64_t most = Br / strip_rows;
    strips_per_head = ceil_div(used_rows, strip_rows) + ceil_div(unused_rows, strip_rows);
    if (strips_per_head == 0) return;
    tasks_per_head = ceil_div(strips_per_head, most);
    strips_per_task = ceil_div(strips_per_head, tasks_per_head);
    heads_per_task = std::clamp<int64_t>(most / strips_per_head, 1, group);
    tasks = tasks_per_head * ceil_div(group, heads_per_task);
  }
};

/// One task: the strips of `part` of a key head, against part `split` of the keys they see.
struct Item {
  int64_t b, h_k, part;
  int split;
  int64_t cost; // visible (strip, key) pairs
};

class Forward {
public:
  Forward(const Problem& problem, const Tiling& tiling)
      : problem_(problem), tiling_(tiling), set_(chosen_instruction_set()),
        kernel_(kernels_for(set_, problem.dtype).forward) {}

  void run() {
    make_items();
    const int threads = is_tiny() ? 1 : thread_count();
    const auto task = [&](int64_t i, Scratch& scratch) { run_item(items_[i], scratch); };
    if (tiling_.splits > 1)
      partials_ = std::make_unique_for_overwrite<float[]>(items_.size() * partial_floats());
    run_tasks(static_cast<int64_t>(items_.size()), threads, task);
    if (tiling_.splits > 1) merge(threads);
  }

private:
  using Strips = Strip[most_strips];

  /// Too little work to wake another thread for.
  bool is_tiny() const {
    int64_t pairs = 0;
    for (const Item& item : items_) pairs += item.cost * strip_rows / tiling_.splits;
    return pairs * (problem_.d + problem_.dv) < 500'000;
  }

  /// The strips of an item, without partial results. Returns how many.
  int make_strips(const Item& item, const Sequence& sequence, Strips& strips) const {
    const int64_t unused = sequence.rows_q - sequence.seqlen_q;
    const Division division(sequence.seqlen_q, unused, problem_.group(), tiling_.Br);
    const int64_t used_strips = ceil_div(sequence.seqlen_q, strip_rows);
    const int64_t first_head = item.part / division.tasks_per_head * division.heads_per_task;
    const int64_t first = item.part % division.tasks_per_head * division.strips_per_task;
    const int64_t last = std::min(first + division.strips_per_task, division.strips_per_head);
    const int64_t last_head = std::min(first_head + division.heads_per_task, problem_.group());
    int count = 0;
    for (int64_t head = first_head; head < last_head; ++head)
      for (int64_t n = first; n < last; ++n) {
        const int64_t h = item.h_k * problem_.group() + head;
        const int64_t row =
            n < used_strips ? n * strip_rows : sequence.seqlen_q + (n - used_strips) * strip_rows;
        strips[count++] = make_strip(sequence, item.b, h, row);
      }
    return count;
  }

  /// Queries [first, first + strip_rows) of head h in sequence b.
  Strip make_strip(const Sequence& sequence, int64_t b, int64_t h, int64_t first) const {
    Strip strip{};
    static_cast<Queries&>(strip) = first < sequence.seqlen_q
                                       ? used_queries(problem_, sequence, b, h, first, strip_rows)
                                       : unused_queries(sequence, first, strip_rows);
    strip.q = row_of(problem_, problem_.q, sequence.q, first, h);
    strip.o = row_of(problem_, problem_.o, sequence.o, first, h);
    if (problem_.lse) strip.lse = problem_.lse + sequence.lse + h * sequence.lse_head + first;
    return strip;
  }

  void make_items() {
    for (int64_t b = 0; b < problem_.batch; ++b) {
      const Sequence sequence = sequence_of(problem_, b);
      const Division division(sequence.seqlen_q, sequence.rows_q - sequence.seqlen_q,
                              problem_.group(), tiling_.Br);
      for (int64_t part = 0; part < division.tasks; ++part) {
        Item item{b, 0, part, 0, 0};
        Strips strips;
        const int count = make_strips(item, sequence, strips);
        for (int i = 0; i < count; ++i) item.cost += strips[i].key_end - strips[i].key_begin;
        for (item.h_k = 0; item.h_k < problem_.heads_k; ++item.h_k)
          for (item.split = 0; item.split < tiling_.splits; ++item.split) items_.push_back(item);
      }
    }
    // Heaviest first, so that no thread is left with much when the others are done. Splits of one
    // part stay together: merge() counts on it.
    std::stable_sort(items_.begin(), items_.end(),
                     [](const Item& a, const Item& b) { return a.cost > b.cost; });
  }

  size_t partial_floats() const {
    return static_cast<size_t>(tiling_.Br) * (static_cast<size_t>(problem_.dv) + 2);
  }
  float* partial_of(const Item& item) const {
    return partials_.get() + static_cast<size_t>(&item - items_.data()) * partial_floats();
  }

  void run_item(const Item& item, Scratch& scratch) const {
    const Sequence sequence = sequence_of(problem_, item.b);
    Strips strips;
    Block block{};
    static_cast<BlockBase&>(block) = block_base(problem_, sequence, item.h_k);
    block.strips = strips;
    block.strip_count = make_strips(item, sequence, strips);
    choose_keys(item, block);
    if (tiling_.splits > 1) {
      float* partial = partial_of(item);
      for (int i = 0; i < block.strip_count; ++i)
        strips[i].partial = partial + i * strip_rows * (problem_.dv + 2);
    }
    kernel_(block, scratch.floats(set_.forward_scratch(block.strip_count, block.d, block.dv)));
  }

  /// The keys that any strip sees; of these, the item's split in whole blocks.
  void choose_keys(const Item& item, Block& block) const {
    int begin = std::numeric_limits<int>::max(), end = 0;
    for (int i = 0; i < block.strip_count; ++i) {
      const Strip& strip = block.strips[i];
      if (strip.key_begin >= strip.key_end) continue;
      begin = std::min(begin, strip.key_begin);
      end = std::max(end, strip.key_end);
    }
    if (begin >= end) return; // nobody sees anything
    const int64_t first = begin / block_keys, blocks = ceil_div(end, block_keys) - first;
    const auto boundary = [&](int split) {
      return static_cast<int>((first + blocks * split / tiling_.splits) * block_keys);
    };
    block.key_begin = std::max(begin, boundary(item.split));
    block.key_end = std::min(end, boundary(item.split + 1));
  }

  void merge(int threads) const {
    const int64_t parts = static_cast<int64_t>(items_.size()) / tiling_.splits;
    run_tasks(parts, threads, [&](int64_t part, Scratch&) {
      const Item& item = items_[part * tiling_.splits];
      switch (problem_.dtype) {
      case DType::float16:
        return merge_item<Float16>(item);
      case DType::bfloat16:
        return merge_item<BFloat16>(item);
      default:
        return merge_item<float>(item);
      }
    });
  }

  template <class T>
  void merge_item(const Item& item) const {
    Strips strips;
    const int count = make_strips(item, sequence_of(problem_, item.b), strips);
    for (int i = 0; i < count; ++i)
      for (int r = 0; r < strips[i].rows; ++r)
        merge_row(partial_of(item) + (i * strip_rows + r) * (problem_.dv + 2),
                  static_cast<T*>(strips[i].o) + r * problem_.o.row,
                  strips[i].lse ? strips[i].lse + r : nullptr);
  }

  /// O = sum_s w_s O_s / sum_s w_s l_s with w_s = 2^(m_s - max m), in the order of the splits.
  template <class T>
  void merge_row(const float* partial, T* o, float* lse) const {
    const int64_t dv = problem_.dv;
    const auto split = [&](int s) { return partial + s * partial_floats(); };
    float m = -std::numeric_limits<float>::infinity();
    for (int s = 0; s < tiling_.splits; ++s) m = std::max(m, split(s)[dv]);
    const bool empty = m == -std::numeric_limits<float>::infinity();
    std::vector<float> sum(static_cast<size_t>(dv), 0.0f);
    float l = 0;
    for (int s = 0; s < tiling_.splits && !empty; ++s) {
      const float weight = std::exp2(split(s)[dv] - m);
      l += weight * split(s)[dv + 1];
      for (int64_t e = 0; e < dv; ++e) sum[e] += weight * split(s)[e];
    }
    for (int64_t e = 0; e < dv; ++e) store(empty ? 0.0f : sum[e] / l, o[e]);
    if (lse) *lse = empty ? m : static_cast<float>((m + std::log2(static_cast<double>(l))) * M_LN2);
  }

  const Problem& problem_;
  const Tiling tiling_;
  const InstructionSet& set_;
  void (*const kernel_)(const Block& block, float* scratch);
  std::vector<Item> items_;
  std::unique_ptr<float[]> partials_; // [items][Br][dv + 2] when the keys are split
};

} // namespace

Tiling forward_tiling(const Problem& problem) {
  constexpr int64_t enough_blocks = 16, enough_tasks = 32; // to keep a few threads busy
  constexpr int64_t least_keys = 512;                      // of a split
  const auto blocks = [&](int Br) {
    const Division division(problem.seqlen_q, 0, std::max<int64_t>(1, problem.group()), Br);
    return std::max<int64_t>(1, division.tasks * problem.heads_k * problem.batch);
  };
  Tiling tiling;
  tiling.Bc = block_keys;
  // Large blocks, because each packs the keys anew; smaller ones where there would be too few.
  int strips = problem.d + problem.dv > 256 ? most_strips / 2 : most_strips;
  while (strips > 4 && blocks(strips * strip_rows) < enough_blocks) strips -= 2;
  tiling.Br = strips * strip_rows;
  tiling.splits = static_cast<int>(std::clamp<int64_t>(
      std::min(ceil_div(enough_tasks, blocks(tiling.Br)), problem.seqlen_k / least_keys), 1,
      enough_tasks));
  return tiling;
}

Tiling tiling(const Problem& problem) {
  return problem.op == ANYFLASH_FORWARD ? forward_tiling(problem) : backward_tiling(problem);
}

void forward(const Problem& problem, const Tiling& tiling) {
  if (problem.dtype == DType::float64)
    throw NotSupported("float64 is computed by the reference only");
  Forward(problem, tiling).run();
}

int threads() { return thread_count(); }

} // namespace anyflash::cpu
