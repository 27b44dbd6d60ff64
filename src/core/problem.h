// The caller's problem after validation: one normal form that the plan, the GPU launch and the CPU
// backend read.
#pragma once

#include <cstdint>

#include "anyflash/anyflash.h"

namespace anyflash {

enum class DType : int32_t {
  float16 = ANYFLASH_FLOAT16,
  bfloat16 = ANYFLASH_BFLOAT16,
  float32 = ANYFLASH_FLOAT32,
  float64 = ANYFLASH_FLOAT64,
};

constexpr int64_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

/// A [batch, seqlen, heads, d] view: strides in elements, last dimension contiguous. Packed tensors
/// have batch = 0 here; their sequences start at row cu_seqlens[b].
struct View {
  void* data = nullptr;
  int64_t batch = 0;
  int64_t row = 0;
  int64_t head = 0;

  bool operator==(const View&) const = default;
};

/// The window around the diagonal, already combined with causal: query i sees keys j with
/// i + seqlen_k - seqlen_q - left <= j <= i + seqlen_k - seqlen_q + right.
struct Mask {
  /// Larger than any sequence, small enough that i + unbounded cannot overflow an int32 with i <
  /// 2^30.
  static constexpr int64_t unbounded = int64_t{1} << 30;
  int64_t left = unbounded;
  int64_t right = unbounded;

  bool operator==(const Mask&) const = default;
};

/// "forward": also what the table of kernels calls it.
constexpr const char* op_name(anyflash_op op) {
  return op == ANYFLASH_FORWARD ? "forward" : "backward";
}

struct Problem {
  anyflash_op op = ANYFLASH_FORWARD;
  DType dtype = DType::float32;
  int32_t device_type = ANYFLASH_CPU;
  int32_t device_index = 0;

  bool packed = false;
  int64_t batch = 0;                  // number of sequences
  int64_t heads = 0, heads_k = 0;     // heads is a multiple of heads_k
  int64_t seqlen_q = 0, seqlen_k = 0; // packed: the stated maxima
  int64_t total_q = 0, total_k = 0;   // packed: rows of q and of k; dense: batch * seqlen
  int64_t d = 0, dv = 0;

  View q, k, v, o;
  float* lse = nullptr; // dense [batch, heads, seqlen_q], packed [heads, total_q]; null: not wanted
  bool want_lse = false;

  // The backward; o and lse are inputs there.
  View dout, dq, dk, dv_out;   // dv_out: the gradient of v
  const float* dlse = nullptr; // like lse; null: 0
  bool has_dlse = false;
  bool deterministic = false; // of dq; all else always is

  const float* alibi_slopes =
      nullptr; // slope of head h in sequence b: alibi_slopes[b * alibi_batch + h]
  int64_t alibi_batch = 0;
  bool alibi = false;

  const int32_t* cu_seqlens_q = nullptr; // on the problem's device
  const int32_t* cu_seqlens_k = nullptr;
  const int32_t* seqused_q = nullptr; // null: every row is used
  const int32_t* seqused_k = nullptr;

  Mask mask;
  float scale = 1;
  float softcap = 0; // 0: off

  /// True when the rows of all [., d] tensors start on 16-byte boundaries, so that kernels may copy
  /// 16 bytes at a time.
  bool aligned = true;

  int64_t group() const { return heads / heads_k; }

  bool operator==(const Problem&) const = default;
};

/// Checks the caller's problem and brings it into normal form. Throws InvalidValue, InvalidType or
/// NotSupported, with the offending values; reads no tensor except cu_seqlens and seqused on the
/// CPU. Pointers may be null (planning).
Problem validate(const anyflash_problem& problem);

} // namespace anyflash
