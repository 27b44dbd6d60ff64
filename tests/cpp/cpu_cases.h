// What the tests of the CPU backend's two tiled algorithms share.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <tuple>
#include <vector>

#include "accuracy.h"
#include "cpu/cpu.h"

namespace anyflash {

/// What this machine can run; under emulation, which is slow, the one that it is there for.
inline std::vector<std::string> tested_instruction_sets() {
#if defined(ANYFLASH_EMULATED)
  return {cpu::instruction_sets().front()};
#else
  return cpu::instruction_sets();
#endif
}

/// The parameter of a suite: INSTANTIATE_TEST_SUITE_P(Cpu, Suite, in_every_dtype(...), suite_name).
using CaseAndDType = std::tuple<Case, DType>;

inline auto in_every_dtype(const std::vector<Case>& cases) {
  return testing::Combine(testing::ValuesIn(cases),
                          testing::Values(DType::float32, DType::bfloat16, DType::float16));
}

inline std::string suite_name(const testing::TestParamInfo<CaseAndDType>& info) {
  const auto& [c, dtype] = info.param;
  return test_name(c.name) + "_" + name_of(dtype);
}

/// Computes a case with every instruction set. run(CaseProblem&, instruction set) poisons the
/// outputs and writes them.
template <class Wanted, class Run>
void expect_the_rule(const Case& c, DType dtype, const Wanted& wanted, Run run) {
  CaseProblem computed(c, dtype);
  for (const std::string& name : tested_instruction_sets()) {
    run(computed, name);
    EXPECT_EQ(violation(computed, wanted), "")
        << name << " q " << c.q << " k " << c.k << " d " << c.d << " dv " << c.dv;
  }
}

// The same sequences, dense and packed without rows between them.

/// Calls visit(element of the dense tensor, element of the packed one).
template <class Visit>
void for_each_pair(const Strided& dense, const Strided& packed, Visit visit) {
  for (int64_t n = 0; n < dense.batch * dense.rows; ++n)
    for (int64_t h = 0; h < dense.heads; ++h)
      for (int64_t e = 0; e < dense.d; ++e)
        visit(dense.at(n / dense.rows, n % dense.rows, h, e), packed.at(0, n, h, e));
}

inline void copy_to_packed(const Strided& dense, Strided& packed) {
  for_each_pair(dense, packed, [&](int64_t from, int64_t to) { packed.set(to, dense.get(from)); });
}

inline void expect_same(const Strided& dense, const Strided& packed) {
  for_each_pair(dense, packed,
                [&](int64_t a, int64_t b) { ASSERT_EQ(dense.get(a), packed.get(b)); });
}

} // namespace anyflash
