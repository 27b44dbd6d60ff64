// Scores with keys as rows and queries as columns: what they go through on the way to P and dS.
#pragma once

#include "cuda/attn/score.h"
#include "cuda/tile/warpgroup_fragment.h"

namespace anyflash::sm90 {

/// Scores of a key and a query that do not see each other become -inf. key: that of this thread's
/// first row; first_query: of the block. Only for blocks on an edge.
template <class Scores>
DEVICE void mask_transposed(Scores& s, const AttentionParams& p, int key, int seqlen_k,
                            int diagonal, int first_query) {
  const int origin = first_query + Scores::first_column();
  UNROLL
  for (int r = 0; r < Scores::rows; ++r) {
    // Query i sees keys in [i + diagonal - left, i + diagonal + right]. Relative to this thread's
    // first column, so that the comparisons are with constants.
    const int aligned_column = key + Scores::row_offset(r) - diagonal - origin;
    const bool exists = key + Scores::row_offset(r) < seqlen_k;
    const int begin = exists ? aligned_column - p.window_right : Scores::width;
    const int end = aligned_column + p.window_left;
    UNROLL
    for (int c = 0; c < Scores::columns; ++c) {
      const int column = Scores::column_offset(c);
      if (column < begin || column > end) s(r, c) = -infinity();
    }
  }
}

/// S -= slope |i + diagonal - j|, in units of S; distance: that of this thread's first element.
template <class Scores>
DEVICE void apply_alibi_transposed(Scores& s, float slope, float distance) {
  if (slope == 0) return;
  UNROLL
  for (int r = 0; r < Scores::rows; ++r) {
    UNROLL
    for (int c = 0; c < Scores::columns; ++c)
      s(r, c) -= slope * fabsf(distance + (Scores::column_offset(c) - Scores::row_offset(r)));
  }
}

/// S becomes P = exp2(factor S - L). lse: of this thread's first column, in shared memory, log2
/// units, +inf where there is nothing to differentiate. All of it is computed here: left alone, the
/// compiler moves exponentials behind the next wait, whose time they are there to fill.
template <class Scores>
DEVICE void probabilities(Scores& s, const float* lse, float factor) {
  UNROLL
  for (int c = 0; c < Scores::columns; c += 2) {
    const float2 l = *reinterpret_cast<const float2*>(lse + Scores::column_offset(c));
    UNROLL
    for (int r = 0; r < Scores::rows; ++r) {
      s(r, c) = exp2_approx(fmaf(s(r, c), factor, -l.x));
      s(r, c + 1) = exp2_approx(fmaf(s(r, c + 1), factor, -l.y));
    }
  }
}

/// 1 - tanh^2 of the scores, in 16 bit: tanh itself is no more exact. Empty where no softcap can
/// be.
template <class Scores, bool general>
struct SoftcapSlope {
  uint32_t pairs[general ? Scores::size / 2 : 1];

  DEVICE void keep(const Scores& t, const AttentionParams& p) {
    if constexpr (general) {
      if (p.softcap_in == 0) return;
      UNROLL
      for (int i = 0; i < Scores::size; i += 2)
        pairs[i / 2] = pack<fp16>(1 - t.x[i] * t.x[i], 1 - t.x[i + 1] * t.x[i + 1]);
    }
  }

  /// P of elements i and i + 1 becomes the factor of dP - delta in the gradient of Q K^T.
  DEVICE void apply(Scores& probabilities, int i, const AttentionParams& p) const {
    if constexpr (general) {
      if (p.softcap_in == 0) return;
      const float2 slope = unpack<fp16>(pairs[i / 2]);
      probabilities.x[i] *= slope.x;
      probabilities.x[i + 1] *= slope.y;
    }
  }
};

/// dS = P (dP - delta) as an operand. delta: as lse.
template <class T, class Scores, class Slope>
DEVICE void round_gradients(WarpgroupOperand<T, Scores::width>& ds, Scores& p, const Scores& dp,
                            const Slope& slope, const float* delta, const AttentionParams& params) {
  UNROLL
  for (int c = 0; c < Scores::columns; c += 2) {
    const float2 d = *reinterpret_cast<const float2*>(delta + Scores::column_offset(c));
    UNROLL
    for (int r = 0; r < Scores::rows; ++r) {
      const int i = 2 * (c + r); // of this pair in the accumulators
      slope.apply(p, i, params);
      ds.a[i / 2] = pack<T>(p.x[i] * (dp.x[i] - d.x), p.x[i + 1] * (dp.x[i + 1] - d.y));
    }
  }
}

/// All of these are computed here, and not behind the next wait, whose time they are there to fill.
/// p: probabilities, whose signs are +.
template <class Scores>
DEVICE void compute_here(const Scores& p) {
  uint32_t signs = 0;
  UNROLL
  for (int i = 0; i < Scores::size; ++i) signs |= __float_as_uint(p.x[i]);
  needed_if_negative(signs);
}

/// The same from P as it was rounded for dV, where there are no registers to keep more of it.
template <class T, class Scores>
DEVICE void round_gradients(WarpgroupOperand<T, Scores::width>& ds,
                            const WarpgroupOperand<T, Scores::width>& p, const Scores& dp,
                            const float* delta) {
  UNROLL
  for (int c = 0; c < Scores::columns; c += 2) {
    const float2 d = *reinterpret_cast<const float2*>(delta + Scores::column_offset(c));
    UNROLL
    for (int r = 0; r < Scores::rows; ++r) {
      const int i = c + r;
      const float2 pair = unpack<T>(p.a[i]);
      ds.a[i] = pack<T>(pair.x * (dp.x[2 * i] - d.x), pair.y * (dp.x[2 * i + 1] - d.y));
    }
  }
}

} // namespace anyflash::sm90
