// anyflash in C++20: a thin header over the C interface. Nothing here decides or allocates;
// failures are exceptions with the library's message.
//
//   using namespace anyflash;
//   Problem problem(tensor(q, ANYFLASH_FLOAT16, {2, 1024, 8, 64}, cuda()),
//                   tensor(k, ...), tensor(v, ...), tensor(o, ...));
//   problem.causal().softcap(30);
//   Plan plan(problem);
//   plan.run(problem, workspace, stream); // workspace: plan.workspace_bytes() bytes
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <stdexcept>
#include <string>

#include "anyflash/anyflash.h"

namespace anyflash {
inline namespace v1 {

/// A call failed: the kind of failure, and the library's message as what().
class Exception : public std::runtime_error {
public:
  Exception(anyflash_status status, const char* message)
      : std::runtime_error(message), status_(status) {}
  anyflash_status status() const noexcept { return status_; }

private:
  anyflash_status status_;
};

/// Throws Exception when a call did not succeed.
inline void check(anyflash_status status) {
  if (status != ANYFLASH_OK) throw Exception(status, anyflash_last_error());
}

/// Where a tensor lives: DLPack's device type and the index of the GPU.
struct Device {
  int32_t type = ANYFLASH_CPU;
  int32_t index = 0;
};
inline Device cpu() { return {ANYFLASH_CPU, 0}; }
inline Device cuda(int32_t index = 0) { return {ANYFLASH_CUDA, index}; }

/// Describes memory of the caller with any strides (in elements; the last must be 1).
inline anyflash_tensor strided_tensor(const void* data, anyflash_dtype dtype,
                                      std::span<const int64_t> shape,
                                      std::span<const int64_t> strides, Device device = cpu()) {
  if (shape.size() > 4 || strides.size() != shape.size())
    throw Exception(ANYFLASH_INVALID_VALUE, "a tensor has up to 4 dims, and a stride for each");
  anyflash_tensor result{};
  result.data = const_cast<void*>(data);
  result.dtype = dtype;
  result.device_type = device.type;
  result.device_index = device.index;
  result.ndim = static_cast<int32_t>(shape.size());
  for (size_t i = 0; i < shape.size(); ++i) {
    result.shape[i] = shape[i];
    result.strides[i] = strides[i];
  }
  return result;
}

/// Describes contiguous memory of the caller.
inline anyflash_tensor tensor(const void* data, anyflash_dtype dtype,
                              std::initializer_list<int64_t> shape, Device device = cpu()) {
  int64_t strides[4] = {};
  int64_t stride = 1;
  for (size_t i = shape.size(); i > 0; --i) {
    if (i <= 4) strides[i - 1] = stride;
    stride *= shape.begin()[i - 1];
  }
  return strided_tensor(data, dtype, {shape.begin(), shape.size()},
                        {strides, shape.size() <= 4 ? shape.size() : 0}, device);
}

/// What is to be computed; options return the problem, to be chained. See anyflash_problem.
class Problem {
public:
  /// q [B, N, H, d], k [B, M, Hk, d], v [B, M, Hk, dv], o [B, N, H, dv]; packed: without B. The
  /// scale is 1 / sqrt(d) until scale() says otherwise.
  Problem(const anyflash_tensor& q, const anyflash_tensor& k, const anyflash_tensor& v,
          const anyflash_tensor& o) {
    raw_.struct_size = sizeof raw_;
    raw_.op = ANYFLASH_FORWARD;
    raw_.q = q;
    raw_.k = k;
    raw_.v = v;
    raw_.o = o;
    raw_.window_left = raw_.window_right = -1;
    const int64_t d = q.ndim > 0 ? q.shape[q.ndim - 1] : 0;
    raw_.scale = d > 0 ? 1 / std::sqrt(static_cast<float>(d)) : 1;
  }

  /// Query i sees no key after i + M - N.
  Problem& causal(bool on = true) {
    raw_.causal = on;
    return *this;
  }
  /// Query i sees keys from `left` before i + M - N to `right` after it; -1: unbounded.
  Problem& window(int64_t left, int64_t right) {
    raw_.window_left = left;
    raw_.window_right = right;
    return *this;
  }
  Problem& scale(float value) {
    raw_.scale = value;
    return *this;
  }
  /// S = value tanh(S / value); 0: off.
  Problem& softcap(float value) {
    raw_.softcap = value;
    return *this;
  }
  /// float32 [H] or [B, H].
  Problem& alibi_slopes(const anyflash_tensor& slopes) {
    raw_.alibi_slopes = slopes;
    return *this;
  }
  /// L, the log-sum-exp of each row: float32 [B, H, N], packed [H, total_q].
  Problem& lse(const anyflash_tensor& output) {
    raw_.lse = output;
    return *this;
  }
  /// Sequences packed one after another: cu_seqlens int32 [B + 1], and bounds of their lengths.
  Problem& packed(const anyflash_tensor& cu_seqlens_q, const anyflash_tensor& cu_seqlens_k,
                  int64_t max_seqlen_q, int64_t max_seqlen_k) {
    raw_.cu_seqlens_q = cu_seqlens_q;
    raw_.cu_seqlens_k = cu_seqlens_k;
    raw_.max_seqlen_q = max_seqlen_q;
    raw_.max_seqlen_k = max_seqlen_k;
    return *this;
  }
  /// From now on the backward: o and lse() hold what the forward wrote, dout is the gradient of o;
  /// writes dq, dk, dv, shaped like q, k, v.
  Problem& gradients(const anyflash_tensor& dout, const anyflash_tensor& dq,
                     const anyflash_tensor& dk, const anyflash_tensor& dv) {
    raw_.op = ANYFLASH_BACKWARD;
    raw_.dout = dout;
    raw_.dq = dq;
    raw_.dk = dk;
    raw_.dv = dv;
    return *this;
  }
  /// The gradient of L, for gradients(): shaped like lse().
  Problem& lse_gradient(const anyflash_tensor& dlse) {
    raw_.dlse = dlse;
    return *this;
  }
  /// dQ the same bit for bit from run to run.
  Problem& deterministic(bool on = true) {
    raw_.deterministic = on;
    return *this;
  }
  /// Rows of each packed sequence that are used: int32 [B].
  Problem& used(const anyflash_tensor& seqused_q, const anyflash_tensor& seqused_k) {
    raw_.seqused_q = seqused_q;
    raw_.seqused_k = seqused_k;
    return *this;
  }

  const anyflash_problem& raw() const { return raw_; }

private:
  anyflash_problem raw_{};
};

/// A GPU of this compute capability (86) as planning sees it; it need not be here.
inline anyflash_device describe_gpu(int32_t compute_capability) {
  anyflash_device device{};
  device.struct_size = sizeof device;
  check(anyflash_describe_gpu(compute_capability, &device));
  return device;
}

/// Everything decided about a problem. Made once, run as often as problems of this shape come.
class Plan {
public:
  /// For the device that q lives on.
  explicit Plan(const Problem& problem) : Plan(problem, nullptr) {}
  Plan(const Problem& problem, const anyflash_device& device) : Plan(problem, &device) {}

  /// Bytes that run() needs on the plan's device, aligned to 256.
  uint64_t workspace_bytes() const { return raw_.workspace_bytes; }

  /// Computes the outputs: on the CPU before it returns, on a GPU in the order of the stream.
  void run(const Problem& problem, void* workspace = nullptr, void* stream = nullptr) const {
    check(anyflash_run(&raw_, &problem.raw(), workspace, stream));
  }
  /// Loads the kernels, so that the first run() is fast and may be captured in a graph.
  void warm_up() const { check(anyflash_warm_up(&raw_)); }

  const anyflash_plan& raw() const { return raw_; }

private:
  Plan(const Problem& problem, const anyflash_device* device) {
    raw_.struct_size = sizeof raw_;
    check(anyflash_make_plan(&problem.raw(), device, &raw_));
  }
  anyflash_plan raw_{};
};

/// The oracle: plain attention in double, on the CPU.
inline void reference(const Problem& problem) { check(anyflash_reference(&problem.raw())); }

namespace detail {
/// Calls a function of the C interface that writes text: once for its size, once for the text.
template <class Write>
std::string text_of(Write write) {
  size_t needed = 0;
  check(write(nullptr, size_t{0}, &needed));
  std::string text(needed, '\0');
  check(write(text.data(), text.size(), &needed));
  text.resize(needed > 0 ? needed - 1 : 0);
  return text;
}
} // namespace detail

/// The plan of a problem in words: row, grid, shared memory, flops, bytes, the machine's floor.
inline std::string explain(const Problem& problem) {
  return detail::text_of([&](char* text, size_t capacity, size_t* needed) {
    return anyflash_explain(&problem.raw(), nullptr, text, capacity, needed);
  });
}

/// Driver, GPUs, CPU features, compiler, caches and archives as JSON.
inline std::string environment() { return detail::text_of(anyflash_environment); }

/// The table of kernels as JSON.
inline std::string rows() { return detail::text_of(anyflash_rows); }

} // namespace v1
} // namespace anyflash
