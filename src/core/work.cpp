#include "core/work.h"

#include <algorithm>

namespace anyflash {
namespace {

/// Sum over i in [0, n) of clamp(i + t, 0, m).
double sum_of_clamped(int64_t n, int64_t t, int64_t m) {
  const int64_t first = std::clamp<int64_t>(-t, 0, n);   // i + t <= 0 before
  const int64_t last = std::clamp<int64_t>(m - t, 0, n); // i + t >= m from here on
  // In between: first + t, ..., last - 1 + t.
  const double ramp =
      static_cast<double>(last - first) * static_cast<double>(first + last - 1 + 2 * t) / 2;
  return ramp + static_cast<double>(n - last) * static_cast<double>(m);
}

} // namespace

double visible_pairs(int64_t seqlen_q, int64_t seqlen_k, const Mask& mask) {
  const int64_t diagonal = seqlen_k - seqlen_q;
  return sum_of_clamped(seqlen_q, diagonal + mask.right + 1, seqlen_k) -
         sum_of_clamped(seqlen_q, diagonal - mask.left, seqlen_k);
}

Work work_of(const Problem& p) {
  Work work;
  const auto heads = static_cast<double>(p.heads);
  auto rows_q = static_cast<double>(p.total_q), rows_k = static_cast<double>(p.total_k);
  if (!p.packed) {
    work.pairs = static_cast<double>(p.batch) * visible_pairs(p.seqlen_q, p.seqlen_k, p.mask);
  } else if (p.device_type == ANYFLASH_CPU && p.cu_seqlens_q && p.cu_seqlens_k) {
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t n = p.seqused_q ? p.seqused_q[b] : p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b];
      const int64_t m = p.seqused_k ? p.seqused_k[b] : p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b];
      work.pairs += visible_pairs(n, m, p.mask);
    }
  } else {
    work.exact = false;
    work.pairs = static_cast<double>(p.batch) * visible_pairs(p.seqlen_q, p.seqlen_k, p.mask);
  }
  work.pairs *= heads;
  const auto d = static_cast<double>(p.d), dv = static_cast<double>(p.dv);
  const auto row_bytes = (d + dv) * static_cast<double>(size_of(p.dtype));
  const double rows = rows_q * heads + rows_k * static_cast<double>(p.heads_k);
  if (p.op == ANYFLASH_FORWARD) {
    work.flops = 2 * work.pairs * (d + dv); // S, O
    work.bytes = rows * row_bytes;
    if (p.want_lse) work.bytes += 4 * rows_q * heads;
  } else {
    work.flops = 2 * work.pairs * (3 * d + 2 * dv); // S, dP, dV, dK, dQ
    // q, k, v, o, dO in; dQ, dK, dV out
    work.bytes = 2 * rows * row_bytes + 4 * rows_q * heads * (p.has_dlse ? 2 : 1);
  }
  return work;
}

} // namespace anyflash
