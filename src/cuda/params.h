// Kernel parameters: the one struct that the core fills and the kernels read. Fixed-width types
// only; compiled by the host compiler and by NVRTC. Offsets are asserted on both sides.
#pragma once

#if defined(__CUDACC_RTC__)
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
using uint16_t = unsigned short;
#else
#include <cstdint>
#endif

namespace anyflash {

/// Strides of a [batch, seqlen, heads, d] tensor in elements; the last dimension is contiguous.
struct Strides {
  int64_t batch;
  int64_t row;
  int64_t head;
};

/// Division by a run-time constant, for n < 2^31; made by make_divisor of core/kernel_params.h.
struct Divisor {
  uint32_t divisor;
  uint32_t multiplier;
  uint32_t shift;
  uint32_t padding;
};

/// n / d.divisor: one high multiplication and one shift.
constexpr uint32_t divide(uint32_t n, const Divisor& d) {
  return static_cast<uint32_t>((uint64_t{2 * n} * d.multiplier) >> 32) >> d.shift;
}

/// What every kernel of one attention problem sees. Symbols: docs/notation.md.
struct AttentionParams {
  const void* q;               // [B, N, H, d], or packed [total_q, H, d]
  const void* k;               // [B, M, Hk, d]
  const void* v;               // [B, M, Hk, dv]
  const float* alibi_slopes;   // slope of (b, h) at b * alibi_batch + h; null: none
  const int32_t* cu_seqlens_q; // [B + 1]; null: dense
  const int32_t* cu_seqlens_k;
  const int32_t* seqused_q; // [B]; null: all
  const int32_t* seqused_k;
  Strides q_strides, k_strides, v_strides, o_strides;
  int64_t lse_batch;      // elements between sequences of L; 0 when packed
  int64_t lse_head;       // elements between heads of L
  int64_t alibi_batch;    // 0: slopes are [H]
  Divisor heads;          // H
  Divisor group;          // H / Hk
  Divisor section_heads;  // heads (of all sequences) whose blocks run together; see QueryBlock
  Divisor section_blocks; // section_heads * query_blocks
  int32_t query_blocks;   // blocks of Br rows a (sequence, head); of the longest when packed
  int32_t batch;
  int32_t seqlen_q; // dense: N; packed: the stated maximum
  int32_t seqlen_k;
  int32_t d;
  int32_t dv;
  int32_t window_left;  // at most 2^30: unbounded
  int32_t window_right; // 0: causal
  float factor;         // P = exp2(factor * S - m): |scale| log2(e), or softcap log2(e); never 0
  float softcap_in;     // scale / softcap: S = tanh(softcap_in * Q K^T); 0: off
  float alibi_factor;   // log2(e) / factor: ALiBi's slopes into the units of S
  int32_t negative;     // scale < 0 without softcap: S = -Q K^T
  int32_t aligned;      // rows of all 16-bit tensors start on 16 bytes
  int32_t padding;
};

struct ForwardParams : AttentionParams {
  void* o;    // [B, N, H, dv]
  float* lse; // [B, H, N], or packed [H, total_q]; null: not wanted
};

/// Gradients of one problem. Workspace rows: those of each (sequence, head), padded to whole blocks
/// of Br; see workspace_row.
struct BackwardParams : AttentionParams {
  const void* o; // as in the forward
  const float* lse;
  const void* dout;  // [B, N, H, dv]
  const float* dlse; // as lse; null: L has no gradient
  void* dq;          // [B, N, H, d]
  void* dk;          // [B, M, Hk, d]
  void* dv_out;      // [B, M, Hk, dv]
  float* row_stats;  // workspace [rows, 2]: L in log2 units (+inf: no key), and dlse - delta
  float* dq_sum;     // workspace [rows, d of the row] f32, in the order of fragments
  int32_t* turns;    // workspace [row blocks]: deterministic dQ; null: free order
  Strides dout_strides, dq_strides, dk_strides, dv_strides;
  Divisor key_heads;        // Hk
  Divisor key_section;      // key heads (of all sequences) whose blocks run together; see KeyBlock
  Divisor key_last_section; // those that are left for the last section
  Divisor key_section_blocks; // key_section * blocks of Bc keys of the longest sequence
  int64_t padded_rows;        // workspace rows of one head: all sequences together
  float scale;                // of Q K^T
  int32_t padding_end;
};

static_assert(sizeof(Strides) == 24 && sizeof(Divisor) == 16);
static_assert(sizeof(AttentionParams) == 8 * 8 + 4 * 24 + 3 * 8 + 4 * 16 + 14 * 4);
static_assert(sizeof(ForwardParams) == sizeof(AttentionParams) + 2 * 8);
static_assert(sizeof(BackwardParams) == sizeof(AttentionParams) + 10 * 8 + 4 * 24 + 4 * 16 + 16);

} // namespace anyflash
