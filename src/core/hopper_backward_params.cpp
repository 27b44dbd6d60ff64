#include "core/hopper_backward_params.h"

#include <algorithm>

#include "core/kernel_params.h"
#include "core/tensor_maps.h"

namespace anyflash {
namespace {

/// Key heads whose blocks run together where they add to dQ in turns: more, and their queries and
/// sums leave the L2 cache; fewer, and their blocks wait for each other.
int64_t heads_that_take_turns(const Problem& problem, const Row& row) {
  constexpr int64_t cache_bytes = int64_t{16} << 20;
  const int64_t row_bytes = (row.d + row.dv) * size_of(problem.dtype) + row.d * 4;
  const int64_t head_bytes = std::max<int64_t>(problem.seqlen_q, 1) * row_bytes * problem.group();
  return std::clamp<int64_t>(cache_bytes / head_bytes, 4, 128);
}

/// Key heads whose sums of dQ are zeroed before the main kernel. It zeroes the others itself, that
/// many heads ahead: enough for all blocks that run together, so that nobody waits, and few enough
/// for the zeros to be in the L2 cache when they are added to.
int64_t heads_ahead(int64_t key_blocks, int multiprocessors) {
  return 1 + (multiprocessors + key_blocks - 1) / key_blocks;
}

} // namespace

sm90::BackwardParams hopper_backward_params(const Problem& problem, const Row& row, void* workspace,
                                            int multiprocessors, bool turns) {
  sm90::BackwardParams p{};
  static_cast<BackwardParams&>(p) = backward_params(problem, row, workspace, turns);
  const auto map = [&](const View& view, const Extents& extents, int columns, int box_rows) {
    return ragged_tensor_map(view, extents, problem.dtype, box_columns(columns), box_rows);
  };
  p.q_map = map(problem.q, query_extents(problem, problem.d), row.d, row.Br);
  p.k_map = map(problem.k, key_extents(problem, problem.d), row.d, row.Bc);
  p.v_map = map(problem.v, key_extents(problem, problem.dv), row.dv, row.Bc);
  p.dout_map = map(problem.dout, query_extents(problem, problem.dv), row.dv, row.Br);
  const BackwardWorkspace layout = backward_workspace(problem, row);
  const auto counters = [&](uint64_t offset) {
    return reinterpret_cast<int32_t*>(static_cast<char*>(workspace) + offset);
  };
  p.tickets = counters(layout.tickets);
  const int64_t keys = row.Bc * row.cluster(); // of a ticket
  const int64_t blocks = (problem.seqlen_k + keys - 1) / keys;
  const int64_t heads = problem.heads_k * problem.batch;
  int64_t section = 1;
  if (turns)
    section =
        problem.packed ? problem.heads_k : std::min(heads, heads_that_take_turns(problem, row));
  p.key_section = make_divisor(section);
  p.key_last_section = make_divisor((heads - 1) % section + 1);
  p.key_section_blocks = make_divisor(section * std::max<int64_t>(1, blocks));
  p.key_blocks = static_cast<uint32_t>(blocks * problem.heads_k * problem.batch);
  if (turns || problem.seqlen_q == 0 || blocks == 0) return p;
  const int64_t blocks_of_head =
      problem.packed ? std::max<int64_t>(1, problem.total_k / keys / problem.batch) : blocks;
  const int64_t ahead = heads_ahead(blocks_of_head, multiprocessors / row.cluster());
  p.heads_ahead = static_cast<uint32_t>(std::min(ahead, heads));
  if (ahead < heads) p.zeroed = counters(layout.zeroed);
  return p;
}

} // namespace anyflash
