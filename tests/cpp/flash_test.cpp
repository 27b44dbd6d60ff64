// The tiled algorithm against the reference: every case of the list, every dtype, every instruction
// set that this machine can run.
#include <gtest/gtest.h>

#include <cmath>

#include "core/error.h"
#include "cpu/cpu.h"
#include "cpu_cases.h"
#include "scoped_env.h"

namespace anyflash {
namespace {

/// Runs a case with one instruction set. Outputs start as NaN.
void run(CaseProblem& c, const std::string& instruction_set) {
  const ScopedEnv chosen("ANYFLASH_CPU", instruction_set.c_str());
  c.poison();
  const Problem problem = c.problem();
  cpu::forward(problem, cpu::tiling(problem));
}

void expect_the_rule(const Case& c, DType dtype) {
  expect_the_rule(c, dtype, expected(c, dtype), run);
}

class CaseList : public testing::TestWithParam<CaseAndDType> {};

TEST_P(CaseList, MeetsTheRule) {
  const auto& [c, dtype] = GetParam();
  expect_the_rule(c, dtype);
}

INSTANTIATE_TEST_SUITE_P(Cpu, CaseList, in_every_dtype(cases()), suite_name);

/// Lengths around every multiple that the tiles have.
TEST(Shapes, LengthsAroundTheTiles) {
  const int lengths[] = {1,  2,  5,  6,  7,  11,  12,  13,  23,  24,  25,
                         31, 47, 63, 64, 65, 127, 128, 129, 191, 193, 257};
  int turn = 0;
  for (int q : lengths)
    for (int k : lengths) {
      if (++turn % 5) continue; // a fifth of the pairs, all lengths
      Case c = make_case("lengths", 24, q, k, 2);
      c.causal = turn % 2;
      if (turn % 3 == 0) c.window_left = k / 3;
      expect_the_rule(c, DType::float32);
    }
}

TEST(Shapes, EveryHeadDim) {
  for (int d = 1; d <= 256; d += d < 40 ? 1 : 9)
    for (DType dtype : {DType::float32, DType::bfloat16}) {
      Case c = make_case("head dims", d, 9, 37, 2);
      c.dv = d % 3 ? d : 257 - d;
      expect_the_rule(c, dtype);
    }
}

/// O and L of a problem as bytes.
std::string bytes_of(const CaseProblem& c) {
  std::string bytes(c.o.bytes.begin(), c.o.bytes.end());
  return bytes.append(reinterpret_cast<const char*>(c.lse.data()), c.lse.size() * sizeof(float));
}

TEST(Splits, LongKeysAreSplitAndMeetTheRule) {
  for (bool causal : {false, true}) {
    Case c = make_case("split keys", 64, 1, 4100, 2);
    c.causal = causal;
    ASSERT_GT(cpu::tiling(CaseProblem(c, DType::float32).problem()).splits, 1);
    expect_the_rule(c, DType::float32);
  }
}

TEST(Splits, AnyNumberMeetsTheRule) {
  Case c = make_case("any splits", 40, 30, 1500, 2);
  c.q = 1400;
  c.heads = c.heads_k = 1;
  c.window_left = 300;
  c.window_right = 0;
  for (DType dtype : {DType::float32, DType::float16}) {
    const Expected wanted = expected(c, dtype);
    CaseProblem computed(c, dtype);
    for (int splits : {1, 2, 3, 5, 32}) {
      computed.poison();
      const Problem problem = computed.problem();
      cpu::Tiling tiling = cpu::tiling(problem);
      tiling.splits = splits;
      cpu::forward(problem, tiling);
      EXPECT_EQ(violation(computed, wanted), "") << splits << " splits";
    }
  }
}

TEST(Reproducible, BitEqualForAnyNumberOfThreads) {
  for (int k : {300, 3000}) {
    Case c = make_case("threads", 64, 200, k, 2);
    c.causal = true;
    c.heads = 4;
    CaseProblem computed(c, DType::float32);
    std::string first;
    for (const char* threads : {"1", "2", "3", "7", "16"}) {
      const ScopedEnv number("ANYFLASH_NUM_THREADS", threads);
      run(computed, cpu::instruction_sets().front());
      if (first.empty()) first = bytes_of(computed);
      EXPECT_EQ(bytes_of(computed), first) << threads << " threads";
    }
  }
}

TEST(Reproducible, PackedAndDenseAgreeBitForBit) {
  Case dense = make_case("same", 72, 130, 700, 2);
  dense.heads = 4;
  dense.heads_k = 2;
  dense.causal = true;
  dense.batch = 2;
  CaseProblem a(dense, DType::float32);
  Case packed = dense;
  packed.packed = {{130, 700}, {130, 700}};
  CaseProblem b(packed, DType::float32);
  copy_to_packed(a.q, b.q);
  copy_to_packed(a.k, b.k);
  copy_to_packed(a.v, b.v);
  for (const std::string& name : tested_instruction_sets()) {
    run(a, name);
    run(b, name);
    expect_same(a.o, b.o);
    for (int64_t n = 0; n < 260; ++n)
      for (int64_t h = 0; h < 4; ++h)
        ASSERT_EQ(a.lse[(n / 130 * 4 + h) * 130 + n % 130], b.lse[h * b.o.rows + n]) << name;
  }
}

TEST(Invariants, PermutingKeysChangesNothing) {
  const Case c = make_case("permuted", 64, 40, 300, 2);
  CaseProblem a(c, DType::float32), b(c, DType::float32);
  for (int64_t j = 0; j < 300; ++j)
    for (int64_t h = 0; h < 2; ++h)
      for (int64_t e = 0; e < 64; ++e) {
        const int64_t from = j * 7 % 300;
        b.k.set(b.k.at(0, j, h, e), a.k.get(a.k.at(0, from, h, e)));
        b.v.set(b.v.at(0, j, h, e), a.v.get(a.v.at(0, from, h, e)));
      }
  run(a, cpu::instruction_sets().front());
  run(b, cpu::instruction_sets().front());
  for (int64_t i = 0; i < a.o.elements(); ++i)
    if (!std::isnan(a.o.get(i))) ASSERT_NEAR(a.o.get(i), b.o.get(i), 2e-6);
}

TEST(InputNaN, ReachesTheRowsThatSeeIt) {
  Case c = make_case("nan", 32, 50, 50, 2);
  c.causal = true;
  CaseProblem computed(c, DType::float32);
  computed.k.set(computed.k.at(0, 30, 1, 3), NAN);
  for (const std::string& name : tested_instruction_sets()) {
    run(computed, name);
    for (int64_t i = 0; i < 50; ++i) {
      EXPECT_FALSE(std::isnan(computed.o.get(computed.o.at(0, i, 0, 0)))) << name;
      EXPECT_EQ(std::isnan(computed.o.get(computed.o.at(0, i, 1, 0))), i >= 30) << name << i;
      EXPECT_EQ(std::isnan(computed.lse[50 + i]), i >= 30) << name << i;
    }
  }
}

TEST(InstructionSet, IsTheBestUnlessForced) {
  const ScopedEnv none("ANYFLASH_CPU", nullptr);
  EXPECT_EQ(cpu::instruction_set(), cpu::instruction_sets().front());
  EXPECT_EQ(cpu::instruction_sets().back(), "scalar");
  for (const std::string& name : cpu::instruction_sets()) {
    const ScopedEnv forced("ANYFLASH_CPU", name.c_str());
    EXPECT_EQ(cpu::instruction_set(), name);
  }
}

TEST(InstructionSet, UnknownOneIsRefusedWithTheNamesOfWhatThereIs) {
  const ScopedEnv forced("ANYFLASH_CPU", "avx1024");
  try {
    cpu::instruction_set();
    FAIL() << "not refused";
  } catch (const InvalidValue& error) {
    EXPECT_NE(std::string(error.what()).find("avx1024"), std::string::npos);
    EXPECT_NE(std::string(error.what()).find("scalar"), std::string::npos);
  }
}

} // namespace
} // namespace anyflash
