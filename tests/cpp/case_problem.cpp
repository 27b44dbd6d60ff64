#include "case_problem.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "cpu/convert.h"
#include "cpu/cpu.h"
#include "cpu/sequence.h"

namespace anyflash {
namespace {

constexpr double nan = std::numeric_limits<double>::quiet_NaN();
constexpr int packed_tail = 3; // rows after the last packed sequence: nobody may read or write them

double rounded(double x, DType dtype) {
  switch (dtype) {
  case DType::float16: {
    cpu::Float16 y;
    cpu::store(x, y);
    return cpu::to_float(y);
  }
  case DType::bfloat16: {
    cpu::BFloat16 y;
    cpu::store(x, y);
    return cpu::to_float(y);
  }
  case DType::float32:
    return static_cast<float>(x);
  default:
    return x;
  }
}

int64_t total(const Case& c, int Lengths::* length, int dense) {
  if (c.packed.empty()) return dense;
  int64_t sum = packed_tail;
  for (const Lengths& pair : c.packed) sum += pair.*length;
  return sum;
}

/// The distributions of the list, for tensor q, k, v or d (dout). `row` and `rows`: position in the
/// sequence, for "rising".
double draw(const Case& c, char tensor, int64_t row, int64_t rows, std::mt19937& random) {
  const double x = std::normal_distribution<double>()(random);
  if (tensor == 'd') return x; // dout: gradients of every size of the inputs
  if (c.values == "large" && tensor != 'v') return 30 * x;
  if (c.values == "constant") return 0.75;
  if (c.values == "tiny") return 1e-39 * x;
  if (c.values == "rising" && tensor == 'k') return x + 4.0 * row / std::max<int64_t>(1, rows - 1);
  if (c.values == "rising" && tensor == 'q') return std::abs(x);
  return x;
}

void fill(Strided& t, const Case& c, char name, DType values_of, std::mt19937& random) {
  for (int64_t b = 0; b < (t.strides.batch == 0 ? 1 : t.batch); ++b)
    for (int64_t row = 0; row < t.rows; ++row)
      for (int64_t head = 0; head < t.heads; ++head)
        for (int64_t e = 0; e < t.d; ++e)
          t.set(t.at(b, row, head, e), rounded(draw(c, name, row, t.rows, random), values_of));
}

/// NaN into packed rows outside the used part of every sequence.
void poison_unused(Strided& t, const Case& c, int Lengths::* length,
                   const std::vector<int32_t>& used) {
  std::vector<bool> keep(static_cast<size_t>(t.rows), false);
  int64_t first = 0;
  for (size_t b = 0; b < c.packed.size(); ++b) {
    const int64_t rows = c.packed[b].*length;
    std::fill_n(keep.begin() + first, used.empty() ? rows : used[b], true);
    first += rows;
  }
  for (int64_t row = 0; row < t.rows; ++row)
    if (!keep[row])
      for (int64_t head = 0; head < t.heads; ++head)
        for (int64_t e = 0; e < t.d; ++e) t.set(t.at(0, row, head, e), nan);
}

std::vector<int32_t> cumulative(const Case& c, int Lengths::* length) {
  std::vector<int32_t> sums(1, 0);
  for (const Lengths& pair : c.packed) sums.push_back(sums.back() + pair.*length);
  return sums;
}

std::string layout_of(const Case& c, char tensor) {
  return c.layout == "broadcast" && (tensor == 'q' || tensor == 'o') ? "contiguous" : c.layout;
}

} // namespace

Strided::Strided(DType type, int64_t the_batch, int64_t the_rows, int64_t the_heads, int64_t the_d,
                 const std::string& layout)
    : dtype(type), batch(the_batch), rows(the_rows), heads(the_heads), d(the_d), offset(0) {
  strides.head = d;
  strides.row = heads * d;
  strides.batch = rows * strides.row;
  if (layout == "transposed") {
    strides.head = rows * d;
    strides.row = d;
  } else if (layout == "gaps" || layout == "odd") {
    const bool gaps = layout == "gaps";
    offset = gaps ? 8 : 1;
    strides.head = gaps ? (d + 7) / 8 * 8 + 8 : d + (d % 2 ? 2 : 1);
    strides.row = heads * strides.head + (gaps ? 16 : 3);
    strides.batch = rows * strides.row + (gaps ? 8 : 5);
  }
  const int64_t count = offset + std::max<int64_t>(1, batch) * strides.batch + 8;
  if (layout == "broadcast") strides.batch = 0;
  bytes.resize(static_cast<size_t>(count * size_of(dtype)));
  for (int64_t i = 0; i < count; ++i) set(i, nan);
}

double Strided::get(int64_t element) const {
  const unsigned char* at = bytes.data() + element * size_of(dtype);
  const auto read = [&]<class T>(T x) {
    std::memcpy(&x, at, sizeof x);
    return x;
  };
  switch (dtype) {
  case DType::float16:
    return cpu::to_float(read(cpu::Float16{}));
  case DType::bfloat16:
    return cpu::to_float(read(cpu::BFloat16{}));
  case DType::float32:
    return read(0.0f);
  default:
    return read(0.0);
  }
}

void Strided::set(int64_t element, double value) {
  unsigned char* at = bytes.data() + element * size_of(dtype);
  const auto write = [&]<class T>(T x) {
    cpu::store(value, x);
    std::memcpy(at, &x, sizeof x);
  };
  switch (dtype) {
  case DType::float16:
    return write(cpu::Float16{});
  case DType::bfloat16:
    return write(cpu::BFloat16{});
  case DType::float32:
    return write(0.0f);
  default:
    return write(0.0);
  }
}

View Strided::view() {
  return {bytes.data() + offset * size_of(dtype), strides.batch, strides.row, strides.head};
}

CaseProblem::CaseProblem(const Case& c, DType type, DType values_of)
    : test_case(c), dtype(type), q(type, c.packed.empty() ? c.batch : 1, total(c, &Lengths::q, c.q),
                                   c.heads, c.d, layout_of(c, 'q')),
      k(type, c.packed.empty() ? c.batch : 1, total(c, &Lengths::k, c.k), c.heads_k, c.d,
        layout_of(c, 'k')),
      v(type, k.batch, k.rows, c.heads_k, c.dv, layout_of(c, 'v')),
      o(type, q.batch, q.rows, c.heads, c.dv, layout_of(c, 'o')),
      dout(type, q.batch, q.rows, c.heads, c.dv, layout_of(c, 'o')),
      dq(type, q.batch, q.rows, c.heads, c.d, layout_of(c, 'o')),
      dk(type, k.batch, k.rows, c.heads_k, c.d, layout_of(c, 'o')),
      dv(type, k.batch, k.rows, c.heads_k, c.dv, layout_of(c, 'o')),
      lse(static_cast<size_t>(q.batch * q.rows * c.heads)), dlse(lse.size()),
      cu_q(cumulative(c, &Lengths::q)), cu_k(cumulative(c, &Lengths::k)) {
  std::mt19937 random(static_cast<uint32_t>(std::hash<std::string>()(c.name)));
  fill(q, c, 'q', values_of, random);
  fill(k, c, 'k', values_of, random);
  fill(v, c, 'v', values_of, random);
  if (!c.packed.empty()) {
    poison_unused(q, c, &Lengths::q, c.seqused_q);
    poison_unused(k, c, &Lengths::k, c.seqused_k);
    poison_unused(v, c, &Lengths::k, c.seqused_k);
  }
  if (!c.alibi.empty())
    slopes.resize(static_cast<size_t>(c.heads * (c.alibi == "h" ? 1 : c.batch)));
  for (float& slope : slopes) slope = std::uniform_real_distribution<float>(0.01f, 0.5f)(random);
  fill(dout, c, 'd', values_of, random);
  if (!c.packed.empty()) poison_unused(dout, c, &Lengths::q, c.seqused_q);
  for (float& x : dlse) x = std::normal_distribution<float>()(random);
  for (size_t i = 0; i < dlse.size() && !c.packed.empty(); ++i)
    if (std::isnan(dout.get(dout.at(0, static_cast<int64_t>(i) % q.rows, 0, 0))))
      dlse[i] = static_cast<float>(nan);
  poison();
}

void CaseProblem::poison() {
  for (Strided* output : {&o, &dq, &dk, &dv})
    for (int64_t i = 0; i < output->elements(); ++i) output->set(i, nan);
  std::fill(lse.begin(), lse.end(), static_cast<float>(nan));
}

Problem CaseProblem::problem() {
  const Case& c = test_case;
  Problem p;
  p.dtype = dtype;
  p.packed = !c.packed.empty();
  p.batch = c.batch;
  p.heads = c.heads;
  p.heads_k = c.heads_k;
  p.seqlen_q = c.q;
  p.seqlen_k = c.k;
  p.total_q = q.batch * q.rows;
  p.total_k = k.batch * k.rows;
  p.d = c.d;
  p.dv = c.dv;
  p.q = q.view();
  p.k = k.view();
  p.v = v.view();
  p.o = o.view();
  p.lse = lse.data();
  p.want_lse = true;
  if (!c.alibi.empty()) {
    p.alibi = true;
    p.alibi_slopes = slopes.data();
    p.alibi_batch = c.alibi == "h" ? 0 : c.heads;
  }
  if (p.packed) {
    p.cu_seqlens_q = cu_q.data();
    p.cu_seqlens_k = cu_k.data();
    if (!c.seqused_q.empty()) p.seqused_q = test_case.seqused_q.data();
    if (!c.seqused_k.empty()) p.seqused_k = test_case.seqused_k.data();
  }
  if (c.window_left) p.mask.left = *c.window_left;
  if (c.window_right) p.mask.right = *c.window_right;
  if (c.causal) p.mask.right = std::min<int64_t>(p.mask.right, 0);
  p.scale = c.scale;
  p.softcap = c.softcap;
  return p;
}

Problem CaseProblem::backward_problem() {
  Problem p = problem();
  p.op = ANYFLASH_BACKWARD;
  p.dout = dout.view();
  p.dq = dq.view();
  p.dk = dk.view();
  p.dv_out = dv.view();
  p.dlse = dlse.data();
  p.has_dlse = true;
  return p;
}

namespace {

/// True if memory that belongs to no element is not NaN any more.
bool written_outside(const Strided& t) {
  std::vector<bool> outside(static_cast<size_t>(t.elements()), true);
  for (int64_t b = 0; b < t.batch; ++b)
    for (int64_t row = 0; row < t.rows; ++row)
      for (int64_t head = 0; head < t.heads; ++head)
        for (int64_t e = 0; e < t.d; ++e) outside[t.at(b, row, head, e)] = false;
  for (int64_t i = 0; i < t.elements(); ++i)
    if (outside[i] && !std::isnan(t.get(i))) return true;
  return false;
}

} // namespace

bool CaseProblem::overwritten() const {
  return written_outside(o) || written_outside(dq) || written_outside(dk) || written_outside(dv);
}

namespace {

/// Elements in order of batch, row, head, e.
std::vector<double> elements(const Strided& t) {
  std::vector<double> result;
  for (int64_t b = 0; b < t.batch; ++b)
    for (int64_t row = 0; row < t.rows; ++row)
      for (int64_t head = 0; head < t.heads; ++head)
        for (int64_t e = 0; e < t.d; ++e) result.push_back(t.get(t.at(b, row, head, e)));
  return result;
}

/// Attention as a framework without a fused kernel computes it in the dtype: every product's result
/// is rounded to it. The scale goes on the scores, or on the keys before the product.
class Standard {
public:
  Standard(CaseProblem& inputs, bool scale_keys)
      : in_(inputs), problem_(inputs.problem()), scale_keys_(scale_keys), q_(values(inputs.q)),
        k_(values(inputs.k)), v_(values(inputs.v)), dout_(values(inputs.dout)) {
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
    return elements(o);
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
  static std::vector<float> values(const Strided& t) {
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

} // namespace

namespace {

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
  const std::vector<double> x = elements(computed);
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
  const double rms_limit = (fp32 ? 2 : 1.25) * (capped ? 1.5 : 1) * expected.standard_rms +
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
      compared(elements(exact.o), Standard(inputs, false).run(), Standard(inputs, true).run());
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
  ExpectedGradients result = {compared(elements(exact.dq), first[0], second[0]),
                              compared(elements(exact.dk), first[1], second[1]),
                              compared(elements(exact.dv), first[2], second[2])};
  const double q = magnitude(elements(exact.q)), k = magnitude(elements(exact.k));
  const double dp = magnitude(elements(exact.dout)) * magnitude(elements(exact.v)) *
                    std::sqrt(c.dv) * std::abs(c.scale);
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
  const double q = magnitude(elements(computed.q)), k = magnitude(elements(computed.k));
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

std::vector<std::string> tested_instruction_sets() {
#if defined(ANYFLASH_EMULATED)
  return {cpu::instruction_sets().front()};
#else
  return cpu::instruction_sets();
#endif
}

std::string name_of(DType dtype) {
  switch (dtype) {
  case DType::float16:
    return "float16";
  case DType::bfloat16:
    return "bfloat16";
  case DType::float32:
    return "float32";
  default:
    return "float64";
  }
}

} // namespace anyflash
