// The sums of dQ become 0 while the sm90 backward runs, shortly before they are added to.
#pragma once

#include "cuda/ptx/atomic.h"
#include "cuda/sm90/backward/ends.h"
#include "cuda/sm90/backward/stream.h"

namespace anyflash::sm90 {

/// A part of the sums: every ticket has one, or one for each block of a pair, of the key head that
/// is heads_ahead after its own.
template <class Row>
DEVICE void zero_part(const BackwardParams& p, uint32_t ticket) {
  const uint32_t own_head = divide(ticket, p.key_section_blocks); // a section is one head here
  const uint32_t own_block = ticket - own_head * p.key_section_blocks.divisor;
  const int parts = tickets_of_head<Row>(p, divide(own_head, p.key_heads)) * Row::cluster;
  const uint32_t head_index = own_head + p.heads_ahead;
  if (head_index >= p.key_heads.divisor * p.batch) return;
  const int sequence = divide(head_index, p.key_heads);
  const int head = (head_index - sequence * p.key_heads.divisor) * p.group.divisor;
  const int rows =
      p.cu_seqlens_q ? p.cu_seqlens_q[sequence + 1] - p.cu_seqlens_q[sequence] : p.seqlen_q;
  constexpr int block_size = Row::Br * Row::d / 4; // in float4
  float4* const sums = reinterpret_cast<float4*>(p.dq_sum) + lane_index();
  ROLLED
  for (int of_group = 0; of_group < p.group.divisor; ++of_group) {
    const int64_t first_row = workspace_row<Row>(p, sequence, head + of_group);
    ROLLED
    for (int block = own_block * Row::cluster + Backward<Row>::rank(); // of a pair each has a part
         block * Row::Br < rows; block += parts) {
      float4* const sum = sums + (first_row / Row::Br + block) * block_size;
#pragma unroll 8
      for (int i = 0; i < block_size; i += warp_size) sum[i] = {0, 0, 0, 0};
    }
  }
  __syncwarp();
  if (lane_index() == 0) add_release(p.zeroed + head_index);
}

/// By one warp, until there is no more work.
template <class Row>
DEVICE void zero_sums_ahead(const BackwardParams& p, const char* shared_memory) {
  WorkReader<Row> reader(shared_memory);
  ROLLED
  while (true) {
    const uint32_t ticket = reader.wait().ticket;
    if (ticket >= p.key_blocks) return;
    reader.next();
    zero_part<Row>(p, ticket);
  }
}

} // namespace anyflash::sm90
