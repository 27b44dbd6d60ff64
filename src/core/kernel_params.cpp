#include "core/kernel_params.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace anyflash {
namespace {

constexpr double log2_e = 1.4426950408889634;

Strides strides_of(const View& view) { return {view.batch, view.row, view.head}; }

int32_t int32_of(int64_t value) { return static_cast<int32_t>(value); }

/// Heads whose blocks run together. Without a mask one at a time: blocks that run together read the
/// same keys. Under a causal mask as many as keep their keys and values in the L2 cache, so that
/// the long blocks of all of them come first and the short ones fill the gaps.
int64_t section_heads(const Problem& problem) {
  constexpr int64_t cache_bytes = int64_t{32} << 20;
  const int64_t all = problem.batch * problem.heads;
  if (problem.mask.right == Mask::unbounded) return 1;
  const int64_t bytes_a_head =
      std::max<int64_t>(problem.seqlen_k, 1) * (problem.d + problem.dv) * size_of(problem.dtype);
  const int64_t heads = cache_bytes / bytes_a_head * problem.group();
  return std::clamp<int64_t>(heads, 1, all);
}

/// How S comes from Q K^T; see cuda/attn/score.h.
void set_score(AttentionParams& p, const Problem& problem) {
  const double scale = problem.scale, softcap = problem.softcap;
  double factor = std::abs(scale) * log2_e;
  if (softcap > 0) {
    p.softcap_in = static_cast<float>(scale / softcap);
    factor = softcap * log2_e;
  }
  // The factor is never 0; a scale of 0 is a softcap that lets nothing through.
  const bool nothing = softcap > 0 ? p.softcap_in == 0 : static_cast<float>(factor) == 0;
  if (nothing) {
    p.softcap_in = std::numeric_limits<float>::min();
    factor = log2_e;
  }
  p.factor = static_cast<float>(factor);
  p.alibi_factor = static_cast<float>(log2_e / factor);
  p.negative = scale < 0 && p.softcap_in == 0;
}

/// Key heads whose blocks run together in the backward. One at a time: blocks that run together
/// read the same queries. Where they add to dQ in turns, so many that few blocks of a head wait for
/// each other, and so few that what they read and add to stays in half of a large GPU's L2. With a
/// causal mask half of the blocks are short. Measured at d 64, length 512, full: 64 heads are 9 %
/// faster than 128.
int64_t key_section(const Problem& problem) {
  if (!problem.deterministic) return 1;
  const int64_t half_cache = int64_t{32} << 20;
  const int64_t head_bytes = // Q and dO in 16 bits, the sums of dQ in 32
      std::max<int64_t>(1, problem.seqlen_q * (4 * problem.d + 2 * (problem.d + problem.dv)));
  const int64_t full = std::clamp<int64_t>(half_cache / head_bytes, 16, 128);
  const int64_t heads =
      problem.mask.right == 0 ? std::min<int64_t>(2 * full, 128) : std::min<int64_t>(full, 64);
  return std::min(problem.batch * problem.heads_k, heads);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void set_attention(AttentionParams& p, const Problem& problem, const Row& row) {
  p.q = problem.q.data;
  p.k = problem.k.data;
  p.v = problem.v.data;
  p.alibi_slopes = problem.alibi_slopes;
  p.cu_seqlens_q = problem.cu_seqlens_q;
  p.cu_seqlens_k = problem.cu_seqlens_k;
  p.seqused_q = problem.seqused_q;
  p.seqused_k = problem.seqused_k;
  p.q_strides = strides_of(problem.q);
  p.k_strides = strides_of(problem.k);
  p.v_strides = strides_of(problem.v);
  p.o_strides = strides_of(problem.o);
  p.lse_batch = problem.packed ? 0 : problem.heads * problem.seqlen_q;
  p.lse_head = problem.packed ? problem.total_q : problem.seqlen_q;
  p.alibi_batch = problem.alibi_batch;

  const int64_t query_blocks = std::max<int64_t>(1, ceil_div(problem.seqlen_q, row.Br));
  const int64_t section = section_heads(problem);
  p.heads = make_divisor(std::max<int64_t>(1, problem.heads));
  p.group = make_divisor(std::max<int64_t>(1, problem.group()));
  p.section_heads = make_divisor(section);
  p.section_blocks = make_divisor(section * query_blocks);
  p.query_blocks = int32_of(query_blocks);

  p.batch = int32_of(problem.batch);
  p.seqlen_q = int32_of(problem.seqlen_q);
  p.seqlen_k = int32_of(problem.seqlen_k);
  p.d = int32_of(problem.d);
  p.dv = int32_of(problem.dv);
  p.window_left = int32_of(std::min(problem.mask.left, Mask::unbounded));
  p.window_right = int32_of(std::min(problem.mask.right, Mask::unbounded));

  set_score(p, problem);
  p.aligned = problem.aligned;
}

uint64_t on_256(uint64_t bytes) { return (bytes + 255) / 256 * 256; }

} // namespace

// With s = bit width of divisor - 1 and 2^s < divisor < 2^(s+1), multiplier = ceil(2^(32+s) /
// divisor) is in (2^31, 2^32) and n * multiplier / 2^(32+s) exceeds n / divisor by less than
// n * divisor / (divisor * 2^(32+s)) < 1 / divisor for n < 2^31: its floor is exact. A power of two
// 2^s takes 2^31 / 2^(31+s). divide() computes 2n * multiplier / 2^32 first, so that the shift that
// is left, s (+ 1), is never negative.
Divisor make_divisor(int64_t divisor) {
  const auto d = static_cast<uint32_t>(divisor);
  const uint32_t s = static_cast<uint32_t>(std::bit_width(d)) - 1;
  if (std::has_single_bit(d)) return {d, uint32_t{1} << 31, s, 0};
  const uint64_t numerator = uint64_t{1} << (32 + s);
  return {d, static_cast<uint32_t>((numerator + d - 1) / d), s + 1, 0};
}

ForwardParams forward_params(const Problem& problem, const Row& row) {
  ForwardParams p{};
  set_attention(p, problem, row);
  p.o = problem.o.data;
  p.lse = problem.lse;
  return p;
}

int64_t padded_rows(const Problem& problem, int Br) {
  const int64_t blocks = problem.packed ? problem.total_q / Br + problem.batch
                                        : problem.batch * ceil_div(problem.seqlen_q, Br);
  return blocks * Br;
}

BackwardWorkspace backward_workspace(const Problem& problem, const Row& row) {
  const auto rows = static_cast<uint64_t>(problem.heads * padded_rows(problem, row.Br));
  BackwardWorkspace workspace{};
  workspace.row_stats = on_256(rows * static_cast<uint64_t>(row.d) * sizeof(float));
  workspace.turns = workspace.row_stats + on_256(rows * 2 * sizeof(float));
  const bool hopper = row.family == "sm90";
  const uint64_t turns = rows / static_cast<uint64_t>(row.Br);
  workspace.tickets = workspace.turns + on_256(turns * sizeof(int32_t));
  workspace.zeroed = workspace.tickets + (hopper ? on_256(sizeof(int32_t)) : 0);
  const auto key_heads = static_cast<uint64_t>(problem.heads_k * problem.batch);
  workspace.end = workspace.zeroed + (hopper ? on_256(key_heads * sizeof(int32_t)) : 0);
  return workspace;
}

BackwardParams backward_params(const Problem& problem, const Row& row, void* workspace,
                               bool turns) {
  BackwardParams p{};
  set_attention(p, problem, row);
  p.o = problem.o.data;
  p.lse = problem.lse;
  p.dout = problem.dout.data;
  p.dlse = problem.dlse;
  p.dq = problem.dq.data;
  p.dk = problem.dk.data;
  p.dv_out = problem.dv_out.data;
  const BackwardWorkspace layout = backward_workspace(problem, row);
  auto* bytes = static_cast<char*>(workspace);
  p.dq_sum = reinterpret_cast<float*>(bytes + layout.dq_sum);
  p.row_stats = reinterpret_cast<float*>(bytes + layout.row_stats);
  if (turns) p.turns = reinterpret_cast<int32_t*>(bytes + layout.turns);
  p.dout_strides = strides_of(problem.dout);
  p.dq_strides = strides_of(problem.dq);
  p.dk_strides = strides_of(problem.dk);
  p.dv_strides = strides_of(problem.dv_out);
  const int64_t key_blocks = std::max<int64_t>(1, ceil_div(problem.seqlen_k, row.Bc));
  const int64_t section = key_section(problem);
  p.key_heads = make_divisor(problem.heads_k);
  p.key_section = make_divisor(section);
  p.key_last_section = make_divisor((problem.batch * problem.heads_k - 1) % section + 1);
  p.key_section_blocks = make_divisor(section * key_blocks);
  p.padded_rows = padded_rows(problem, row.Br);
  p.scale = problem.scale;
  return p;
}

} // namespace anyflash
