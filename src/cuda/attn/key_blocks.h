// Which keys a block of queries sees. Shared by the kernels, the planner and the CPU backend:
// constexpr arithmetic, tested on the host against brute force. No includes: NVRTC compiles it too.
#pragma once

namespace anyflash {

/// The keys that queries [first_query, first_query + queries) see, as a range of blocks of Bc keys,
/// and which of those blocks lie on an edge (some query of the block does not see some key of it).
struct KeyBlocks {
  int begin;      // first block that any query sees
  int end;        // one past the last; begin >= end: no query sees a key
  int full_begin; // blocks in [full_begin, full_end) are seen whole by every query: no mask
  int full_end;

  constexpr bool empty() const { return begin >= end; }
  constexpr bool on_edge(int j) const { return j < full_begin || j >= full_end; }
};

namespace detail {
constexpr int min(int a, int b) { return a < b ? a : b; }
constexpr int max(int a, int b) { return a > b ? a : b; }
constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
} // namespace detail

/// Query i sees keys j in [i + seqlen_k - seqlen_q - left, i + seqlen_k - seqlen_q + right], inside
/// [0, seqlen_k). left, right >= 0, at most 2^30 (unbounded); lengths below 2^30.
constexpr KeyBlocks key_blocks(int first_query, int queries, int Bc, int seqlen_q, int seqlen_k,
                               int left, int right) {
  const int last_query = detail::min(first_query + queries, seqlen_q) - 1;
  const int diagonal = seqlen_k - seqlen_q; // query i is aligned with key i + diagonal
  // First and one-past-last key that some query sees (union), and that every query sees
  // (intersection).
  const int some_begin = detail::max(0, first_query + diagonal - left);
  const int some_end = detail::min(seqlen_k, last_query + diagonal + right + 1);
  const int every_begin = detail::max(0, last_query + diagonal - left);
  const int every_end = detail::min(seqlen_k, first_query + diagonal + right + 1);
  if (last_query < first_query || some_begin >= some_end) return {0, 0, 0, 0};
  KeyBlocks blocks{};
  blocks.begin = some_begin / Bc;
  blocks.end = detail::ceil_div(some_end, Bc);
  blocks.full_begin = detail::min(detail::ceil_div(every_begin, Bc), blocks.end);
  blocks.full_end = detail::max(every_end > 0 ? every_end / Bc : 0, blocks.full_begin);
  return blocks;
}

} // namespace anyflash
