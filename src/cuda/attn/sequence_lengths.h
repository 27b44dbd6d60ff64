// Where the rows of one sequence are, and how many of them.
#pragma once

#include "cuda/params.h"
#include "cuda/ptx/device.h"

namespace anyflash {

struct SequenceLengths {
  int first_q, first_k;   // rows of the sequence in packed tensors; dense: 0
  int rows_q, rows_k;     // that exist
  int seqlen_q, seqlen_k; // that are used

  DEVICE SequenceLengths(const AttentionParams& p, int sequence) {
    first_q = first_k = 0;
    rows_q = p.seqlen_q;
    rows_k = p.seqlen_k;
    if (p.cu_seqlens_q) {
      first_q = p.cu_seqlens_q[sequence];
      first_k = p.cu_seqlens_k[sequence];
      rows_q = p.cu_seqlens_q[sequence + 1] - first_q;
      rows_k = p.cu_seqlens_k[sequence + 1] - first_k;
    }
    seqlen_q = p.seqused_q ? min(rows_q, p.seqused_q[sequence]) : rows_q;
    seqlen_k = p.seqused_k ? min(rows_k, p.seqused_k[sequence]) : rows_k;
  }

  /// Query i is aligned with key i + diagonal.
  DEVICE int diagonal() const { return seqlen_k - seqlen_q; }
};

} // namespace anyflash
