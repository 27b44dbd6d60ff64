#include "accuracy.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "cpu/cpu.h"
#include "cpu/sequence.h"

namespace anyflash {
namespace {

constexpr double nan = std::numeric_limits<double>::quiet_NaN();

/// Attention as a framework without a fused kernel computes it in the dtype: every product's result
/// is rounded to it. The scale goes on the scores, or on the keys before the product.
class Standard {
public:
  Standard(CaseProblem& inputs, bool scale_keys)
      : in_(inputs), problem_(inputs.problem()), scale_keys_(scale_keys), q_(memory_of(inputs.q)),
        k_(memory_of(inputs.k)), v_(memory_of(inputs.v)), dout_(memory_of(inputs.dout)) {
    if (scale_keys)
      for (float& key : k_) key = static_cast<float>(round(key * problem_.scale));
  }

  /// O.
  std::vector<double> run() {
    Strided o(DType::float64, in_.o.batch, in_.o.rows, in_.o.heads, in_.o.d, "contiguous");
    for_each_row([&](const Row& row) {
      const std::vector<float> sum = weighted_sum(row.p, v_, row.v, in_.v.strides.row, problem_.dv);
      for (int64_t e = 0; e < problem_.dv; ++e)
        o.set(o.at(row.batch, row.first_q, row.h, e), round(sum[e]));
    });
    return o.values();
  }

  /// dQ, dK, dV: autograd's formula, with dP and dS rounded too.
  std::array<std::vector<double>, 3> run_backward() {
    // In order of batch, row, head, e; rows that belong to no sequence hold NaN.
    const auto empty = [](const Strided& t) {
      return std::vector<double>(static_cast<size_t>(t.batch * t.rows * t.heads * t.d), nan);
    };
    const auto offset = [](const Strided& t, int64_t batch, int64_t row, int64_t head) {
      return ((batch * t.rows + row) * t.heads + head) * t.d;
    };
    std::vector<double> dq = empty(in_.dq), dk = empty(in_.dk), dv = empty(in_.dv);
    const int64_t rows_k =
        problem_.packed ? problem_.cu_seqlens_k[problem_.batch] : in_.dk.batch * in_.dk.rows;
    std::fill_n(dk.begin(), offset(in_.dk, 0, rows_k, 0), 0.0);
    std::fill_n(dv.begin(), offset(in_.dv, 0, rows_k, 0), 0.0);
    for_each_row([&](const Row& row) {
      const float* q = &q_[in_.q.at(row.batch, row.first_q, row.h, 0)];
      const std::vector<double> ds = score_gradients(row);
      const std::vector<float> sum = weighted_sum(ds, k_, row.k, in_.k.strides.row, problem_.d);
      double* to = &dq[offset(in_.dq, row.batch, row.first_q, row.h)];
      for (int64_t e = 0; e < problem_.d; ++e) to[e] = round(sum[e]);
      for (size_t n = 0; n < ds.size(); ++n) {
        const int64_t j = row.first_k + static_cast<int64_t>(n);
        to = &dk[offset(in_.dk, row.batch, j, row.h_k)];
        for (int64_t e = 0; e < problem_.d; ++e) to[e] += ds[n] * q[e];
        to = &dv[offset(in_.dv, row.batch, j, row.h_k)];
        for (int64_t e = 0; e < problem_.dv; ++e) to[e] += row.p[n] * dout_[row.o + e];
      }
    });
    for (double& x : dk) x = scale_keys_ ? round(round(x) * problem_.scale) : round(x);
    for (double& x : dv) x = round(x);
    return {dq, dk, dv};
  }

private:
  /// One query and what it sees; offsets into the tensors' memory.
  struct Row {
    int64_t batch, h, h_k;
    int64_t first_q, first_k;  // row of the query, and of the first key that it sees
    int64_t k, v, o;           // elements of that key, its value, the query's O
    std::vector<double> p;     // rounded
    std::vector<double> tanhs; // of the capped scores
    double dlse;
  };

  double round(double x) const { return rounded(x, in_.dtype); }

  /// Everything in a tensor's memory.
  static std::vector<float> memory_of(const Strided& t) {
    std::vector<float> x;
    for (int64_t i = 0; i < t.elements(); ++i) x.push_back(static_cast<float>(t.get(i)));
    return x;
  }

  float score(int64_t q, int64_t k) const {
    float s = 0;
    for (int64_t e = 0; e < problem_.d; ++e) s += q_[q + e] * k_[k + e];
    return static_cast<float>(scale_keys_ ? round(s) : round(round(s) * problem_.scale));
  }

  template <class Visit>
  void for_each_row(Visit visit) const {
    for (int64_t b = 0; b < problem_.batch; ++b) {
      const cpu::Sequence s = cpu::sequence_of(problem_, b);
      for (int64_t h = 0; h < problem_.heads; ++h)
        for (int64_t i = 0; i < s.rows_q; ++i) visit(row_of(s, b, h, i));
    }
  }

  Row row_of(const cpu::Sequence& s, int64_t b, int64_t h, int64_t i) const {
    const int64_t diagonal = i + s.seqlen_k - s.seqlen_q;
    const int64_t begin = std::max<int64_t>(0, diagonal - problem_.mask.left);
    const int64_t end =
        i < s.seqlen_q ? std::min(s.seqlen_k, diagonal + problem_.mask.right + 1) : 0;
    Row row{};
    row.batch = problem_.packed ? 0 : b;
    row.h = h;
    row.h_k = h / problem_.group();
    row.first_q = i + (problem_.packed ? problem_.cu_seqlens_q[b] : 0);
    row.first_k = begin + (problem_.packed ? problem_.cu_seqlens_k[b] : 0);
    row.k = in_.k.at(row.batch, row.first_k, row.h_k, 0);
    row.v = in_.v.at(row.batch, row.first_k, row.h_k, 0);
    row.o = in_.dout.at(row.batch, row.first_q, h, 0);
    row.dlse = in_.dlse[s.lse + h * s.lse_head + i];
    const int64_t q = in_.q.at(row.batch, row.first_q, h, 0);
    double m = -INFINITY, l = 0;
    for (int64_t j = begin; j < end; ++j) {
      double x = score(q, row.k + (j - begin) * in_.k.strides.row);
      if (problem_.softcap > 0) {
        row.tanhs.push_back(std::tanh(x / problem_.softcap));
        x = round(row.tanhs.back() * problem_.softcap);
      }
      if (problem_.alibi)
        x = round(x - problem_.alibi_slopes[b * problem_.alibi_batch + h] *
                          static_cast<float>(std::abs(diagonal - j)));
      row.p.push_back(x);
      m = std::max(m, x);
    }
    for (double& x : row.p) l += x = std::exp(static_cast<float>(x - m));
    for (double& x : row.p) x = round(x / l);
    return row;
  }

  /// The gradient by q k, or by q and the scaled key.
  std::vector<double> score_gradients(const Row& row) const {
    std::vector<double> ds;
    float delta = 0;
    for (size_t n = 0; n < row.p.size(); ++n) {
      const float* v = &v_[row.v + static_cast<int64_t>(n) * in_.v.strides.row];
      float dp = 0;
      for (int64_t e = 0; e < problem_.dv; ++e) dp += dout_[row.o + e] * v[e];
      ds.push_back(round(dp));
      delta += static_cast<float>(row.p[n] * ds.back());
    }
    for (size_t n = 0; n < ds.size(); ++n) {
      ds[n] = round(row.p[n] * (ds[n] - delta + row.dlse));
      if (problem_.softcap > 0) ds[n] = round(ds[n] * (1 - row.tanhs[n] * row.tanhs[n]));
      if (!scale_keys_) ds[n] = round(ds[n] * problem_.scale);
    }
    return ds;
  }

  /// sum of weights[n] x[at + n row, ... + columns).
  static std::vector<float> weighted_sum(const std::vector<double>& weights,
                                         const std::vector<float>& x, int64_t at, int64_t row,
                                         int64_t columns) {
    std::vector<float> sum(static_cast<size_t>(columns), 0.0f);
    for (double weight : weights) {
      for (int64_t e = 0; e < columns; ++e) sum[e] += static_cast<float>(weight) * x[at + e];
      at += row;
    }
    return sum;
  }

  CaseProblem& in_;
  const Problem problem_;
  const bool scale_keys_;
  std::vector<float> q_, k_, v_, dout_; // indexed as the tensors' memory; k perhaps scaled
};

double rms(const std::vector<double>& x) {
  double sum = 0;
  for (double y : x) sum += y * y;
  return x.empty() ? 0 : std::sqrt(sum / static_cast<double>(x.size()));
}

/// |x - ref| where ref is a number.
std::vector<double> errors(const std::vector<double>& x, const std::vector<double>& ref) {
  std::vector<double> result;
  for (size_t i = 0; i < ref.size(); ++i)
    if (!std::isnan(ref[i])) result.push_back(std::abs(x[i] - ref[i]));
  return result;
}

double largest(const std::vector<double>& x) {
  return x.empty() ? 0 : *std::max_element(x.begin(), x.end());
}

/// The largest absolute value, leaving NaN and infinities out.
double magnitude(const auto& x) {
  double largest = 0;
  for (double y : x) largest = std::max(largest, std::isfinite(y) ? std::abs(y) : 0);
  return largest;
}

/// The reference, and the worse of the two standard computations.
Expected::Tensor compared(std::vector<double> ref, const std::vector<double>& first,
                          const std::vector<double>& second) {
  Expected::Tensor result;
  for (const std::vector<double>& standard : {first, second}) {
    const std::vector<double> off = errors(standard, ref);
    result.standard_error = std::max(result.standard_error, largest(off));
    result.standard_rms = std::max(result.standard_rms, rms(off));
  }
  result.ref = std::move(ref);
  return result;
}

/// A gradient's floor in float32: the roundings of its own size (a sum over all rows or keys has no
/// bound like O's); of dP and delta, which cancel (in the standard computation to the last bit
/// where a row sees one key); and of L, whose rounding every P carries.
void set_floor(Expected::Tensor& gradient, double cancelling, double lse) {
  const double size = magnitude(gradient.ref), unit = std::max(1.0, size);
  gradient.floor = 0x1p-20 * unit + 0x1p-23 * (cancelling + lse * size);
  gradient.rms_floor =
      1e-7 * unit + 0x1p-26 * cancelling +
      0x1p-24 * lse * rms(errors(std::vector(gradient.ref.size(), 0.0), gradient.ref));
}

/// Empty if a tensor meets the rule.
std::string violation(const std::string& name, const Strided& computed,
                      const Expected::Tensor& expected, bool capped) {
  const DType dtype = computed.dtype;
  const bool fp32 = dtype == DType::float32;
  const std::vector<double> x = computed.values();
  std::vector<double> rounding;
  for (double y : expected.ref)
    if (!std::isnan(y)) rounding.push_back(std::abs(rounded(y + 0.3, dtype) - (y + 0.3)));
  // In float32 the standard computation differs from ours only in the order of its sums.
  const double limit = (capped ? 3 : 2) * expected.standard_error + 2 * largest(rounding) +
                       (capped ? 3e-4 : 0) + (fp32 ? expected.floor : 0);
  for (size_t i = 0; i < x.size(); ++i) {
    const double ref = expected.ref[i];
    const bool same = std::isnan(ref) ? std::isnan(x[i]) : std::abs(x[i] - ref) <= limit;
    if (!same)
      return name + "[row " + std::to_string(i / (computed.heads * computed.d)) + ", head " +
             std::to_string(i / computed.d % computed.heads) + ", " +
             std::to_string(i % computed.d) + "] = " + std::to_string(x[i]) + ", reference " +
             std::to_string(ref) + ", allowed error " + std::to_string(limit);
  }
  // The columns of a row share their roundings; over few rows an rms of them scatters.
  const double rows = static_cast<double>(rounding.size()) / static_cast<double>(computed.d);
  const double rms_limit =
      (fp32 ? 2 : 1.25) * (capped ? 1.5 : 1) * (1 + 1 / std::sqrt(rows)) * expected.standard_rms +
      rms(rounding) + expected.rms_floor;
  if (const double off = rms(errors(x, expected.ref)); off > rms_limit)
    return name + ": rms error " + std::to_string(off) + ", allowed " + std::to_string(rms_limit);
  return "";
}

} // namespace

Expected expected(const Case& c, DType dtype) {
  CaseProblem exact(c, DType::float64, dtype);
  cpu::reference(exact.problem());
  CaseProblem inputs(c, dtype);
  Expected result;
  result.o =
      compared(exact.o.values(), Standard(inputs, false).run(), Standard(inputs, true).run());
  result.lse = exact.lse;
  return result;
}

ExpectedGradients expected_gradients(const Case& c, DType dtype) {
  CaseProblem exact(c, DType::float64, dtype);
  cpu::reference(exact.problem());
  cpu::reference_backward(exact.backward_problem());
  CaseProblem inputs(c, dtype);
  const auto first = Standard(inputs, false).run_backward();
  const auto second = Standard(inputs, true).run_backward();
  ExpectedGradients result = {compared(exact.dq.values(), first[0], second[0]),
                              compared(exact.dk.values(), first[1], second[1]),
                              compared(exact.dv.values(), first[2], second[2])};
  const double q = magnitude(exact.q.values()), k = magnitude(exact.k.values());
  const double dp = magnitude(exact.dout.values()) * magnitude(exact.v.values()) * std::sqrt(c.dv) *
                    std::abs(c.scale);
  const double lse = magnitude(exact.lse);
  set_floor(result.dq, dp * k, lse);
  set_floor(result.dk, dp * q, lse);
  set_floor(result.dv, 0, lse);
  return result;
}

std::string violation(const CaseProblem& computed, const ExpectedGradients& expected) {
  if (computed.overwritten()) return "memory between the elements of an output was written";
  const bool capped = computed.test_case.softcap > 0;
  for (const std::string& off : {violation("dQ", computed.dq, expected.dq, capped),
                                 violation("dK", computed.dk, expected.dk, capped),
                                 violation("dV", computed.dv, expected.dv, capped)})
    if (!off.empty()) return off;
  return "";
}

std::string violation(const CaseProblem& computed, const Expected& expected) {
  const Case& c = computed.test_case;
  const bool capped = c.softcap > 0;
  if (computed.overwritten()) return "memory between the elements of O was written";
  if (std::string off = violation("O", computed.o, expected.o, capped); !off.empty()) return off;

  // L carries the rounding of scores of the size of |q| |k|.
  const double q = magnitude(computed.q.values()), k = magnitude(computed.k.values());
  const double score = q * k * std::sqrt(c.d) * std::abs(c.scale);
  for (size_t i = 0; i < expected.lse.size(); ++i) {
    const double x = computed.lse[i], ref = expected.lse[i];
    const double allowed = 1e-5 * std::max(1.0, std::abs(ref)) + 0x1p-20 + 0x1p-21 * score +
                           (capped ? 3e-4 * std::max(1.0f, c.softcap) : 0);
    const bool same = std::isnan(ref)   ? std::isnan(x)
                      : std::isinf(ref) ? x == ref
                                        : std::abs(x - ref) <= allowed;
    if (!same)
      return "L[" + std::to_string(i) + "] = " + std::to_string(x) + ", reference " +
             std::to_string(ref);
  }
  return "";
}

} // namespace anyflash
