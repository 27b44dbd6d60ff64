// Which work a thread block does: one block of queries of one head of one sequence.
#pragma once

#include "cuda/attn/key_blocks.h"
#include "cuda/attn/sequence_lengths.h"
#include "cuda/ptx/device.h"

namespace anyflash {

/// Block `index` of the grid. Heads (of all sequences) are taken in sections; inside a section the
/// blocks of the last queries come first, because they see most keys under a causal mask and the
/// short ones then fill the gaps. With one head a section, blocks that run together read the same
/// keys.
template <class Row>
struct QueryBlock {
  int sequence, head, head_k;
  int first_query; // in its sequence
  int rows;        // rows of O that exist in this sequence; queries at and past seqlen_q give O = 0
  int seqlen_q, seqlen_k;                         // used lengths
  int64_t q_offset, k_offset, v_offset, o_offset; // elements to (row 0 of the sequence, this head)
  int64_t lse_offset;
  int64_t first_q; // row of the sequence in a packed tensor

  DEVICE QueryBlock(const AttentionParams& p, uint32_t index) {
    const uint32_t section = divide(index, p.section_blocks);
    const uint32_t rest = index - section * p.section_blocks.divisor;
    const uint32_t first_head = section * p.section_heads.divisor;
    const uint32_t heads =
        min(p.section_heads.divisor, p.heads.divisor * p.batch - first_head); // the last has fewer
    const uint32_t turn =
        heads == p.section_heads.divisor ? divide(rest, p.section_heads) : rest / heads;
    const uint32_t head_index = first_head + rest - turn * heads;
    const int block = p.query_blocks - 1 - turn;
    sequence = divide(head_index, p.heads);
    head = head_index - sequence * p.heads.divisor;
    head_k = divide(head, p.group);
    first_query = block * Row::Br;

    const SequenceLengths lengths(p, sequence);
    first_q = lengths.first_q;
    rows = lengths.rows_q;
    seqlen_q = lengths.seqlen_q;
    seqlen_k = lengths.seqlen_k;
    const int64_t first_k = lengths.first_k;

    q_offset = sequence * p.q_strides.batch + first_q * p.q_strides.row + head * p.q_strides.head;
    k_offset = sequence * p.k_strides.batch + first_k * p.k_strides.row + head_k * p.k_strides.head;
    v_offset = sequence * p.v_strides.batch + first_k * p.v_strides.row + head_k * p.v_strides.head;
    o_offset = sequence * p.o_strides.batch + first_q * p.o_strides.row + head * p.o_strides.head;
    lse_offset = sequence * p.lse_batch + head * p.lse_head + first_q;
  }

  /// Elements to (row 0 of the sequence, this head) of another tensor with the query's rows.
  DEVICE int64_t offset(const Strides& s) const {
    return sequence * s.batch + first_q * s.row + head * s.head;
  }

  /// Nothing to write: the sequence is shorter than the longest of the batch.
  DEVICE bool outside() const { return first_query >= rows; }

  /// Query i is aligned with key i + diagonal.
  DEVICE int diagonal() const { return seqlen_k - seqlen_q; }

  DEVICE KeyBlocks keys(const AttentionParams& p) const {
    return key_blocks(first_query, Row::Br, Row::Bc, seqlen_q, seqlen_k, p.window_left,
                      p.window_right);
  }
};

} // namespace anyflash
