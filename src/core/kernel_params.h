// Problem -> what the kernels read.
#pragma once

#include "core/problem.h"
#include "core/row.h"
#include "cuda/params.h"

namespace anyflash {

/// The constants by which divide() divides, for 1 <= divisor < 2^31.
Divisor make_divisor(int64_t divisor);

/// Parameters of the kernel of a row. The problem is valid and has something to write.
ForwardParams forward_params(const Problem& problem, const Row& row);

/// Rows that the workspace of the backward keeps for each query head: every sequence padded to
/// whole blocks of Br, and where sequences are packed, to blocks that no two share.
int64_t padded_rows(const Problem& problem, int Br);

/// Where things lie in the workspace of the backward, in bytes; each starts on 256.
struct BackwardWorkspace {
  uint64_t dq_sum;    // fp32 [heads, padded rows, d of the row]
  uint64_t row_stats; // fp32 [heads, padded rows, 2]
  uint64_t turns;     // int32 [heads, padded rows / Br]
  uint64_t tickets;   // int32, in the sm90 family
  uint64_t zeroed;    // int32 for each key head, there too
  uint64_t end;
};
BackwardWorkspace backward_workspace(const Problem& problem, const Row& row);

/// Parameters of the kernels of a backward row, which share them. turns: blocks of keys add to dQ
/// in the order of their index.
BackwardParams backward_params(const Problem& problem, const Row& row, void* workspace, bool turns);

} // namespace anyflash
