// Which key blocks there are, in the sm90 backward. A ticket is the index of a block (KeyBlock), as
// if all sequences were as long as the longest.
#pragma once

#include "cuda/attn/key_block.h"
#include "cuda/sm90/backward/layout.h"
#include "cuda/sm90/params.h"

namespace anyflash::sm90 {

/// Tickets of one key head of a sequence. One without keys has one, too: every head sees to the
/// zeros of another (zero_sums.h).
template <class Row>
DEVICE int tickets_of_head(const BackwardParams& p, int sequence) {
  constexpr int keys = Backward<Row>::Keys::Bc;
  const int most = max(1, detail::ceil_div(p.seqlen_k, keys));
  if (!p.cu_seqlens_k) return most;
  const int rows = p.cu_seqlens_k[sequence + 1] - p.cu_seqlens_k[sequence];
  return min(most, max(1, detail::ceil_div(rows, keys)));
}

/// Finds the tickets that exist, one after the other. Of packed sequences most may not: where one
/// sequence is four times as long as the mean, three of four. In shared memory, where it costs no
/// registers.
template <class Row>
struct TicketFinder {
  int sequence;
  int before; // tickets of the sequences before

  /// The ticket with `number` in their order, or one past the last. Numbers must not fall.
  DEVICE uint32_t find(const BackwardParams& p, int number) volatile {
    if (!p.cu_seqlens_k) return number;
    ROLLED
    for (; sequence < p.batch; ++sequence) {
      const int of_head = tickets_of_head<Row>(p, sequence);
      const int rest = number - before, all = of_head * int(p.key_heads.divisor);
      if (rest < all) return p.turns ? by_block(p, rest) : by_head(p, rest, of_head);
      before += all;
    }
    return p.key_blocks;
  }

private:
  /// A sequence is a section (KeyBlock): its first block of all heads, then the second.
  DEVICE uint32_t by_block(const BackwardParams& p, int rest) const volatile {
    return sequence * p.key_section_blocks.divisor + rest;
  }
  /// A head is a section.
  DEVICE uint32_t by_head(const BackwardParams& p, int rest, int of_head) const volatile {
    const int head = rest / of_head;
    return (sequence * p.key_heads.divisor + head) * p.key_section_blocks.divisor + rest -
           head * of_head;
  }
};

} // namespace anyflash::sm90
