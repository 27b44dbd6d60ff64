// A case of the list in memory, as a problem.
#pragma once

#include <string>
#include <vector>

#include "cases.h"
#include "core/problem.h"

namespace anyflash {

/// A tensor in one of the list's layouts. What belongs to no element is NaN.
struct Strided {
  DType dtype;
  int64_t batch, rows, heads, d; // packed: batch 1
  int64_t offset;
  View strides;
  std::vector<unsigned char> bytes;

  Strided(DType dtype, int64_t batch, int64_t rows, int64_t heads, int64_t d,
          const std::string& layout);

  double get(int64_t element) const;
  void set(int64_t element, double value); // rounds to dtype
  int64_t elements() const { return static_cast<int64_t>(bytes.size()) / size_of(dtype); }
  int64_t at(int64_t b, int64_t row, int64_t head, int64_t e) const {
    return offset + b * strides.batch + row * strides.row + head * strides.head + e;
  }
  std::vector<double> values() const; // in order of batch, row, head, e
  View view();                        // as problems have it
};

/// The nearest value of the dtype.
double rounded(double x, DType dtype);

/// A case with inputs of one dtype and poisoned outputs.
struct CaseProblem {
  /// The inputs have values that `values_of` holds exactly, stored as `dtype`.
  CaseProblem(const Case& the_case, DType dtype, DType values_of);
  CaseProblem(const Case& the_case, DType dtype) : CaseProblem(the_case, dtype, dtype) {}

  /// The problem on these tensors: valid while this object stays where it is.
  Problem problem();

  /// The backward on these tensors; o and lse must hold what a forward wrote.
  Problem backward_problem();

  /// NaN into O and L, and into the gradients.
  void poison();
  void poison_gradients();

  /// True if memory of O or of a gradient that belongs to no element was written.
  bool overwritten() const;

  Case test_case;
  DType dtype;
  Strided q, k, v, o;
  Strided dout, dq, dk, dv;
  std::vector<float> lse, dlse, slopes;
  std::vector<int32_t> cu_q, cu_k;
};

std::string name_of(DType dtype);

} // namespace anyflash
