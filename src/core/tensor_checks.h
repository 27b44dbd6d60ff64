// What is checked of one tensor, and the words for it. Each check throws with the tensor's name and
// the offending values.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "core/problem.h"

namespace anyflash {

/// A tensor and the name that its owner knows it by.
struct Named {
  const anyflash_tensor& tensor;
  const char* name;

  bool present() const { return tensor.ndim != 0; }
  int64_t size(int dim) const { return tensor.shape[dim]; }
};

/// "cuda:0"
std::string device_name(const anyflash_tensor& tensor);
/// "float16"
std::string dtype_name(int32_t dtype);
inline std::string dtype_name(DType dtype) { return dtype_name(static_cast<int32_t>(dtype)); }
/// "[2, 8]"
std::string list(std::span<const int64_t> values);

std::span<const int64_t> shape_of(const anyflash_tensor& tensor);
std::span<const int64_t> strides_of(const anyflash_tensor& tensor);
int64_t bytes_of_element(const anyflash_tensor& tensor);

/// shape, meaning: what it must be, in words: "[batch, heads]".
void check_present(const Named& named, const char* shape);
void check_rank(const Named& named, int rank, const char* shape);
void check_shape(const Named& named, std::span<const int64_t> wanted, const std::string& meaning);
void check_same_device(const Named& named, const Named& q);
void check_same_dtype(const Named& named, const Named& q);
void check_dtype(const Named& named, int32_t dtype);
void check_last_dim_contiguous(const Named& named);
void check_contiguous(const Named& named);

/// Outputs: every element has its own memory, and shares it with no other tensor. others: what the
/// other one is of, in words: "inputs".
void check_written_once(const Named& named);
void check_apart(const Named& output, const Named& other, const char* others);

} // namespace anyflash
