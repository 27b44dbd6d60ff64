// How much a problem asks for: visible pairs, flops, bytes.
#pragma once

#include "core/problem.h"

namespace anyflash {

/// Pairs (i, j) that the mask shows, of queries i in [0, seqlen_q) and keys j in [0, seqlen_k).
/// Closed form, in double: exact up to 2^53.
double visible_pairs(int64_t seqlen_q, int64_t seqlen_k, const Mask& mask);

struct Work {
  double pairs = 0;  // over all sequences and query heads
  double flops = 0;  // a pair: 2 (d + dv), in the backward 2 (3 d + 2 dv)
  double bytes = 0;  // inputs and outputs, each once
  bool exact = true; // false: packed lengths on a GPU, counted as the stated maxima
};

Work work_of(const Problem& problem);

} // namespace anyflash
