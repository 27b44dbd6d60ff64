// Do two tensors share memory? Exact for views of one buffer, careful (yes) where it cannot tell.
#pragma once

#include <cstdint>

#include "anyflash/anyflash.h"

namespace anyflash {

/// From a tensor's first byte to one past its last, gaps included. Without memory: nothing.
struct ByteRange {
  // Any int64 sizes and strides multiply without overflow.
  __extension__ using Offset = __int128;
  Offset first = 0, end = 0;

  bool meets(const ByteRange& other) const { return first < other.end && other.first < end; }
};

/// bytes: of one element.
ByteRange byte_range(const anyflash_tensor& tensor, int64_t bytes);

/// False only if no element of a shares a byte with one of b. Element sizes in bytes. Absent data
/// and empty tensors share nothing. Exact when the strides nest (each at least as long as what lies
/// inside it), as they do for slices of one packed qkv buffer.
bool may_overlap(const anyflash_tensor& a, int64_t a_bytes, const anyflash_tensor& b,
                 int64_t b_bytes);

/// False only if no two indices of the tensor name the same byte.
bool may_share_memory_with_itself(const anyflash_tensor& tensor, int64_t bytes);

} // namespace anyflash
