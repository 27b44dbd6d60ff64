// What flash.cpp hands to the files of the instruction sets. Plain data and no functions: a
// function defined here and compiled for AVX-512 could become the one that every file calls.
#pragma once

#include <cstdint>

namespace anyflash::cpu {

/// Rows of a strip and keys of a block: compile-time, the same for every instruction set. A strip's
/// scores and one panel of K or V fit the first-level cache; multiples of every register tile.
constexpr int strip_rows = 24;
constexpr int block_keys = 128;

/// The same for the backward: multiples of every panel and nearly every register tile; large,
/// because the sums of dQ, dK and dV are read and written once a tile; not a power of two, which
/// would put a column of P into few sets of the first-level cache.
constexpr int gradient_rows = 96;
constexpr int gradient_keys = 96;

/// Consecutive queries of one head, and the keys that they see. Row r is query first + r.
struct Queries {
  int64_t visible_begin; // row r sees keys [visible_begin + r, visible_end + r) of [0, seqlen_k)
  int64_t visible_end;
  int64_t diagonal; // row r is aligned with key diagonal + r
  int rows;
  int key_begin, key_end;   // keys that some row sees; equal: none
  int full_begin, full_end; // keys that every row sees
  float slope;              // ALiBi
};

/// Up to strip_rows queries of the forward.
struct Strip : Queries {
  const void* q;  // row 0
  void* o;        // row 0; not used when the keys are split
  float* lse;     // row 0, contiguous; null: not wanted
  float* partial; // row 0 of [rows, dv + 2]: O not divided by l, then m and l; null: not split
};

/// What every task has: the keys of one key head in one sequence, and how they are scored.
struct BlockBase {
  const void *k, *v;                  // key 0
  int64_t q_row, k_row, v_row, o_row; // elements between rows
  int d, dv;
  int seqlen_k; // keys that may be seen
  float scale;
  float softcap; // 0: off
  bool alibi;
};

/// One task: strips that share their keys.
struct Block : BlockBase {
  const Strip* strips;
  int strip_count;
  int key_begin, key_end; // keys to visit
};

/// Up to gradient_rows queries of the backward.
struct GradientStrip : Queries {
  const void *q, *o, *dout; // row 0
  const float *lse, *dlse;  // row 0, contiguous; dlse null: 0
  void* dq;                 // row 0
};

/// One task of the backward: strips and all keys that they may see.
struct GradientBlock : BlockBase {
  const GradientStrip* strips;
  int strip_count;
  void *dk, *dv_out; // key 0; not used when the queries are split
  float* partial; // key 0 of [rows_k, d + dv]: what these strips add to dK and dV; null: not split
  int64_t dout_row, dq_row, dk_row, dv_out_row; // elements between rows
  int rows_k;                                   // rows of dK and dV; those from seqlen_k on get 0
};

/// Rows of dK or dV as sums of partial results, in order.
struct PartialRows {
  const float* partial; // row 0, column 0 of the first part
  int64_t part, row;    // floats between parts, between rows
  int parts, rows, columns;
  void* to;       // row 0
  int64_t to_row; // elements
};

/// What is compiled once for each instruction set and dtype.
struct Kernels {
  void (*forward)(const Block& block, float* scratch);
  void (*backward)(const GradientBlock& block, float* scratch);
  void (*merge_gradients)(const PartialRows& rows);
};

/// The tiled algorithm compiled for one instruction set.
struct InstructionSet {
  const char* name;
  bool (*available)(); // what the processor and the operating system say
  Kernels float16, bfloat16, float32;
  /// Floats of scratch that a task needs.
  int64_t (*forward_scratch)(int strips, int d, int dv);
  int64_t (*backward_scratch)(int strips, int d, int dv);
};

extern const InstructionSet scalar;
#if defined(__x86_64__) || defined(_M_X64)
extern const InstructionSet avx2;
extern const InstructionSet avx512;
#endif
#if defined(__aarch64__) || defined(_M_ARM64)
extern const InstructionSet neon;
#endif

} // namespace anyflash::cpu
