// What the forward and the backward share in cutting a problem into strips of queries.
#pragma once

#include <algorithm>

#include "cpu/block.h"
#include "cpu/cpu.h"
#include "cpu/dispatch.h"
#include "cpu/sequence.h"
#include "cuda/attn/key_blocks.h"

namespace anyflash::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Row `row` of head `head` of the sequence that starts at element `sequence` of a tensor.
inline char* row_of(const Problem& problem, const View& view, int64_t sequence, int64_t row,
                    int64_t head) {
  if (!view.data) return nullptr; // a tensor without elements
  return static_cast<char*>(view.data) +
         (sequence + row * view.row + head * view.head) * size_of(problem.dtype);
}

/// Used queries [first, first + most) of head h in sequence b, as far as there are, and the keys
/// that they see.
inline Queries used_queries(const Problem& problem, const Sequence& sequence, int64_t b, int64_t h,
                            int64_t first, int64_t most) {
  const auto& mask = problem.mask;
  Queries queries{};
  queries.rows = static_cast<int>(std::min(most, sequence.seqlen_q - first));
  queries.diagonal = first + sequence.seqlen_k - sequence.seqlen_q;
  queries.visible_begin = queries.diagonal - mask.left;
  queries.visible_end = queries.diagonal + mask.right + 1;
  const KeyBlocks keys =
      key_blocks(static_cast<int>(first), queries.rows, 1, static_cast<int>(sequence.seqlen_q),
                 static_cast<int>(sequence.seqlen_k), static_cast<int>(mask.left),
                 static_cast<int>(mask.right));
  queries.key_begin = keys.begin;
  queries.key_end = keys.end;
  queries.full_begin = keys.full_begin;
  queries.full_end = keys.full_end;
  queries.slope = problem.alibi_slopes ? problem.alibi_slopes[b * problem.alibi_batch + h] : 0.0f;
  return queries;
}

/// Queries past seqused: they see nothing.
inline Queries unused_queries(const Sequence& sequence, int64_t first, int64_t most) {
  Queries queries{};
  queries.rows = static_cast<int>(std::min(most, sequence.rows_q - first));
  return queries;
}

/// What the tasks of key head h_k in a sequence have in common.
inline BlockBase block_base(const Problem& problem, const Sequence& sequence, int64_t h_k) {
  BlockBase base{};
  base.k = row_of(problem, problem.k, sequence.k, 0, h_k);
  base.v = row_of(problem, problem.v, sequence.v, 0, h_k);
  base.q_row = problem.q.row;
  base.k_row = problem.k.row;
  base.v_row = problem.v.row;
  base.o_row = problem.o.row;
  base.d = static_cast<int>(problem.d);
  base.dv = static_cast<int>(problem.dv);
  base.seqlen_k = static_cast<int>(sequence.seqlen_k);
  base.scale = problem.scale;
  base.softcap = problem.softcap;
  base.alibi = problem.alibi_slopes != nullptr;
  return base;
}

/// The functions for the problem's dtype, of the instruction set in use.
inline const Kernels& kernels_for(const InstructionSet& set, DType dtype) {
  return dtype == DType::float16    ? set.float16
         : dtype == DType::bfloat16 ? set.bfloat16
                                    : set.float32;
}

/// The tiling of a backward; that of a forward is in flash.cpp.
Tiling backward_tiling(const Problem& problem);

} // namespace anyflash::cpu
