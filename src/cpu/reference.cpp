// The oracle: attention by its formula, one row at a time, in double. Meant to be obviously right.
#include <algorithm>
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

/// One row of the matrix of scores: query i of head h in sequence b, and the keys that it sees.
template <class T>
struct ScoreRow {
  const T *q, *k, *v; // this query; key 0 and value 0 of its head
  double slope;
  int64_t diagonal;   // the key that the query is aligned with
  int64_t begin, end; // keys that it sees: none for a row past the used length

  ScoreRow(const Problem& p, const Sequence& sequence, int64_t b, int64_t h, int64_t i) {
    const int64_t h_k = h / p.group();
    q = static_cast<const T*>(p.q.data) + sequence.q + i * p.q.row + h * p.q.head;
    k = static_cast<const T*>(p.k.data) + sequence.k + h_k * p.k.head;
    v = static_cast<const T*>(p.v.data) + sequence.v + h_k * p.v.head;
    slope = p.alibi_slopes ? p.alibi_slopes[b * p.alibi_batch + h] : 0.0;
    diagonal = i + sequence.seqlen_k - sequence.seqlen_q;
    begin = std::max<int64_t>(0, diagonal - p.mask.left);
    end = std::min(sequence.seqlen_k, diagonal + p.mask.right + 1);
    if (i >= sequence.seqlen_q || end < begin) end = begin;
  }

  bool empty() const { return begin == end; }
};

/// A score and its derivative by q k^T.
struct Score {
  double value, derivative;
};

/// Query and key j: scale q k, then softcap, then ALiBi.
template <class T>
Score score(const Problem& p, const ScoreRow<T>& row, int64_t j) {
  double s = 0;
  for (int64_t e = 0; e < p.d; ++e) s += to_double(row.q[e]) * to_double(row.k[j * p.k.row + e]);
  s *= p.scale;
  double derivative = p.scale;
  if (p.softcap > 0) {
    const double t = std::tanh(s / p.softcap);
    s = p.softcap * t;
    derivative *= 1 - t * t;
  }
  return {s - row.slope * static_cast<double>(std::abs(row.diagonal - j)), derivative};
}

/// The probabilities of a row and its log-sum-exp.
struct Probabilities {
  std::vector<double> p; // of keys begin, ..., end - 1
  std::vector<double> derivative;
  double lse = -std::numeric_limits<double>::infinity();
};

template <class T>
Probabilities probabilities(const Problem& problem, const ScoreRow<T>& row) {
  Probabilities result;
  if (row.empty()) return result;
  double m = -std::numeric_limits<double>::infinity();
  for (int64_t j = row.begin; j < row.end; ++j) {
    const Score s = score(problem, row, j);
    result.p.push_back(s.value);
    result.derivative.push_back(s.derivative);
    m = std::max(m, s.value);
  }
  double l = 0;
  for (double& x : result.p) l += x = std::exp(x - m);
  for (double& x : result.p) x /= l;
  result.lse = m + std::log(l);
  return result;
}

/// O [dv] and L of query i of head h in sequence b.
template <class T>
void reference_row(const Problem& problem, const Sequence& sequence, int64_t b, int64_t h,
                   int64_t i) {
  const ScoreRow<T> row(problem, sequence, b, h, i);
  const Probabilities probability = probabilities(problem, row);
  T* o = static_cast<T*>(problem.o.data) + sequence.o + i * problem.o.row + h * problem.o.head;
  std::vector<double> sum(static_cast<size_t>(problem.dv), 0.0);
  for (int64_t j = row.begin; j < row.end; ++j)
    for (int64_t e = 0; e < problem.dv; ++e)
      sum[e] += probability.p[j - row.begin] * to_double(row.v[j * problem.v.row + e]);
  for (int64_t e = 0; e < problem.dv; ++e) store(sum[e], o[e]);
  if (problem.lse)
    problem.lse[sequence.lse + h * sequence.lse_head + i] = static_cast<float>(probability.lse);
}

template <class T>
void reference_of(const Problem& problem) {
  for (int64_t b = 0; b < problem.batch; ++b) {
    const Sequence sequence = sequence_of(problem, b);
    for (int64_t h = 0; h < problem.heads; ++h)
      for (int64_t i = 0; i < sequence.rows_q; ++i) reference_row<T>(problem, sequence, b, h, i);
  }
}

/// dQ [d] of query i of head h in sequence b, and what it adds to dk and dv of its head:
/// [seqlen_k, d] and [seqlen_k, dv].
///
///   dP = dO V^T;  dS = P (dP - delta + dL) with delta = rowsum(P dP), which is rowsum(dO O);
///   dQ = dS' K, dK = dS'^T Q, dV = P^T dO, where dS' = dS times the derivative of the score
template <class T>
void reference_backward_row(const Problem& p, const Sequence& sequence, int64_t b, int64_t h,
                            int64_t i, std::vector<double>& dk, std::vector<double>& dv) {
  const ScoreRow<T> row(p, sequence, b, h, i);
  const Probabilities probability = probabilities(p, row);
  const T* dout =
      static_cast<const T*>(p.dout.data) + sequence.dout + i * p.dout.row + h * p.dout.head;
  const double dlse = p.dlse ? p.dlse[sequence.lse + h * sequence.lse_head + i] : 0.0;

  std::vector<double> dp(probability.p.size(), 0.0);
  double delta = 0;
  for (int64_t j = row.begin; j < row.end; ++j) {
    double& x = dp[j - row.begin];
    for (int64_t e = 0; e < p.dv; ++e) x += to_double(dout[e]) * to_double(row.v[j * p.v.row + e]);
    delta += probability.p[j - row.begin] * x;
  }
  std::vector<double> dq(static_cast<size_t>(p.d), 0.0);
  for (int64_t j = row.begin; j < row.end; ++j) {
    const int64_t n = j - row.begin;
    const double ds = probability.p[n] * (dp[n] - delta + dlse) * probability.derivative[n];
    for (int64_t e = 0; e < p.d; ++e) {
      dq[e] += ds * to_double(row.k[j * p.k.row + e]);
      dk[j * p.d + e] += ds * to_double(row.q[e]);
    }
    for (int64_t e = 0; e < p.dv; ++e) dv[j * p.dv + e] += probability.p[n] * to_double(dout[e]);
  }
  T* to = static_cast<T*>(p.dq.data) + sequence.dq + i * p.dq.row + h * p.dq.head;
  for (int64_t e = 0; e < p.d; ++e) store(dq[e], to[e]);
}

/// Writes [rows, columns] sums of one key head.
template <class T>
void store_rows(const std::vector<double>& sums, const View& view, int64_t first, int64_t rows,
                int64_t columns) {
  for (int64_t j = 0; j < rows; ++j)
    for (int64_t e = 0; e < columns; ++e)
      store(sums[j * columns + e], static_cast<T*>(view.data)[first + j * view.row + e]);
}

template <class T>
void reference_backward_of(const Problem& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    const Sequence sequence = sequence_of(p, b);
    for (int64_t h_k = 0; h_k < p.heads_k; ++h_k) {
      std::vector<double> dk(static_cast<size_t>(sequence.rows_k * p.d), 0.0);
      std::vector<double> dv(static_cast<size_t>(sequence.rows_k * p.dv), 0.0);
      for (int64_t h = h_k * p.group(); h < (h_k + 1) * p.group(); ++h)
        for (int64_t i = 0; i < sequence.rows_q; ++i)
          reference_backward_row<T>(p, sequence, b, h, i, dk, dv);
      store_rows<T>(dk, p.dk, sequence.dk + h_k * p.dk.head, sequence.rows_k, p.d);
      store_rows<T>(dv, p.dv_out, sequence.dv + h_k * p.dv_out.head, sequence.rows_k, p.dv);
    }
  }
}

/// Calls work(T{}) with the type of the problem's tensors.
template <class Work>
void with_dtype(DType dtype, Work work) {
  switch (dtype) {
  case DType::float16:
    return work(Float16{});
  case DType::bfloat16:
    return work(BFloat16{});
  case DType::float32:
    return work(float{});
  case DType::float64:
    return work(double{});
  }
  throw InvalidType("the reference takes float16, bfloat16, float32 and float64");
}

} // namespace

void reference(const Problem& problem) {
  with_dtype(problem.dtype, [&](auto zero) { reference_of<decltype(zero)>(problem); });
}

void reference_backward(const Problem& problem) {
  with_dtype(problem.dtype, [&](auto zero) { reference_backward_of<decltype(zero)>(problem); });
}

} // namespace anyflash::cpu
