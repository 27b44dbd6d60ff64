// FlashAttention-2 on a CPU, once for every instruction set: the backward (Algorithm 2). Mind the
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

/// A part of something that is counted from 0: rows of a strip, or keys of a block.
struct Range {
  int begin, end;
  constexpr bool empty() const { return begin >= end; }
};

constexpr Range clipped(int64_t begin, int64_t end, int low, int high) {
  const int from = static_cast<int>(max<int64_t>(low, min<int64_t>(begin, high)));
  return {from, static_cast<int>(max<int64_t>(from, min<int64_t>(end, high)))};
}

/// The algorithm for tensors of T with vectors of Simd. K and V of a key block and its dK and dV
/// stay in the caches while the strips go by. Q and dO of all strips are packed once, and their dQ
/// is summed, in scratch, all fp32: packing anew for each key block is dear where the tensors' rows
/// are 4 KB apart.
template <class Simd, class T>
struct FlashBackward {
  using Vector = typename Simd::Vector;
  using Tile = Tiles<Simd>;
  using Panel = Panels<Simd, T>;
  static constexpr int width = Simd::width;
  static constexpr int tile_vectors = Simd::tile_vectors;
  static constexpr int panel = Tile::panel;
  static constexpr int Br = gradient_rows, Bc = gradient_keys;
  static constexpr bool fine = sizeof(T) > 2; // precision of the exponential
  static_assert(Bc % panel == 0);

  /// Where things lie in scratch, in floats. d and dv are whole panels here.
  struct Layout {
    int64_t k_columns, v_columns, k_rows, p, ds, dk, dv, lse, delta, q, dout, dq, end;
    Layout(int strips, int d, int head_dim_v) {
      const int64_t rows = int64_t{strips} * Br;
      d = round_up(d, panel);
      head_dim_v = round_up(head_dim_v, panel);
      k_columns = 0;                        // [Bc / panel][d][panel]
      v_columns = k_columns + Bc * d;       // [Bc / panel][dv][panel]
      k_rows = v_columns + Bc * head_dim_v; // [d / panel][Bc][panel]
      p = k_rows + Bc * d;                  // [Br][Bc]: S, then P
      ds = p + Br * Bc;                     // [Br][Bc]: dP, then dS
      dk = ds + Br * Bc;                    // [d / panel][Bc][panel]
      dv = dk + Bc * d;                     // [dv / panel][Bc][panel]
      lse = dv + Bc * head_dim_v;           // [strips][Br]: L
      delta = lse + rows;                   // [strips][Br]: rowsum(dO O) - dL
      q = delta + rows;                     // [strips][d / panel][Br][panel]
      dout = q + rows * d;                  // [strips][dv / panel][Br][panel]
      dq = dout + rows * head_dim_v;        // [strips][d / panel][Br][panel]
      end = dq + rows * d;
    }
  };

  const GradientBlock& block;
  const Layout layout;
  float* const scratch;
  const int d_panels, dv_panels;

  FlashBackward(const GradientBlock& the_block, float* the_scratch)
      : block(the_block), layout(block.strip_count, block.d, block.dv), scratch(the_scratch),
        d_panels(round_up(block.d, panel) / panel), dv_panels(round_up(block.dv, panel) / panel) {}

  static bool sees_nothing(const Queries& strip) { return strip.key_begin >= strip.key_end; }

  // ---- Who sees whom -------------------------------------------------------------------------

  /// Rows of the strip that see a key of [begin, end).
  static Range rows_seeing(const Queries& strip, int begin, int end) {
    return clipped(begin - strip.visible_end + 1, end - strip.visible_begin, 0, strip.rows);
  }

  /// Keys that a row of [begin, end) sees.
  static Range keys_seen(const Queries& strip, int begin, int end, Range of) {
    return clipped(strip.visible_begin + begin, strip.visible_end + end - 1, of.begin, of.end);
  }

  // ---- Rows ----------------------------------------------------------------------------------

  /// Where strip `index` lies in layout.q or layout.dq, and in layout.dout.
  int64_t of_strip(int index, int panels) const { return int64_t{index} * Br * panels * panel; }

  /// Q, dO and L of a strip, and delta = rowsum(dO O) - dL: dS = P (dP - delta).
  ANYFLASH_NOINLINE void read_rows(int index) const {
    const GradientStrip& strip = block.strips[index];
    Panel::pack_rows(static_cast<const T*>(strip.q), block.q_row, strip.rows, block.d, Br,
                     scratch + layout.q + of_strip(index, d_panels));
    Panel::pack_rows(static_cast<const T*>(strip.dout), block.dout_row, strip.rows, block.dv, Br,
                     scratch + layout.dout + of_strip(index, dv_panels));
    float* lse = scratch + layout.lse + int64_t{index} * Br;
    float* delta = scratch + layout.delta + int64_t{index} * Br;
    for (int r = 0; r < strip.rows; ++r) {
      lse[r] = strip.lse[r];
      delta[r] = 0;
      if (lse[r] == -infinity) continue; // a row that sees no key: whatever its dL is
      const T* o = static_cast<const T*>(strip.o) + r * block.o_row;
      const T* dout = static_cast<const T*>(strip.dout) + r * block.dout_row;
      Vector sum = Simd::set(0.0f);
      for (int e = 0; e < block.dv; e += width) {
        const int n = block.dv - e;
        sum = Simd::multiply_add(Panel::load_first(o + e, n), Panel::load_first(dout + e, n), sum);
      }
      delta[r] = Simd::total(sum) - (strip.dlse ? strip.dlse[r] : 0.0f);
    }
  }

  // ---- Products ------------------------------------------------------------------------------

  /// C [rows, panel] = A B for A in panels of rows and B [depth, panel]: S = Q K^T, dP = dO V^T.
  template <int rows>
  static ANYFLASH_NOINLINE void score_tile(const float* a, const float* b, int depth, float* c) {
    Vector sum[rows][tile_vectors];
    Tile::clear(sum);
    for (int e = 0; e < depth; e += panel, a += Br * panel, b += panel * panel)
      Tile::template multiply_add<rows, panel, 1>(sum, a, b, min(panel, depth - e));
    Tile::template store<rows, Bc>(c, sum);
  }

  /// C [rows, panel] += A B for A in P or dS, read along its rows or its columns.
  template <int rows, int a_row, int a_column>
  static ANYFLASH_NOINLINE void gradient_tile(const float* a, const float* b, int depth, float* c) {
    Vector sum[rows][tile_vectors];
    Tile::template load<rows, panel>(sum, c);
    Tile::template multiply_add<rows, a_row, a_column>(sum, a, b, depth);
    Tile::template store<rows, panel>(c, sum);
  }

  /// S and dP where a row sees a key of the panel.
  void multiply_scores(const Queries& strip, int first, Range keys, int64_t q, int64_t dout) const {
    for (int j = keys.begin; j < keys.end; j += panel) {
      const Range rows = rows_seeing(strip, first + j, first + j + panel);
      const auto multiply = [&](int64_t a, int64_t b, int depth, int64_t c) {
        const float* columns = scratch + b + int64_t{j} * depth;
        Tile::for_each_tile(rows.begin, rows.end, [&]<int n>(int r) {
          score_tile<n>(scratch + a + r * panel, columns, depth, scratch + c + r * Bc + j);
        });
      };
      multiply(q, layout.k_columns, block.d, layout.p);
      multiply(dout, layout.v_columns, block.dv, layout.ds);
    }
  }

  /// dV += P^T dO or dK += dS^T Q: sum [panels][Bc][panel] += A^T B.
  void multiply_for_keys(const Queries& strip, int first, Range keys, int64_t a, int64_t b,
                         int64_t sum, int panels) const {
    for (int n = 0; n < panels; ++n)
      Tile::for_each_tile(keys.begin, keys.end, [&]<int count>(int j) {
        const Range rows = rows_seeing(strip, first + j, first + j + count);
        if (rows.empty()) return;
        gradient_tile<count, 1, Bc>(
            scratch + a + rows.begin * Bc + j, scratch + b + (int64_t{n} * Br + rows.begin) * panel,
            rows.end - rows.begin, scratch + sum + (int64_t{n} * Bc + j) * panel);
      });
  }

  /// dQ += dS K.
  void multiply_for_queries(const Queries& strip, int first, Range keys, float* dq) const {
    const Range all = {first + keys.begin, first + keys.end};
    for (int n = 0; n < d_panels; ++n)
      Tile::for_each_tile(0, strip.rows, [&]<int count>(int r) {
        const Range seen = keys_seen(strip, r, r + count, all);
        if (seen.empty()) return;
        const int j = seen.begin - first;
        gradient_tile<count, Bc, 1>(scratch + layout.ds + r * Bc + j,
                                    scratch + layout.k_rows + (int64_t{n} * Bc + j) * panel,
                                    seen.end - seen.begin, dq + (int64_t{n} * Br + r) * panel);
      });
  }

  // ---- P and dS ------------------------------------------------------------------------------

  /// S becomes P = exp(score - L), dP becomes dS = P (dP - delta) times the derivative of the score
  /// by scale q k; zeros where a row sees nothing of a panel.
  template <bool transformed>
  ANYFLASH_NOINLINE void differentiate(const Queries& strip, int first_row, int first,
                                       Range keys) const {
    const int whole = round_up(keys.end, panel);
    const Vector one = Simd::set(1.0f), log2 = Simd::set(log2_e);
    const bool capped = transformed && block.softcap > 0;
    const Vector scale = Simd::set(capped ? block.scale / block.softcap : block.scale);
    const Vector cap = Simd::set(block.softcap), steep = Simd::set(-strip.slope);
    for (int r = 0; r < strip.rows; ++r) {
      float* p = scratch + layout.p + r * Bc;
      float* ds = scratch + layout.ds + r * Bc;
      const Range seen = keys_seen(strip, r, r + 1, {first + keys.begin, first + keys.end});
      const int low = seen.begin - first, high = seen.end - first;
      const int begin = seen.empty() ? whole : low / panel * panel;
      const int end = seen.empty() ? whole : round_up(high, panel);
      for (int c = keys.begin; c < begin; c += width) clear(p + c, ds + c);
      for (int c = end; c < whole; c += width) clear(p + c, ds + c);

      const Vector minus_lse = Simd::set(-scratch[layout.lse + first_row + r]);
      const Vector delta = Simd::set(scratch[layout.delta + first_row + r]);
      const Vector low_column = Simd::set(static_cast<float>(low));
      const Vector high_column = Simd::set(static_cast<float>(high));
      const float away = static_cast<float>(first - strip.diagonal - r); // of column 0
      for (int c = begin; c < end; c += width) {
        Vector x = Simd::load(p + c), derivative = one;
        if constexpr (transformed) {
          x = Simd::multiply(scale, x);
          if (capped) {
            const Vector t = tanh<Simd>(x);
            x = Simd::multiply(cap, t);
            derivative = Simd::sub(one, Simd::multiply(t, t));
          }
          const Vector distance = Simd::add(Simd::set(away + static_cast<float>(c)), Simd::iota());
          x = Simd::multiply_add(steep, Simd::abs(distance), Simd::add(x, minus_lse));
        } else {
          x = Simd::multiply_add(scale, x, minus_lse);
        }
        if (c < low || c + width > high) {
          const Vector column = Simd::add(Simd::set(static_cast<float>(c)), Simd::iota());
          x = Simd::keep_between(x, low_column, column, high_column);
        }
        const Vector probability = exp2<Simd, fine>(Simd::multiply(x, log2));
        Vector slope = Simd::multiply(probability, Simd::sub(Simd::load(ds + c), delta));
        if constexpr (transformed) slope = Simd::multiply(slope, derivative);
        Simd::store(p + c, probability);
        Simd::store(ds + c, slope);
      }
    }
  }

  static void clear(float* p, float* ds) {
    Simd::store(p, Simd::set(0.0f));
    Simd::store(ds, Simd::set(0.0f));
  }

  // ---- The loops -----------------------------------------------------------------------------

  /// One strip and one key block [first, first + count): what they add to dQ, dK and dV.
  void step(int index, int first, int count) const {
    const GradientStrip& strip = block.strips[index];
    const int begin = max(strip.key_begin - first, 0) / panel * panel;
    const int visible = min(strip.key_end - first, count);
    if (begin >= visible) return;
    const Range keys = {begin, visible};
    const int64_t q = of_strip(index, d_panels), dout = of_strip(index, dv_panels);
    multiply_scores(strip, first, keys, layout.q + q, layout.dout + dout);
    if (block.softcap > 0 || block.alibi)
      differentiate<true>(strip, index * Br, first, keys);
    else
      differentiate<false>(strip, index * Br, first, keys);
    multiply_for_keys(strip, first, keys, layout.p, layout.dout + dout, layout.dv, dv_panels);
    multiply_for_keys(strip, first, keys, layout.ds, layout.q + q, layout.dk, d_panels);
    multiply_for_queries(strip, first, keys, scratch + layout.dq + q);
  }

  /// True if some strip sees a key of [first, first + count).
  bool is_visible(int first, int count) const {
    for (int i = 0; i < block.strip_count; ++i)
      if (min(block.strips[i].key_end, first + count) > max(block.strips[i].key_begin, first))
        return true;
    return false;
  }

  /// dK and dV of rows [first, first + count), of which the first `used` are keys.
  void key_block(int first, int count, int used) const {
    std::memset(scratch + layout.dk, 0,
                sizeof(float) * Bc * panel * (int64_t{d_panels} + dv_panels));
    if (is_visible(first, used)) {
      const T* k = static_cast<const T*>(block.k) + first * block.k_row;
      const T* v = static_cast<const T*>(block.v) + first * block.v_row;
      Panel::pack_columns(k, block.k_row, used, block.d, scratch + layout.k_columns);
      Panel::pack_columns(v, block.v_row, used, block.dv, scratch + layout.v_columns);
      Panel::pack_rows(k, block.k_row, used, block.d, Bc, scratch + layout.k_rows);
      for (int i = 0; i < block.strip_count; ++i) step(i, first, used);
    }
    for (int j = 0; j < count; ++j) {
      const float* dk = scratch + layout.dk + j * panel;
      const float* dv = scratch + layout.dv + j * panel;
      if (block.partial) {
        float* to = block.partial + (int64_t{first} + j) * (block.d + block.dv);
        Panel::store_row(to, dk, block.d, Bc, block.scale);
        Panel::store_row(to + block.d, dv, block.dv, Bc, 1.0f);
      } else {
        Panel::store_row(static_cast<T*>(block.dk) + (int64_t{first} + j) * block.dk_row, dk,
                         block.d, Bc, block.scale);
        Panel::store_row(static_cast<T*>(block.dv_out) + (int64_t{first} + j) * block.dv_out_row,
                         dv, block.dv, Bc, 1.0f);
      }
    }
  }

  void run() const {
    std::memset(scratch + layout.dq, 0, sizeof(float) * (layout.end - layout.dq));
    for (int i = 0; i < block.strip_count; ++i)
      if (!sees_nothing(block.strips[i])) read_rows(i);
    for (int first = 0; first < block.rows_k; first += Bc)
      key_block(first, min(Bc, block.rows_k - first), max(0, min(Bc, block.seqlen_k - first)));
    for (int i = 0; i < block.strip_count; ++i)
      for (int r = 0; r < block.strips[i].rows; ++r)
        Panel::store_row(static_cast<T*>(block.strips[i].dq) + r * block.dq_row,
                         scratch + layout.dq + of_strip(i, d_panels) + r * panel, block.d, Br,
                         block.scale);
  }
};

template <class Simd, class T>
void backward(const GradientBlock& block, float* scratch) {
  FlashBackward<Simd, T>(block, scratch).run();
}

template <class Simd>
int64_t backward_scratch(int strips, int d, int dv) {
  return typename FlashBackward<Simd, float>::Layout(strips, d, dv).end;
}

/// Adds the parts up in order.
template <class Simd, class T>
void merge_gradients(const PartialRows& rows) {
  using Sums = Panels<Simd, float>;
  constexpr int width = Simd::width;
  for (int r = 0; r < rows.rows; ++r)
    for (int e = 0; e < rows.columns; e += width) {
      const float* partial = rows.partial + r * rows.row + e;
      typename Simd::Vector sum = Sums::load_first(partial, rows.columns - e);
      for (int part = 1; part < rows.parts; ++part)
        sum = Simd::add(sum, Sums::load_first(partial + part * rows.part, rows.columns - e));
      Panels<Simd, T>::store_first(static_cast<T*>(rows.to) + r * rows.to_row + e, sum,
                                   rows.columns - e);
    }
}

} // namespace
} // namespace anyflash::cpu
