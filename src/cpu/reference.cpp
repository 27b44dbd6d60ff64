// The oracle: attention by its formula, one row at a time, in double. Meant to be obviously right.
#include <cmath>
#include <limits>
#include <vector>

#include "core/error.h"
#include "cpu/convert.h"
#include "cpu/cpu.h"
#include "cpu/sequence.h"

namespace anyflash::cpu {
namespace {

double to_double(double x) { return x; }
double to_double(float x) { return x; }
double to_double(Float16 x) { return to_float(x); }
double to_double(BFloat16 x) { return to_float(x); }

/// The score of query i and key j: scale q k, then softcap, then ALiBi.
template <class T>
double score(const Problem& problem, const T* q, const T* k, double slope, int64_t distance) {
  double s = 0;
  for (int64_t e = 0; e < problem.d; ++e) s += to_double(q[e]) * to_double(k[e]);
  s *= problem.scale;
  if (problem.softcap > 0) s = problem.softcap * std::tanh(s / problem.softcap);
  return s - slope * static_cast<double>(std::abs(distance));
}

/// O [dv] and L of query i of head h in sequence b.
template <class T>
void reference_row(const Problem& problem, const Sequence& sequence, int64_t b, int64_t h,
                   int64_t i) {
  const int64_t h_k = h / problem.group();
  const T* q =
      static_cast<const T*>(problem.q.data) + sequence.q + i * problem.q.row + h * problem.q.head;
  const T* k = static_cast<const T*>(problem.k.data) + sequence.k + h_k * problem.k.head;
  const T* v = static_cast<const T*>(problem.v.data) + sequence.v + h_k * problem.v.head;
  T* o = static_cast<T*>(problem.o.data) + sequence.o + i * problem.o.row + h * problem.o.head;
  const double slope =
      problem.alibi_slopes ? problem.alibi_slopes[b * problem.alibi_batch + h] : 0.0;

  // Query i sees keys [begin, end): none for a row past the used length.
  const int64_t diagonal = i + sequence.seqlen_k - sequence.seqlen_q;
  const int64_t begin = std::max<int64_t>(0, diagonal - problem.mask.left);
  int64_t end = std::min(sequence.seqlen_k, diagonal + problem.mask.right + 1);
  if (i >= sequence.seqlen_q) end = begin;

  std::vector<double> p; // scores, then probabilities
  double m = -std::numeric_limits<double>::infinity();
  for (int64_t j = begin; j < end; ++j) {
    p.push_back(score(problem, q, k + j * problem.k.row, slope, diagonal - j));
    m = std::max(m, p.back());
  }
  double l = 0;
  for (double& x : p) l += x = std::exp(x - m);

  std::vector<double> sum(static_cast<size_t>(problem.dv), 0.0);
  for (int64_t j = begin; j < end; ++j)
    for (int64_t e = 0; e < problem.dv; ++e)
      sum[e] += p[j - begin] * to_double(v[j * problem.v.row + e]);
  for (int64_t e = 0; e < problem.dv; ++e) store(p.empty() ? 0.0 : sum[e] / l, o[e]);
  if (problem.lse)
    problem.lse[sequence.lse + h * sequence.lse_head + i] =
        p.empty() ? -std::numeric_limits<float>::infinity() : static_cast<float>(m + std::log(l));
}

template <class T>
void reference_of(const Problem& problem) {
  for (int64_t b = 0; b < problem.batch; ++b) {
    const Sequence sequence = sequence_of(problem, b);
    for (int64_t h = 0; h < problem.heads; ++h)
      for (int64_t i = 0; i < sequence.rows_q; ++i) reference_row<T>(problem, sequence, b, h, i);
  }
}

} // namespace

void reference(const Problem& problem) {
  switch (problem.dtype) {
  case DType::float16:
    return reference_of<Float16>(problem);
  case DType::bfloat16:
    return reference_of<BFloat16>(problem);
  case DType::float32:
    return reference_of<float>(problem);
  case DType::float64:
    return reference_of<double>(problem);
  }
  throw InvalidType("the reference takes float16, bfloat16, float32 and float64");
}

} // namespace anyflash::cpu
