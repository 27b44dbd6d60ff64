// The work of a thread block of the backward: one block of keys of one key head of one sequence,
// and every query that sees it.
#pragma once

#include "cuda/attn/key_blocks.h"
#include "cuda/attn/sequence_lengths.h"
#include "cuda/ptx/device.h"

namespace anyflash {

/// Where the workspace keeps the rows of a sequence: each sequence padded to whole blocks of Br, so
/// that a block of queries never shares one with another sequence.
template <class Row>
DEVICE int64_t workspace_row(const BackwardParams& p, int sequence, int head) {
  const int first =
      p.cu_seqlens_q ? p.cu_seqlens_q[sequence] / Row::Br + sequence : sequence * p.query_blocks;
  return head * p.padded_rows + int64_t{first} * Row::Br;
}

/// Block `index` of the grid. Key heads (of all sequences) are taken in sections; inside a section
/// the first key blocks of all heads come first. With one head a section, the blocks that run
/// together read the same queries; with many, few of them add to the same dQ, which matters where
/// they take turns.
template <class Row>
struct KeyBlock {
  int sequence, head_k;
  int first_key;
  int rows;                 // rows of dK that exist in this sequence
  int seqlen_q, seqlen_k;   // used lengths
  int64_t first_q, first_k; // rows in a packed tensor

  DEVICE KeyBlock(const BackwardParams& p, uint32_t index) {
    const uint32_t section = divide(index, p.key_section_blocks);
    const uint32_t rest = index - section * p.key_section_blocks.divisor;
    const uint32_t first_head = section * p.key_section.divisor;
    const bool last = first_head + p.key_last_section.divisor == p.key_heads.divisor * p.batch;
    const Divisor& heads = last ? p.key_last_section : p.key_section;
    const uint32_t block = divide(rest, heads);
    const uint32_t head_index = first_head + rest - block * heads.divisor;
    first_key = block * Row::Bc;
    sequence = divide(head_index, p.key_heads);
    head_k = head_index - sequence * p.key_heads.divisor;
    const SequenceLengths lengths(p, sequence);
    first_q = lengths.first_q;
    first_k = lengths.first_k;
    rows = lengths.rows_k;
    seqlen_q = lengths.seqlen_q;
    seqlen_k = lengths.seqlen_k;
  }

  /// Nothing to write: the sequence is shorter than the longest of the batch.
  DEVICE bool outside() const { return first_key >= rows; }

  /// Query i is aligned with key i + diagonal.
  DEVICE int diagonal() const { return seqlen_k - seqlen_q; }

  /// The blocks of Br queries that see these keys: key_blocks with the roles exchanged. Keys past
  /// the end make every one of them an edge: such keys are 0, but not their P = exp2(0 - L), which
  /// may even be infinite.
  DEVICE KeyBlocks queries(const AttentionParams& p) const {
    return queries(p, first_key, Row::Bc);
  }
  /// Those that see some of `keys` keys from `first` on.
  DEVICE KeyBlocks queries(const AttentionParams& p, int first, int keys) const {
    KeyBlocks blocks =
        key_blocks(first, keys, Row::Br, seqlen_k, seqlen_q, p.window_right, p.window_left);
    if (first + keys > seqlen_k) blocks.full_begin = blocks.end;
    return blocks;
  }

  /// Elements to (row 0 of the sequence, `head`) of a tensor with the query's or the key's rows.
  DEVICE int64_t query_offset(const Strides& s, int head) const {
    return sequence * s.batch + first_q * s.row + head * s.head;
  }
  DEVICE int64_t key_offset(const Strides& s) const {
    return sequence * s.batch + first_k * s.row + head_k * s.head;
  }
};

} // namespace anyflash
