// FlashAttention-2 on a CPU, once for every instruction set: the forward (Algorithm 1). Mind the
// note in simd.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/block.h"
#include "cpu/convert.h"
#include "cpu/panels.h"
#include "cpu/simd.h"
#include "cpu/tiles.h"

namespace anyflash::cpu {
namespace {

/// The algorithm for tensors of T with vectors of Simd. Tiles in scratch are fp32; matrices that a
/// register tile reads by its columns are stored in panels of that many columns.
template <class Simd, class T>
struct Flash {
  using Vector = typename Simd::Vector;
  using Tile = Tiles<Simd>;
  using Panel = Panels<Simd, T>;
  static constexpr int width = Simd::width;
  static constexpr int tile_rows = Simd::tile_rows;
  static constexpr int tile_vectors = Simd::tile_vectors;
  static constexpr int panel = Tile::panel;
  static constexpr int padded_rows = round_up(strip_rows, width);
  static constexpr bool fine = sizeof(T) > 2; // precision of the exponential
  static_assert(strip_rows % tile_rows == 0 && block_keys % panel == 0);

  /// Where things lie in scratch, in floats.
  struct Layout {
    int64_t q, k, v, s, o, m, l, alpha, end;
    Layout(int strips, int d, int dv) {
      const int64_t rows = int64_t{strips} * strip_rows;
      const int dv_padded = round_up(dv, panel);
      q = 0; // [strips][strip_rows / tile_rows][d][tile_rows]
      k = q + round_up(static_cast<int>(rows) * d, 16); // [block_keys / panel][d][panel]
      v = k + block_keys * d;                           // [dv / panel][block_keys][panel]
      s = v + block_keys * dv_padded;                   // [strip_rows][block_keys]
      o = s + strip_rows * block_keys;                  // [strips][dv / panel][strip_rows][panel]
      m = o + rows * dv_padded;                         // [rows], log2 units
      l = m + rows;             // [rows][width]: a row's sum, spread over lanes
      alpha = l + rows * width; // [padded_rows]
      end = alpha + padded_rows;
    }
  };

  const Block& block;
  const Layout layout;
  float* const scratch;
  const int dv_panels;
  // scale = sign * magnitude; the sign goes into Q, so that larger scores are larger probabilities.
  const float sign, magnitude;
  const bool transformed; // softcap or ALiBi: scores are brought to log2 units one by one
  const float unit;       // of the scores that the softmax sees, in log2 units; positive

  Flash(const Block& the_block, float* the_scratch)
      : block(the_block), layout(block.strip_count, block.d, block.dv), scratch(the_scratch),
        dv_panels(round_up(block.dv, panel) / panel), sign(block.scale > 0   ? 1.0f
                                                           : block.scale < 0 ? -1.0f
                                                                             : 0.0f),
        magnitude(block.scale == 0 ? 1.0f : block.scale * sign),
        transformed(block.softcap > 0 || block.alibi),
        unit(transformed ? 1.0f : magnitude * log2_e) {}

  // ---- Loading -------------------------------------------------------------------------------

  /// Q of a strip, transposed in groups of tile_rows rows.
  ANYFLASH_NOINLINE void pack_queries(const Strip& strip, float* packed) const {
    const T* q = static_cast<const T*>(strip.q);
    for (int r = 0; r < strip.rows; ++r) {
      float* to = packed + int64_t{r / tile_rows} * tile_rows * block.d + r % tile_rows;
      const T* row = q + r * block.q_row;
      for (int e = 0; e < block.d; ++e) to[e * tile_rows] = to_float(row[e]) * sign;
    }
  }

  /// Keys and values [first, first + count): K transposed.
  void pack(int first, int count) const {
    const T* k = static_cast<const T*>(block.k) + first * block.k_row;
    const T* v = static_cast<const T*>(block.v) + first * block.v_row;
    Panel::pack_columns(k, block.k_row, count, block.d, scratch + layout.k);
    Panel::pack_rows(v, block.v_row, count, block.dv, block_keys, scratch + layout.v);
  }

  /// Brings a share of the keys and values [first, first + count) towards the caches.
  void prefetch(int first, int count) const {
    const T* k = static_cast<const T*>(block.k) + first * block.k_row;
    const T* v = static_cast<const T*>(block.v) + first * block.v_row;
    constexpr int line = 64 / sizeof(T);
    for (int j = 0; j < count; ++j, k += block.k_row, v += block.v_row) {
      for (int e = 0; e < block.d; e += line) __builtin_prefetch(k + e, 0, 2);
      for (int e = 0; e < block.dv; e += line) __builtin_prefetch(v + e, 0, 2);
    }
  }

  // ---- Products ------------------------------------------------------------------------------

  /// S [rows, panel] = Q K^T.
  template <int rows>
  static ANYFLASH_NOINLINE void score_tile(const float* q, const float* k, int d, float* s) {
    Vector c[rows][tile_vectors];
    Tile::clear(c);
    Tile::template multiply_add<rows, 1, tile_rows>(c, q, k, d);
    Tile::template store<rows, block_keys>(s, c);
  }

  /// O [rows, panel] = alpha O + P V.
  template <int rows>
  static ANYFLASH_NOINLINE void output_tile(const float* p, const float* v, int keys,
                                            const float* alpha, float* o) {
    Vector c[rows][tile_vectors];
    Tile::template load<rows, panel>(c, o);
    ANYFLASH_UNROLL for (int r = 0; r < rows; ++r) {
      const Vector factor = Simd::set(alpha[r]);
      ANYFLASH_UNROLL for (int n = 0; n < tile_vectors; ++n) c[r][n] =
          Simd::multiply(factor, c[r][n]);
    }
    Tile::template multiply_add<rows, block_keys, 1>(c, p, v, keys);
    Tile::template store<rows, panel>(o, c);
  }

  /// S of a strip against keys [begin, end) of the block, whole panels.
  void multiply_queries(const Strip& strip, const float* q, int begin, int end) const {
    float* s = scratch + layout.s;
    for (int j = begin; j < end; j += panel) {
      const float* k = scratch + layout.k + int64_t{j} * block.d;
      Tile::for_each_tile(0, strip.rows, [&]<int rows>(int r) {
        score_tile<rows>(q + int64_t{r} * block.d, k, block.d, s + r * block_keys + j);
      });
    }
  }

  /// O of a strip = alpha O + P V over keys [begin, end) of the block.
  void multiply_values(const Strip& strip, float* o, int begin, int end) const {
    const float* p = scratch + layout.s;
    const float* alpha = scratch + layout.alpha;
    for (int n = 0; n < dv_panels; ++n) {
      const float* v = scratch + layout.v + (int64_t{n} * block_keys + begin) * panel;
      float* to = o + int64_t{n} * strip_rows * panel;
      Tile::for_each_tile(0, strip.rows, [&]<int rows>(int r) {
        output_tile<rows>(p + r * block_keys + begin, v, end - begin, alpha + r, to + r * panel);
      });
    }
  }

  // ---- Scores --------------------------------------------------------------------------------

  /// Scale, softcap and ALiBi on one row of scores, which leaves them in log2 units. `distance` is
  /// the key at column 0 minus the key that the row is aligned with.
  void transform(float* s, int begin, int end, float slope, float distance) const {
    const bool capped = block.softcap > 0;
    const Vector scale = Simd::set(capped ? magnitude / block.softcap : magnitude * log2_e);
    const Vector cap = Simd::set(block.softcap * log2_e);
    const Vector steep = Simd::set(-slope * log2_e);
    for (int c = begin; c < end; c += width) {
      Vector x = Simd::multiply(scale, Simd::load(s + c));
      if (capped) x = Simd::multiply(cap, tanh<Simd>(x));
      if (block.alibi) {
        const Vector away =
            Simd::abs(Simd::add(Simd::set(distance + static_cast<float>(c)), Simd::iota()));
        x = Simd::multiply_add(steep, away, x);
      }
      Simd::store(s + c, x);
    }
  }

  /// Minus infinity outside columns [visible_begin, visible_end).
  static void mask(float* s, int begin, int end, int visible_begin, int visible_end) {
    const Vector low = Simd::set(static_cast<float>(visible_begin));
    const Vector high = Simd::set(static_cast<float>(visible_end));
    for (int c = begin; c < end; c += width) {
      if (c >= visible_begin && c + width <= visible_end) continue;
      const Vector column = Simd::add(Simd::set(static_cast<float>(c)), Simd::iota());
      Simd::store(s + c, Simd::keep_between(Simd::load(s + c), low, column, high));
    }
  }

  // ---- Softmax -------------------------------------------------------------------------------

  static float row_max(const float* s, int begin, int end) {
    Vector a = Simd::load(s + begin), b = a;
    int c = begin + width;
    for (; c + width < end; c += 2 * width) {
      a = Simd::max(a, Simd::load(s + c));
      b = Simd::max(b, Simd::load(s + c + width));
    }
    if (c < end) a = Simd::max(a, Simd::load(s + c));
    return Simd::highest(Simd::max(a, b));
  }

  /// s = 2^(unit s + shift) for one vector; adds it to the sum.
  static ANYFLASH_INLINE void exponential(float* s, Vector unit, Vector shift, Vector& sum) {
    const Vector p = exp2<Simd, fine>(Simd::multiply_add(unit, Simd::load(s), shift));
    Simd::store(s, p);
    sum = Simd::add(sum, p);
  }

  /// s = 2^(unit s - m) in place; returns the sum, spread over lanes.
  static Vector exponentials(float* s, int begin, int end, float score_unit, float m) {
    const Vector unit = Simd::set(score_unit), shift = Simd::set(-m);
    Vector even = Simd::set(0.0f), odd = even;
    int c = begin;
    for (; c + width < end; c += 2 * width) {
      exponential(s + c, unit, shift, even);
      exponential(s + c + width, unit, shift, odd);
    }
    if (c < end) exponential(s + c, unit, shift, even);
    return Simd::add(even, odd);
  }

  /// Scores of row r of a strip as the formula has them, masked: columns [begin, end) of the key
  /// block at `first_key`.
  void finish_scores(const Strip& strip, int r, int first_key, int begin, int end) const {
    float* s = scratch + layout.s + r * block_keys;
    if (transformed)
      transform(s, begin, end, strip.slope, static_cast<float>(first_key - strip.diagonal - r));
    if (first_key + begin >= strip.full_begin && first_key + end <= strip.full_end) return;
    const int64_t low = strip.visible_begin + r - first_key;
    const int64_t high = min<int64_t>(block.seqlen_k, strip.visible_end + r) - first_key;
    mask(s, begin, end, static_cast<int>(max<int64_t>(begin, min<int64_t>(low, end))),
         static_cast<int>(max<int64_t>(begin, min<int64_t>(high, end))));
  }

  /// S becomes P for one strip and the row state is updated: m, l, and alpha, by which what was
  /// summed so far shrinks. A row that has seen no key keeps m = -inf and l = 0. Three passes over
  /// the rows, so that the processor overlaps their dependent chains.
  ANYFLASH_NOINLINE void softmax(const Strip& strip, int first_row, int first_key, int begin,
                                 int end) const {
    float* s = scratch + layout.s;
    float* m = scratch + layout.m + first_row;
    float* l = scratch + layout.l + int64_t{first_row} * width;
    float* alpha = scratch + layout.alpha;
    float finite[padded_rows] = {}; // m, or 0 while that is -inf
    for (int r = 0; r < strip.rows; ++r) {
      finish_scores(strip, r, first_key, begin, end);
      const float highest = max(m[r], unit * row_max(s + r * block_keys, begin, end));
      finite[r] = highest == -infinity ? 0.0f : highest;
      alpha[r] = m[r] - finite[r];
      m[r] = highest;
    }
    for (int r = 0; r < strip.rows; r += width)
      Simd::store(alpha + r, exp2<Simd, true>(Simd::load(alpha + r)));
    for (int r = 0; r < strip.rows; ++r) {
      const Vector sum = exponentials(s + r * block_keys, begin, end, unit, finite[r]);
      const Vector before = Simd::multiply(Simd::set(alpha[r]), Simd::load(l + r * width));
      Simd::store(l + r * width, Simd::add(before, sum));
    }
  }

  // ---- The loop ------------------------------------------------------------------------------

  /// One strip and one key block [first, first + count):
  /// S = Q K_j^T, score, mask, P = exp2(S - m), O = alpha O + P V_j.
  void step(int index, int first, int count) const {
    const Strip& strip = block.strips[index];
    // Only panels with a key that some row sees, inside what was packed.
    const int begin = max(strip.key_begin - first, 0) / panel * panel;
    const int visible = min(strip.key_end - first, count);
    if (begin >= visible) return;
    const int end = round_up(visible, panel);
    const int64_t rows = int64_t{index} * strip_rows;
    multiply_queries(strip, scratch + layout.q + rows * block.d, begin, end);
    softmax(strip, static_cast<int>(rows), first, begin, end);
    multiply_values(strip, scratch + layout.o + rows * dv_panels * panel, begin, visible);
  }

  void run() const {
    const int64_t rows = int64_t{block.strip_count} * strip_rows;
    for (int i = 0; i < block.strip_count; ++i)
      pack_queries(block.strips[i], scratch + layout.q + int64_t{i} * strip_rows * block.d);
    std::memset(scratch + layout.o, 0, sizeof(float) * rows * dv_panels * panel);
    std::memset(scratch + layout.l, 0, sizeof(float) * rows * width);
    for (int64_t r = 0; r < rows; ++r) scratch[layout.m + r] = -infinity;

    const int last = block.key_begin < block.key_end ? (block.key_end - 1) / block_keys : -1;
    for (int j = last; j >= block.key_begin / block_keys && j >= 0; --j) {
      const int first = max(j * block_keys, block.key_begin / panel * panel);
      const int count = min((j + 1) * block_keys, block.key_end) - first;
      pack(first, count);
      const int next = max(first - block_keys, block.key_begin), ahead = first - next;
      for (int i = 0; i < block.strip_count; ++i) {
        const int from = ahead * i / block.strip_count, to = ahead * (i + 1) / block.strip_count;
        prefetch(next + from, to - from); // the next block, while this one is multiplied
        step(i, first, count);
      }
    }
    for (int i = 0; i < block.strip_count; ++i) finish(i);
  }

  // ---- Storing -------------------------------------------------------------------------------

  /// O and L of a strip, or its partial results when the keys are split.
  ANYFLASH_NOINLINE void finish(int index) const {
    const Strip& strip = block.strips[index];
    for (int r = 0; r < strip.rows; ++r) {
      const int64_t row = int64_t{index} * strip_rows + r;
      const float* o =
          scratch + layout.o + int64_t{index} * strip_rows * dv_panels * panel + int64_t{r} * panel;
      const float m = scratch[layout.m + row];
      const float l = Simd::total(Simd::load(scratch + layout.l + row * width));
      if (strip.partial) {
        float* to = strip.partial + r * (int64_t{block.dv} + 2);
        Panel::store_row(to, o, block.dv, strip_rows, 1.0f);
        to[block.dv] = m;
        to[block.dv + 1] = l;
      } else {
        Panel::store_row(static_cast<T*>(strip.o) + r * block.o_row, o, block.dv, strip_rows,
                         l == 0 ? 0.0f : 1 / l);
        if (strip.lse) strip.lse[r] = l == 0 ? -infinity : (m + __builtin_log2f(l)) * ln_2;
      }
    }
  }
};

template <class Simd, class T>
void forward(const Block& block, float* scratch) {
  Flash<Simd, T>(block, scratch).run();
}

template <class Simd>
int64_t forward_scratch(int strips, int d, int dv) {
  return typename Flash<Simd, float>::Layout(strips, d, dv).end;
}

} // namespace
} // namespace anyflash::cpu
