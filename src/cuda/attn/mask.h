// Scores that a query does not see become -inf.
#pragma once

#include "cuda/ptx/device.h"

namespace anyflash {

/// s: scores of queries [first_query, ...) and keys [first_key, ...). `left`: the window has a left
/// end. Only for blocks on an edge.
template <bool left, class Scores, class Block>
DEVICE void mask(Scores& s, const AttentionParams& p, const Block& block, int first_query,
                 int first_key) {
  // The limits of each row do not depend on the key block; kept in registers they would cost the
  // loop more than their computation costs the few blocks on an edge.
  const int query = recomputed(first_query);
  UNROLL
  for (int r = 0; r < Scores::rows; ++r) {
    const int aligned_key = query + Scores::row(r) + block.diagonal();
    // Relative to this thread's first column, so that the comparisons are with constants.
    const int origin = first_key + Scores::first_column();
    const int end = min(block.seqlen_k, aligned_key + p.window_right + 1) - origin;
    const int begin = aligned_key - p.window_left - origin;
    UNROLL
    for (int c = 0; c < Scores::columns; ++c) {
      const int column = Scores::column_offset(c);
      if (column >= end || (left && column < begin)) s(r, c) = -infinity();
    }
  }
}

} // namespace anyflash
