// What happens to scores before the mask and the softmax.
#pragma once

#include "cuda/ptx/math.h"

namespace anyflash {

/// ALiBi slope of a head in units of S; 0 without ALiBi.
DEVICE float alibi_slope(const AttentionParams& p, int sequence, int head) {
  return p.alibi_slopes ? p.alibi_slopes[sequence * p.alibi_batch + head] * p.alibi_factor : 0;
}

/// What Q K^T goes through first, except for the positive factor that the softmax applies: softcap,
/// or the sign of a negative scale. Branches are uniform over the grid.
template <class Scores>
DEVICE void apply_softcap(Scores& s, const AttentionParams& p) {
  if (p.softcap_in != 0) {
    UNROLL
    for (int r = 0; r < Scores::rows; ++r) {
      UNROLL
      for (int c = 0; c < Scores::columns; ++c) s(r, c) = tanh_approx(s(r, c) * p.softcap_in);
    }
  } else if (p.negative) {
    UNROLL
    for (int r = 0; r < Scores::rows; ++r) {
      UNROLL
      for (int c = 0; c < Scores::columns; ++c) s(r, c) = -s(r, c);
    }
  }
}

/// S -= slope |i + seqlen_k - seqlen_q - j|, in units of S.
template <class Scores, class Block>
DEVICE void apply_alibi(Scores& s, const Block& block, float slope, int first_query,
                        int first_key) {
  if (slope == 0) return;
  const int query = recomputed(first_query);
  UNROLL
  for (int r = 0; r < Scores::rows; ++r) {
    const float distance =
        query + Scores::row(r) + block.diagonal() - first_key - Scores::first_column();
    UNROLL
    for (int c = 0; c < Scores::columns; ++c)
      s(r, c) -= slope * fabsf(distance - Scores::column_offset(c));
  }
}

} // namespace anyflash
