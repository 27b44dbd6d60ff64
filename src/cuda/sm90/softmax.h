// The online softmax of a warpgroup's rows. FlashAttention-2, Algorithm 1: the updates of m and l.
#pragma once

#include "cuda/ptx/math.h"
#include "cuda/tile/fragment.h"

namespace anyflash::sm90 {

/// The state of the two rows that this thread holds, for scores that are `factor` away from log2
/// units. m: reference exponent in log2 units, so near to the true maximum that no sum of P is out
/// of range; l: sum of P over this thread's columns, added up over the row's four threads at the
/// end.
struct OnlineSoftmax {
  /// m follows the true maximum only when it has moved by more than this, so that O is rescaled
  /// rarely; a P above 1 cancels in O / l and in L = m + log2(l).
  static constexpr float headroom = 8;
  /// Below every score but finite, so that exp2(-inf - m) is 0 and nothing is ever inf - inf.
  static constexpr float no_key = -1e38f;
  static constexpr int chains = 4; // independent maxima and sums a row, for latency

  float m[2], l[2];

  DEVICE void clear() { m[0] = m[1] = no_key, l[0] = l[1] = 0; }

  /// S becomes P = exp2(factor S - m), after m has moved if it must. True if O must be multiplied
  /// by alpha. Masked scores are -inf. first: no key was seen before.
  template <bool first, class Scores>
  DEVICE bool exponentiate(Scores& s, float factor, float (&alpha)[2]) {
    float largest[2]; // of this thread's columns
    column_maxima(s, largest);
    const bool moved = first || __any_sync(0xffffffff, largest[0] * factor > m[0] + headroom ||
                                                           largest[1] * factor > m[1] + headroom);
    if (moved) {
      UNROLL
      for (int r = 0; r < 2; ++r) {
        const float new_m = fmaxf(m[r], row_max(largest[r]) * factor);
        alpha[r] = first ? 1 : exp2_approx(m[r] - new_m);
        l[r] *= alpha[r];
        m[r] = new_m;
      }
    }
    float growth[2];
    to_probabilities(s, factor, growth);
    add(growth);
    return moved;
  }

  /// The same with m as it was, whatever the maximum: that is cheaper, and nearly always right.
  /// growth: what l is to grow by. False if a P of the warp may be too large for T; then S is lost.
  template <class T, class Scores>
  DEVICE bool exponentiate_by_old_m(Scores& s, float factor, float (&growth)[2]) const {
    constexpr float largest = same<T, fp16> ? 0x1p15f : 0x1p32f;
    to_probabilities(s, factor, growth);
    const bool fits = fmaxf(growth[0], growth[1]) <= largest;
    return !__any_sync(0xffffffff, !fits);
  }

  DEVICE void add(const float (&growth)[2]) { l[0] += growth[0], l[1] += growth[1]; }

private:
  /// P, and the sums over this thread's columns.
  template <class Scores>
  DEVICE void to_probabilities(Scores& s, float factor, float (&growth)[2]) const {
    float sums[2][chains];
    UNROLL
    for (int c = 0; c < Scores::columns; ++c) {
      UNROLL
      for (int r = 0; r < 2; ++r) {
        s(r, c) = exp2_approx(fmaf(s(r, c), factor, -m[r]));
        sums[r][c % chains] = c < chains ? s(r, c) : sums[r][c % chains] + s(r, c);
      }
    }
    UNROLL
    for (int r = 0; r < 2; ++r) growth[r] = (sums[r][0] + sums[r][1]) + (sums[r][2] + sums[r][3]);
  }

  template <class Scores>
  DEVICE static void column_maxima(const Scores& s, float (&largest)[2]) {
    float partial[2][chains];
    UNROLL
    for (int c = 0; c < Scores::columns; ++c) {
      UNROLL
      for (int r = 0; r < 2; ++r)
        partial[r][c % chains] = c < chains ? s(r, c) : fmaxf(partial[r][c % chains], s(r, c));
    }
    UNROLL
    for (int r = 0; r < 2; ++r)
      largest[r] = fmaxf(fmaxf(partial[r][0], partial[r][1]), fmaxf(partial[r][2], partial[r][3]));
  }
};

} // namespace anyflash::sm90
