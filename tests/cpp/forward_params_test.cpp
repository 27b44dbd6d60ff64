// Problem -> ForwardParams: divisors against integer division, strides, windows, the score's
// factors.
#include "core/forward_params.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

namespace anyflash {
namespace {

void expect_divides(uint32_t divisor, uint32_t n) {
  ASSERT_EQ(divide(n, make_divisor(divisor)), n / divisor) << n << " / " << divisor;
}

TEST(Divisor, IsExactWhereTheQuotientChanges) {
  constexpr uint32_t limit = uint32_t{1} << 31;
  std::mt19937 random(3);
  std::uniform_int_distribution<uint32_t> any(0, limit - 1), exponent(1, 31);
  const auto check = [&](uint32_t divisor) {
    for (const uint32_t n : {0u, 1u, divisor - 1, divisor, limit - 1, limit - 2})
      expect_divides(divisor, n);
    const uint32_t last_multiple = (limit - 1) / divisor * divisor;
    expect_divides(divisor, last_multiple);
    if (last_multiple > 0) expect_divides(divisor, last_multiple - 1);
    for (int i = 0; i < 20; ++i) { // the quotient changes at multiples: an error shows there first
      const uint32_t multiple = any(random) / divisor * divisor;
      expect_divides(divisor, multiple);
      if (multiple > 0) expect_divides(divisor, multiple - 1);
    }
  };
  for (uint32_t divisor = 1; divisor < 20000; ++divisor) check(divisor);
  for (uint32_t bit = 0; bit < 31; ++bit)
    for (const int offset : {-1, 0, 1})
      if (const int64_t d = (int64_t{1} << bit) + offset; d >= 1 && d < limit)
        check(static_cast<uint32_t>(d));
  for (int i = 0; i < 20000; ++i) check(std::max(1u, any(random) >> (exponent(random) - 1)));
}

TEST(Divisor, DividesEveryNumberBySmallDivisors) {
  for (const uint32_t divisor : {1u, 3u, 7u, 12u, 641u}) {
    const Divisor d = make_divisor(divisor);
    uint32_t wrong = 0;
    for (uint32_t n = 0; n < uint32_t{1} << 26; ++n) wrong += divide(n, d) != n / divisor;
    EXPECT_EQ(wrong, 0u) << divisor;
  }
}

Problem dense() {
  Problem p;
  p.dtype = DType::bfloat16;
  p.batch = 3;
  p.heads = 8;
  p.heads_k = 2;
  p.seqlen_q = 1000;
  p.seqlen_k = 777;
  p.d = 100;
  p.dv = 40;
  p.q = {reinterpret_cast<void*>(0x1000), 800000, 800, 100};
  p.k = {reinterpret_cast<void*>(0x2000), int64_t{1} << 33, 200, 100};
  p.v = {reinterpret_cast<void*>(0x3000), 0, 80, 40};
  p.o = {reinterpret_cast<void*>(0x4000), 320000, 320, 40};
  p.scale = 0.125f;
  return p;
}

const Row& a_row() { return rows()[0]; }

TEST(ForwardParams, CarryADenseProblem) {
  const Problem problem = dense();
  const ForwardParams p = forward_params(problem, a_row());
  EXPECT_EQ(p.q, problem.q.data);
  EXPECT_EQ(p.k_strides.batch, int64_t{1} << 33);
  EXPECT_EQ(p.v_strides.batch, 0);
  EXPECT_EQ(p.o_strides.row, 320);
  EXPECT_EQ(p.lse_batch, 8 * 1000);
  EXPECT_EQ(p.lse_head, 1000);
  EXPECT_EQ(p.heads.divisor, 8u);
  EXPECT_EQ(p.group.divisor, 4u);
  EXPECT_EQ(p.query_blocks, (1000 + a_row().Br - 1) / a_row().Br);
  EXPECT_EQ(p.section_blocks.divisor, p.section_heads.divisor * p.query_blocks);
  EXPECT_EQ(p.window_left, 1 << 30);
  EXPECT_EQ(p.window_right, 1 << 30);
  EXPECT_EQ(p.cu_seqlens_q, nullptr);
  EXPECT_EQ(p.aligned, 1);
}

TEST(ForwardParams, CarryAPackedProblem) {
  Problem problem = dense();
  const int32_t lengths[4] = {0, 1, 2, 3};
  problem.packed = true;
  problem.total_q = 1234;
  problem.q.batch = problem.k.batch = problem.v.batch = problem.o.batch = 0;
  problem.cu_seqlens_q = problem.cu_seqlens_k = lengths;
  const ForwardParams p = forward_params(problem, a_row());
  EXPECT_EQ(p.q_strides.batch, 0);
  EXPECT_EQ(p.lse_batch, 0);
  EXPECT_EQ(p.lse_head, 1234);
  EXPECT_EQ(p.cu_seqlens_q, lengths);
}

TEST(ForwardParams, WindowsAreAtMostUnbounded) {
  Problem problem = dense();
  problem.mask = {int64_t{1} << 40, 0};
  const ForwardParams p = forward_params(problem, a_row());
  EXPECT_EQ(p.window_left, 1 << 30);
  EXPECT_EQ(p.window_right, 0);
}

/// What the kernels make of one product q k, in base 2: see cuda/attn/score.h.
double score_of(const ForwardParams& p, double product) {
  double s = p.softcap_in != 0 ? std::tanh(product * p.softcap_in) : product;
  if (p.negative) s = -s;
  return s * p.factor;
}

TEST(ForwardParams, ScoresAreTheFormula) {
  for (const float scale : {0.125f, -0.3f, 0.0f, 2.0f})
    for (const float softcap : {0.0f, 30.0f, 0.5f}) {
      Problem problem = dense();
      problem.scale = scale;
      problem.softcap = softcap;
      const ForwardParams p = forward_params(problem, a_row());
      ASSERT_NE(p.factor, 0) << scale;
      for (const double product : {-50.0, -1.0, 0.0, 0.3, 200.0}) {
        double expected = scale * product;
        if (softcap > 0) expected = softcap * std::tanh(expected / softcap);
        EXPECT_NEAR(score_of(p, product), expected * std::log2(std::exp(1.0)), 1e-4)
            << "scale " << scale << " softcap " << softcap << " product " << product;
      }
      EXPECT_NEAR(p.alibi_factor * p.factor, std::log2(std::exp(1.0)), 1e-5);
    }
}

TEST(ForwardParams, SectionsHoldAtLeastOneHeadAndAtMostAll) {
  Problem problem = dense();
  problem.mask.right = 0;
  for (const int64_t seqlen : {1, 100, 100000, 50000000}) {
    problem.seqlen_k = seqlen;
    const ForwardParams p = forward_params(problem, a_row());
    EXPECT_GE(p.section_heads.divisor, 1u);
    EXPECT_LE(p.section_heads.divisor, 24u);
  }
}

} // namespace
} // namespace anyflash
