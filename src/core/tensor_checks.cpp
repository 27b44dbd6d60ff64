#include "core/tensor_checks.h"

#include <algorithm>

#include "core/error.h"
#include "core/overlap.h"

namespace anyflash {

using std::to_string;

namespace {

std::string with_shape(const Named& named) {
  return std::string(named.name) + " of shape " + list(shape_of(named.tensor));
}

bool is_empty(const Named& named) {
  return std::ranges::any_of(shape_of(named.tensor), [](int64_t size) { return size == 0; });
}

bool is_contiguous(const anyflash_tensor& tensor) {
  int64_t expected = 1;
  for (int dim = tensor.ndim - 1; dim >= 0; --dim) {
    if (tensor.shape[dim] > 1 && tensor.strides[dim] != expected) return false;
    expected *= tensor.shape[dim];
  }
  return true;
}

} // namespace

// Words

std::string dtype_name(int32_t dtype) {
  switch (dtype) {
  case ANYFLASH_FLOAT16:
    return "float16";
  case ANYFLASH_BFLOAT16:
    return "bfloat16";
  case ANYFLASH_FLOAT32:
    return "float32";
  case ANYFLASH_FLOAT64:
    return "float64";
  case ANYFLASH_INT32:
    return "int32";
  }
  return "unknown (" + to_string(dtype) + ")";
}

std::string device_name(const anyflash_tensor& tensor) {
  if (tensor.device_type == ANYFLASH_CPU) return "cpu";
  if (tensor.device_type == ANYFLASH_CUDA) return "cuda:" + to_string(tensor.device_index);
  return "device type " + to_string(tensor.device_type);
}

std::string list(std::span<const int64_t> values) {
  std::string text = "[";
  for (size_t i = 0; i < values.size(); ++i) text += (i ? ", " : "") + to_string(values[i]);
  return text + "]";
}

std::span<const int64_t> shape_of(const anyflash_tensor& tensor) {
  return {tensor.shape, static_cast<size_t>(tensor.ndim)};
}

std::span<const int64_t> strides_of(const anyflash_tensor& tensor) {
  return {tensor.strides, static_cast<size_t>(tensor.ndim)};
}

// Single tensors

void check_present(const Named& named, const char* shape) {
  if (!named.present())
    throw InvalidValue(std::string(named.name) + " is missing; it must be a tensor of shape " +
                       shape);
}

void check_rank(const Named& named, int rank, const char* shape) {
  const int has = named.tensor.ndim;
  if (has != rank)
    throw InvalidValue(std::string(named.name) + " has rank " + to_string(has) +
                       (has >= 1 && has <= 4 ? " (" + list(shape_of(named.tensor)) + ")" : "") +
                       "; it must have rank " + to_string(rank) + ": " + shape);
  for (int dim = 0; dim < rank; ++dim)
    if (named.size(dim) < 0)
      throw InvalidValue(with_shape(named) + " has a negative size; sizes must be 0 or more");
}

void check_shape(const Named& named, std::span<const int64_t> wanted, const std::string& meaning) {
  if (!std::ranges::equal(shape_of(named.tensor), wanted))
    throw InvalidValue(std::string(named.name) + " has shape " + list(shape_of(named.tensor)) +
                       "; it must be " + meaning + " = " + list(wanted));
}

void check_same_device(const Named& named, const Named& q) {
  if (named.tensor.device_type != q.tensor.device_type ||
      named.tensor.device_index != q.tensor.device_index)
    throw InvalidType(std::string(q.name) + " is on " + device_name(q.tensor) + " but " +
                      named.name + " is on " + device_name(named.tensor) +
                      "; all tensors must be on one device: move " + named.name + " to " +
                      device_name(q.tensor));
}

void check_same_dtype(const Named& named, const Named& q) {
  if (named.tensor.dtype != q.tensor.dtype)
    throw InvalidType(std::string(q.name) + " has dtype " + dtype_name(q.tensor.dtype) + " but " +
                      named.name + " has dtype " + dtype_name(named.tensor.dtype) +
                      "; q, k, v and the output must have one dtype: convert " + named.name);
}

void check_dtype(const Named& named, int32_t dtype) {
  if (named.tensor.dtype != dtype)
    throw InvalidType(std::string(named.name) + " has dtype " + dtype_name(named.tensor.dtype) +
                      "; it must be " + dtype_name(dtype));
}

void check_last_dim_contiguous(const Named& named) {
  if (is_empty(named)) return;
  const int last = named.tensor.ndim - 1;
  if (named.size(last) > 1 && named.tensor.strides[last] != 1)
    throw InvalidValue(std::string(named.name) + " has stride " +
                       to_string(named.tensor.strides[last]) +
                       " in its last dimension; that dimension must be contiguous (stride 1): "
                       "copy " +
                       named.name + " to a contiguous tensor first");
}

void check_contiguous(const Named& named) {
  if (!is_empty(named) && !is_contiguous(named.tensor))
    throw InvalidValue(std::string(named.name) + " has strides " + list(strides_of(named.tensor)) +
                       " for shape " + list(shape_of(named.tensor)) +
                       "; it must be contiguous: copy it first");
}

void check_written_once(const Named& named) {
  if (is_empty(named)) return;
  for (int dim = 0; dim < named.tensor.ndim; ++dim)
    if (named.size(dim) > 1 && named.tensor.strides[dim] == 0)
      throw InvalidValue(std::string(named.name) + " has stride 0 in dimension " + to_string(dim) +
                         " of size " + to_string(named.size(dim)) +
                         "; every element of an output must have its own memory");
  if (may_share_memory_with_itself(named.tensor, bytes_of_element(named.tensor)))
    throw InvalidValue(std::string(named.name) + " of shape " + list(shape_of(named.tensor)) +
                       " and strides " + list(strides_of(named.tensor)) +
                       " may hold one element twice; every element of an output must have its own "
                       "memory");
}

int64_t bytes_of_element(const anyflash_tensor& tensor) {
  return tensor.dtype == ANYFLASH_INT32 ? 4 : size_of(static_cast<DType>(tensor.dtype));
}

void check_apart(const Named& output, const Named& other, const char* others) {
  if (other.present() && may_overlap(output.tensor, bytes_of_element(output.tensor), other.tensor,
                                     bytes_of_element(other.tensor)))
    throw InvalidValue(std::string(output.name) + " shares memory with " + other.name +
                       "; outputs must not overlap " + others + ": give it memory of its own");
}

} // namespace anyflash
