// Scores that a query does not see become -inf: attn/mask.h with a bit for each column instead of
// two comparisons. A predicate register takes seven of them at once; sm80's rows would spill.
#pragma once

#include "cuda/ptx/device.h"

namespace anyflash::sm90 {

/// Of the columns that a thread has of a row, two neighbours of every eight, those before column
/// `end` of its own first one: a bit each.
template <class Scores>
DEVICE uint32_t columns_before(int end) {
  static_assert(Scores::columns <= 32 && Scores::column_offset(3) == 9);
  const int limit = max(0, min(end, Scores::width));
  const int count = limit / 8 * 2 + min(limit % 8, 2);
  return count < 32 ? (1u << count) - 1 : ~0u;
}

/// s: scores of queries [first_query, ...) and keys [first_key, ...). Only for blocks on an edge.
template <class Scores, class Block>
DEVICE void mask(Scores& s, const AttentionParams& p, const Block& block, int first_query,
                 int first_key) {
  // The limits of each row do not depend on the key block; kept in registers they would cost the
  // loop more than their computation costs the few blocks on an edge.
  const int query = recomputed(first_query);
  UNROLL
  for (int r = 0; r < Scores::rows; ++r) {
    const int aligned_key = query + Scores::row(r) + block.diagonal();
    const int origin = first_key + Scores::first_column();
    const int end = min(block.seqlen_k, aligned_key + p.window_right + 1) - origin;
    const int begin = aligned_key - p.window_left - origin;
    const uint32_t seen = columns_before<Scores>(end) & ~columns_before<Scores>(begin);
    UNROLL
    for (int c = 0; c < Scores::columns; ++c)
      if (!(seen >> c & 1)) s(r, c) = -infinity();
  }
}

} // namespace anyflash::sm90
