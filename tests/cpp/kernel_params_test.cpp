// Problem -> the kernels' parameters: divisors against integer division, strides, windows, the
// score's factors.
#include "core/kernel_params.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <stdexcept>
#include <vector>

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

const Row& a_backward_row() {
  for (const Row& row : rows())
    if (row.op == "backward" && row.d == 128) return row;
  throw std::logic_error("the table has no row of the backward for d 128");
}

Problem dense_backward() {
  Problem p = dense();
  p.op = ANYFLASH_BACKWARD;
  p.dout = {reinterpret_cast<void*>(0x5000), 1, 2, 3};
  p.dq = {reinterpret_cast<void*>(0x6000), 4, 5, 6};
  p.dk = {reinterpret_cast<void*>(0x7000), 7, 8, 9};
  p.dv_out = {reinterpret_cast<void*>(0x8000), 10, 11, 12};
  return p;
}

TEST(BackwardParams, CarryTheGradientsAndTheirPlaceInTheWorkspace) {
  Problem problem = dense_backward();
  const Row& row = a_backward_row();
  const auto base = reinterpret_cast<void*>(0x100000);
  const BackwardParams p = backward_params(problem, row, base, false);
  EXPECT_EQ(p.dout, problem.dout.data);
  EXPECT_EQ(p.dv_out, problem.dv_out.data);
  EXPECT_EQ(p.dq_strides.row, 5);
  EXPECT_EQ(p.dk_strides.head, 9);
  const auto key_blocks = static_cast<uint32_t>((777 + row.Bc - 1) / row.Bc);
  EXPECT_EQ(p.key_heads.divisor, 2u);
  EXPECT_EQ(p.key_section.divisor, 1u);
  EXPECT_EQ(p.key_section_blocks.divisor, key_blocks);
  EXPECT_EQ(p.padded_rows, 3 * ((1000 + row.Br - 1) / row.Br * row.Br));
  EXPECT_EQ(p.scale, 0.125f);
  EXPECT_EQ(p.dq_sum, base);
  EXPECT_EQ(p.turns, nullptr);
  problem.deterministic = true;
  const BackwardParams ordered = backward_params(problem, row, base, true);
  EXPECT_EQ(ordered.key_section.divisor, 6u); // all heads of all sequences
  EXPECT_EQ(ordered.key_section_blocks.divisor, 6 * key_blocks);
  const BackwardWorkspace layout = backward_workspace(problem, row);
  EXPECT_EQ(reinterpret_cast<char*>(ordered.turns) - static_cast<char*>(base),
            static_cast<int64_t>(layout.turns));
  EXPECT_EQ(reinterpret_cast<char*>(p.row_stats) - static_cast<char*>(base),
            static_cast<int64_t>(layout.row_stats));
}

TEST(BackwardParams, NoTwoPackedSequencesShareABlockOfTheWorkspace) {
  Problem problem = dense_backward();
  problem.packed = true;
  problem.batch = 4;
  const int Br = a_backward_row().Br;
  // The kernels' own arithmetic: sequence b starts at block cu_seqlens[b] / Br + b.
  for (const std::vector<int32_t>& lengths : {std::vector<int32_t>{0, 1, 2, 3, 4},
                                              {0, 0, 0, 0, 0},
                                              {0, Br, 2 * Br, 3 * Br, 4 * Br},
                                              {0, Br - 1, 2 * Br - 2, 2 * Br - 1, 7 * Br + 1},
                                              {0, 5, 5, 6 * Br + 5, 6 * Br + 6}}) {
    problem.total_q = lengths.back();
    int64_t end = 0;
    for (int32_t b = 0; b < 4; ++b) {
      const int64_t first = lengths[b] / Br + b;
      EXPECT_GE(first, end);
      end = first + (lengths[b + 1] - lengths[b] + Br - 1) / Br;
    }
    EXPECT_LE(end * Br, padded_rows(problem, Br));
  }
}

} // namespace
} // namespace anyflash
