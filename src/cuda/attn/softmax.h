// The online softmax. FlashAttention-2, Algorithm 1: the updates of m, l and O.
#pragma once

#include "cuda/ptx/math.h"
#include "cuda/tile/fragment.h"

namespace anyflash {

/// The state of the rows that this thread holds, for scores that are `factor` away from log2 units.
/// m: reference exponent in log2 units, at most `headroom` below the true maximum; `no_key` before
/// the first key. l: sum of P over this thread's columns only; added up over the row's four threads
/// at the end.
template <int rows>
struct SoftmaxState {
  /// m follows the true maximum only when it has moved by more than this, so that O is rescaled
  /// rarely; P <= 2^headroom cancels in O / l and in L = m + log2(l).
  static constexpr float headroom = 8;
  /// Below every score but finite, so that exp2(-inf - m) is 0 and nothing is ever inf - inf.
  static constexpr float no_key = -1e38f;

  float m[rows];
  float l[rows];

  DEVICE SoftmaxState() {
    UNROLL
    for (int r = 0; r < rows; ++r) m[r] = no_key, l[r] = 0;
  }

  /// Moves m to the maximum of the scores and O, l to the new m. All four threads of a row call it;
  /// masked scores are -inf. Rows that have seen no key keep m = no_key.
  template <class Scores, class Output>
  DEVICE void move_to_maximum(const Scores& s, float factor, Output& o) {
    float maximum[rows];
    bool moved = false;
    UNROLL
    for (int r = 0; r < rows; ++r) {
      float even = s(r, 0), odd = s(r, 1); // two chains, for latency
      UNROLL
      for (int c = 2; c < Scores::columns; c += 2)
        even = fmaxf(even, s(r, c)), odd = fmaxf(odd, s(r, c + 1));
      maximum[r] = row_max(fmaxf(even, odd)) * factor;
      moved |= maximum[r] > m[r] + headroom;
    }
    if (!__any_sync(0xffffffff, moved)) return;
    UNROLL
    for (int r = 0; r < rows; ++r) {
      const float new_m = fmaxf(m[r], maximum[r]);
      const float alpha = exp2_approx(m[r] - new_m);
      m[r] = new_m;
      l[r] *= alpha;
      UNROLL
      for (int c = 0; c < Output::columns; ++c) o(r, c) *= alpha;
    }
  }

  /// S becomes P = exp2(factor S - m) in columns [first, last); adds them to l.
  template <class Scores>
  DEVICE void exponentiate(Scores& s, float factor, int first, int last) {
    UNROLL
    for (int r = 0; r < rows; ++r) {
      UNROLL
      for (int c = first; c < last; ++c) {
        s(r, c) = exp2_approx(fmaf(s(r, c), factor, -m[r]));
        l[r] += s(r, c);
      }
    }
  }
};

} // namespace anyflash
