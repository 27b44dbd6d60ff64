#include "case_problem.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "cpu/convert.h"

namespace anyflash {
namespace {

constexpr double nan = std::numeric_limits<double>::quiet_NaN();
constexpr int packed_tail = 3; // rows after the last packed sequence: nobody may read or write them

int64_t total(const Case& c, int Lengths::* length, int dense) {
  if (c.packed.empty()) return dense;
  int64_t sum = packed_tail;
  for (const Lengths& pair : c.packed) sum += pair.*length;
  return sum;
}

/// The distributions of the list, for tensor q, k, v or d (dout). `row` and `rows`: position in the
/// sequence, for "rising" and "falling".
double draw(const Case& c, char tensor, int64_t row, int64_t rows, std::mt19937& random) {
  const double x = std::normal_distribution<double>()(random);
  if (tensor == 'd') return x; // dout: gradients of every size of the inputs
  if (c.values == "large" && tensor != 'v') return 30 * x;
  if (c.values == "constant") return 0.75;
  if (c.values == "tiny") return 1e-39 * x;
  if (c.values == "rising" && tensor == 'k') return x + 4.0 * row / std::max<int64_t>(1, rows - 1);
  if (c.values == "falling" && tensor == 'k')
    return x + 16.0 - 16.0 * row / std::max<int64_t>(1, rows - 1);
  if ((c.values == "rising" || c.values == "falling") && tensor == 'q') return std::abs(x);
  return x;
}

void fill(Strided& t, const Case& c, char name, DType values_of, std::mt19937& random) {
  for (int64_t b = 0; b < (t.strides.batch == 0 ? 1 : t.batch); ++b)
    for (int64_t row = 0; row < t.rows; ++row)
      for (int64_t head = 0; head < t.heads; ++head)
        for (int64_t e = 0; e < t.d; ++e)
          t.set(t.at(b, row, head, e), rounded(draw(c, name, row, t.rows, random), values_of));
}

void fill_with_nan(Strided& t) {
  for (int64_t i = 0; i < t.elements(); ++i) t.set(i, nan);
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

std::vector<double> Strided::values() const {
  std::vector<double> result;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t head = 0; head < heads; ++head)
        for (int64_t e = 0; e < d; ++e) result.push_back(get(at(b, row, head, e)));
  return result;
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
  fill_with_nan(o);
  std::fill(lse.begin(), lse.end(), static_cast<float>(nan));
  poison_gradients();
}

void CaseProblem::poison_gradients() {
  for (Strided* gradient : {&dq, &dk, &dv}) fill_with_nan(*gradient);
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
