// Where one sequence of a problem lives: the only place that reads cu_seqlens and seqused.
#pragma once

#include <algorithm>

#include "core/problem.h"

namespace anyflash::cpu {

/// One sequence: where its rows lie in the tensors, and how long it is.
struct Sequence {
  int64_t seqlen_q = 0, seqlen_k = 0; // what attention sees: at most seqused
  int64_t rows_q =
      0; // rows of O and L that belong to it; those from seqlen_q on get O = 0, L = -inf
  int64_t q = 0, k = 0, v = 0, o = 0; // element offsets of its first row, head 0
  int64_t dout = 0, dq = 0, dk = 0, dv = 0;
  int64_t rows_k = 0;   // rows of dK and dV that belong to it; those from seqlen_k on get 0
  int64_t lse = 0;      // offset of its first row in L, head 0
  int64_t lse_head = 0; // elements between heads of L
};

inline Sequence sequence_of(const Problem& problem, int64_t b) {
  Sequence s;
  if (!problem.packed) {
    s.rows_q = problem.seqlen_q;
    s.rows_k = problem.seqlen_k;
    s.q = b * problem.q.batch;
    s.k = b * problem.k.batch;
    s.v = b * problem.v.batch;
    s.o = b * problem.o.batch;
    s.dout = b * problem.dout.batch;
    s.dq = b * problem.dq.batch;
    s.dk = b * problem.dk.batch;
    s.dv = b * problem.dv_out.batch;
    s.lse = b * problem.heads * problem.seqlen_q;
    s.lse_head = problem.seqlen_q;
  } else {
    const int64_t first_q = problem.cu_seqlens_q[b], first_k = problem.cu_seqlens_k[b];
    s.rows_q = problem.cu_seqlens_q[b + 1] - first_q;
    s.rows_k = problem.cu_seqlens_k[b + 1] - first_k;
    s.q = first_q * problem.q.row;
    s.k = first_k * problem.k.row;
    s.v = first_k * problem.v.row;
    s.o = first_q * problem.o.row;
    s.dout = first_q * problem.dout.row;
    s.dq = first_q * problem.dq.row;
    s.dk = first_k * problem.dk.row;
    s.dv = first_k * problem.dv_out.row;
    s.lse = first_q;
    s.lse_head = problem.total_q;
  }
  const auto used = [&](const int32_t* seqused, int64_t length) {
    return seqused ? std::clamp<int64_t>(seqused[b], 0, length) : length;
  };
  s.seqlen_q = used(problem.seqused_q, s.rows_q);
  s.seqlen_k = used(problem.seqused_k, s.rows_k);
  return s;
}

} // namespace anyflash::cpu
