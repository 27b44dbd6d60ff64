// What flash.cpp hands to the files of the instruction sets. Plain data and no functions: a
// function defined here and compiled for AVX-512 could become the one that every file calls.
#pragma once

#include <cstdint>

namespace anyflash::cpu {

/// Rows of a strip and keys of a block: compile-time, the same for every instruction set. A strip's
/// scores and one panel of K or V fit the first-level cache; multiples of every register tile.
constexpr int strip_rows = 24;
constexpr int block_keys = 128;

/// Up to strip_rows consecutive queries of one head. Row r is query first + r.
struct Strip {
  const void* q;  // row 0
  void* o;        // row 0; not used when the keys are split
  float* lse;     // row 0, contiguous; null: not wanted
  float* partial; // row 0 of [rows, dv + 2]: O not divided by l, then m and l; null: not split
  int64_t visible_begin; // row r sees keys [visible_begin + r, visible_end + r) of [0, seqlen_k)
  int64_t visible_end;
  int64_t diagonal; // row r is aligned with key diagonal + r
  int rows;
  int key_begin, key_end;   // keys that some row sees; equal: none
  int full_begin, full_end; // keys that every row sees
  float slope;              // ALiBi
};

/// One task: strips that share their keys, in one sequence and one key head.
struct Block {
  const Strip* strips;
  int strip_count;
  const void* k; // key 0
  const void* v;
  int64_t q_row, k_row, v_row, o_row; // elements between rows
  int d, dv;
  int key_begin, key_end; // keys to visit
  int seqlen_k;
  float scale;
  float softcap; // 0: off
  bool alibi;
};

/// The tiled algorithm compiled for one instruction set.
struct InstructionSet {
  using Forward = void (*)(const Block& block, float* scratch);

  const char* name;
  bool (*available)(); // what the processor and the operating system say
  Forward float16, bfloat16, float32;
  /// Floats of scratch that a block needs.
  int64_t (*scratch)(int strips, int d, int dv);
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
