// The rule that a result must meet: tests/README.md.
#pragma once

#include <string>
#include <vector>

#include "case_problem.h"

namespace anyflash {

/// What a result is compared with: the oracle, and how far the standard computation in the dtype
/// (every product's result rounded to it) is from it.
struct Expected {
  struct Tensor {
    std::vector<double> ref; // in order of batch, row, head, e
    double standard_error = 0, standard_rms = 0;
    double floor = 8 * 0x1p-23, rms_floor = 1e-7; // of float32; the rms floor of every dtype
  };
  Tensor o;
  std::vector<float> lse;
};

struct ExpectedGradients {
  Expected::Tensor dq, dk, dv;
};

Expected expected(const Case& the_case, DType dtype);
ExpectedGradients expected_gradients(const Case& the_case, DType dtype);

/// Empty if the outputs of `computed` meet the rule of tests/README.md, else one line: what is off,
/// and where.
std::string violation(const CaseProblem& computed, const Expected& expected);
std::string violation(const CaseProblem& computed, const ExpectedGradients& expected);

} // namespace anyflash
