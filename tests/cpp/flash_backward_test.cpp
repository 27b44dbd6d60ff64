// The tiled backward against the reference: every case of the list, every dtype, every instruction
// set that this machine can run.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "core/error.h"
#include "cpu/cpu.h"
#include "cpu_cases.h"
#include "scoped_env.h"

namespace anyflash {
namespace {

/// Products of one number with another that the cases may need where everything is slow.
#if defined(ANYFLASH_EMULATED) || defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int64_t most_products = 3'000'000;
#else
constexpr int64_t most_products = std::numeric_limits<int64_t>::max();
#endif

std::vector<Case> tested_cases() {
  std::vector<Case> chosen;
  for (const Case& c : cases())
    if (int64_t{c.batch} * c.heads * c.q * c.k * (c.d + c.dv) <= most_products) chosen.push_back(c);
  return chosen;
}

/// Forward and backward of a case with one instruction set. Outputs start as NaN.
void run(CaseProblem& c, const std::string& instruction_set) {
  const ScopedEnv chosen("ANYFLASH_CPU", instruction_set.c_str());
  c.poison();
  const Problem forward = c.problem(), backward = c.backward_problem();
  cpu::forward(forward, cpu::tiling(forward));
  cpu::backward(backward, cpu::tiling(backward));
}

void expect_the_rule(const Case& c, DType dtype) {
  expect_the_rule(c, dtype, expected_gradients(c, dtype), run);
}

class BackwardCases : public testing::TestWithParam<CaseAndDType> {};

TEST_P(BackwardCases, MeetsTheRule) {
  const auto& [c, dtype] = GetParam();
  expect_the_rule(c, dtype);
}

INSTANTIATE_TEST_SUITE_P(Cpu, BackwardCases, in_every_dtype(tested_cases()), suite_name);

/// Lengths around every multiple that the tiles have.
TEST(BackwardShapes, LengthsAroundTheTiles) {
  const int lengths[] = {1, 2, 5, 6, 7, 12, 13, 31, 47, 95, 96, 97, 112, 191, 193};
  int turn = 0;
  for (int q : lengths)
    for (int k : lengths) {
      if (++turn % 4) continue; // a quarter of the pairs, all lengths
      Case c = make_case("lengths", 24, q, k, 2);
      c.causal = turn % 8 == 0;
      if (turn % 3 == 0) c.window_left = k / 3;
      expect_the_rule(c, DType::float32);
    }
}

TEST(BackwardShapes, EveryHeadDim) {
  for (int d = 1; d <= 256; d += d < 40 ? 3 : 27)
    for (DType dtype : {DType::float32, DType::bfloat16}) {
      Case c = make_case("head dims", d, 9, 37, 2);
      c.dv = d % 2 ? d : 257 - d;
      expect_the_rule(c, dtype);
    }
}

/// dQ, dK and dV as bytes.
std::string bytes_of(const CaseProblem& c) {
  std::string bytes;
  for (const Strided* x : {&c.dq, &c.dk, &c.dv}) bytes.append(x->bytes.begin(), x->bytes.end());
  return bytes;
}

/// Heads that share a key head, rows that see nothing, and a split in the middle of a head.
Case case_to_split() {
  Case c = make_case("any splits", 40, 500, 300, 2);
  c.heads = 3;
  c.heads_k = 1;
  c.causal = true;
  c.window_left = 120;
  return c;
}

TEST(BackwardSplits, FewKeyHeadsSplitTheirQueries) {
  Case c = case_to_split();
  EXPECT_GT(cpu::tiling(CaseProblem(c, DType::float32).backward_problem()).splits, 1);
  c.heads = c.heads_k = 64;
  EXPECT_EQ(cpu::tiling(CaseProblem(c, DType::float32).backward_problem()).splits, 1);
}

TEST(BackwardSplits, AnyNumberMeetsTheRule) {
  const Case c = case_to_split();
  for (DType dtype : {DType::float32, DType::float16}) {
    const ExpectedGradients wanted = expected_gradients(c, dtype);
    CaseProblem computed(c, dtype);
    const Problem forward = computed.problem(), backward = computed.backward_problem();
    cpu::forward(forward, cpu::tiling(forward));
    for (int splits : {1, 2, 3, 7, 16, 100}) {
      for (Strided* x : {&computed.dq, &computed.dk, &computed.dv})
        for (int64_t i = 0; i < x->elements(); ++i) x->set(i, NAN);
      cpu::Tiling tiling = cpu::tiling(backward);
      tiling.splits = splits;
      cpu::backward(backward, tiling);
      EXPECT_EQ(violation(computed, wanted), "") << splits << " splits";
    }
  }
}

TEST(BackwardReproducible, BitEqualForAnyNumberOfThreads) {
  for (Case c : {case_to_split(), make_case("heads", 64, 200, 150, 2)}) {
    CaseProblem computed(c, DType::float32);
    std::string first;
    for (const char* threads : {"1", "2", "3", "7", "16", "2"}) {
      const ScopedEnv number("ANYFLASH_NUM_THREADS", threads);
      run(computed, cpu::instruction_sets().front());
      if (first.empty()) first = bytes_of(computed);
      EXPECT_EQ(bytes_of(computed), first) << c.name << ", " << threads << " threads";
    }
  }
}

TEST(BackwardReproducible, PackedAndDenseAgreeBitForBit) {
  Case dense = make_case("same", 72, 130, 200, 2);
  dense.heads = 4;
  dense.heads_k = 2;
  dense.causal = true;
  dense.batch = 2;
  CaseProblem a(dense, DType::float32);
  Case packed = dense;
  packed.packed = {{130, 200}, {130, 200}};
  CaseProblem b(packed, DType::float32);
  copy_to_packed(a.q, b.q);
  copy_to_packed(a.k, b.k);
  copy_to_packed(a.v, b.v);
  copy_to_packed(a.dout, b.dout);
  for (int64_t n = 0; n < 260; ++n)
    for (int64_t h = 0; h < 4; ++h)
      b.dlse[h * b.q.rows + n] = a.dlse[(n / 130 * 4 + h) * 130 + n % 130];
  for (const std::string& name : tested_instruction_sets()) {
    run(a, name);
    run(b, name);
    expect_same(a.dq, b.dq);
    expect_same(a.dk, b.dk);
    expect_same(a.dv, b.dv);
  }
}

TEST(BackwardGradientOfLse, NoneIsZero) {
  CaseProblem c(make_case("no dlse", 32, 70, 90, 2), DType::float32);
  std::fill(c.dlse.begin(), c.dlse.end(), 0.0f);
  run(c, cpu::instruction_sets().front());
  const std::string with_zeros = bytes_of(c);
  Problem p = c.backward_problem();
  p.dlse = nullptr;
  cpu::backward(p, cpu::tiling(p));
  EXPECT_EQ(bytes_of(c), with_zeros);
}

/// What a loss does with L = -inf may well be no number.
TEST(BackwardGradientOfLse, DoesNotMatterWhereARowSeesNothing) {
  Case shape = make_case("empty rows", 32, 70, 40, 2);
  shape.causal = true; // queries 0 to 29 see nothing
  const ExpectedGradients wanted = expected_gradients(shape, DType::float32);
  CaseProblem c(shape, DType::float32);
  for (int64_t h = 0; h < 2; ++h)
    for (int64_t i = 0; i < 30; ++i) c.dlse[h * 70 + i] = NAN;
  for (const std::string& name : tested_instruction_sets()) {
    run(c, name);
    EXPECT_EQ(violation(c, wanted), "") << name;
    for (int64_t i = 0; i < 30; ++i) EXPECT_EQ(c.dq.get(c.dq.at(0, i, 0, 0)), 0);
  }
}

TEST(BackwardOfNothing, WritesZeros) {
  for (const auto& [q, k] : {std::pair{0, 50}, {50, 0}}) {
    CaseProblem c(make_case("nothing", 16, q, k, 2), DType::float32);
    run(c, cpu::instruction_sets().front());
    int64_t zeros = 0;
    for (const Strided* x : {&c.dq, &c.dk, &c.dv})
      for (int64_t i = 0; i < x->elements(); ++i) zeros += x->get(i) == 0;
    EXPECT_EQ(zeros, (q + 2 * k) * 2 * 16);
    EXPECT_FALSE(c.overwritten());
  }
}

TEST(BackwardDType, Float64IsOfTheReference) {
  CaseProblem c(make_case("double", 8, 4, 4, 2), DType::float64);
  const Problem p = c.backward_problem();
  EXPECT_THROW(cpu::backward(p, cpu::tiling(p)), NotSupported);
}

} // namespace
} // namespace anyflash
