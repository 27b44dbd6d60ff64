#include "core/overlap.h"

#include <algorithm>
#include <array>

namespace anyflash {
namespace {

using Wide = ByteRange::Offset;

struct Dim {
  Wide size, stride; // stride > 0, in bytes
};

/// The bytes of a tensor: start + sum(index * stride) + [0, block), dims from the largest stride to
/// the smallest.
struct Bytes {
  Wide start = 0;
  Wide block = 0;
  std::array<Dim, 4> dims{};
  int count = 0;

  /// One past the last byte, from start, of the dims from `first` on.
  Wide extent(int first = 0) const {
    Wide last = block;
    for (int i = first; i < count; ++i) last += (dims[i].size - 1) * dims[i].stride;
    return last;
  }
};

bool has_no_memory(const anyflash_tensor& tensor) {
  if (!tensor.data || tensor.ndim == 0) return true;
  return std::any_of(tensor.shape, tensor.shape + tensor.ndim, [](int64_t n) { return n == 0; });
}

Bytes bytes_of(const anyflash_tensor& tensor, int64_t bytes) {
  Bytes result;
  result.start = reinterpret_cast<uintptr_t>(tensor.data);
  result.block = bytes;
  for (int i = 0; i < tensor.ndim; ++i) {
    const Wide size = tensor.shape[i];
    Wide stride = Wide{tensor.strides[i]} * bytes;
    if (size <= 1 || stride == 0) continue;
    if (stride < 0) { // the same bytes, counted from the other end
      result.start += (size - 1) * stride;
      stride = -stride;
    }
    // Insert in order, the largest stride first.
    int at = result.count++;
    for (; at > 0 && result.dims[at - 1].stride < stride; --at)
      result.dims[at] = result.dims[at - 1];
    result.dims[at] = {size, stride};
  }
  while (result.count > 0 && result.dims[result.count - 1].stride == result.block)
    result.block *= result.dims[--result.count].size;
  return result;
}

Wide floor_div(Wide a, Wide b) { return a / b - (a % b < 0); }

/// Do a, from dimension i on and starting at 0, and b, from dimension j on and starting at `apart`,
/// meet? Peels off the larger stride; the difference t of the two indices can then take only the
/// few values that bring the insides together. budget bounds the work.
bool meet(const Bytes& a, int i, const Bytes& b, int j, Wide apart, int& budget) {
  if (apart >= a.extent(i) || -apart >= b.extent(j)) return false;
  if (i == a.count && j == b.count) return true;
  if (--budget < 0) return true;
  const Wide stride =
      std::max(i < a.count ? a.dims[i].stride : 0, j < b.count ? b.dims[j].stride : 0);
  Wide a_size = 1, b_size = 1;
  if (i < a.count && a.dims[i].stride == stride) a_size = a.dims[i++].size;
  if (j < b.count && b.dims[j].stride == stride) b_size = b.dims[j++].size;
  // apart - extent of a < t * stride < apart + extent of b
  const Wide first = std::max(floor_div(apart - a.extent(i), stride) + 1, 1 - b_size);
  const Wide last = std::min(-floor_div(-(apart + b.extent(j)), stride) - 1, a_size - 1);
  for (Wide t = first; t <= last; ++t)
    if (meet(a, i, b, j, apart - t * stride, budget)) return true;
  return false;
}

} // namespace

ByteRange byte_range(const anyflash_tensor& tensor, int64_t bytes) {
  if (has_no_memory(tensor)) return {};
  const Wide start = reinterpret_cast<uintptr_t>(tensor.data);
  ByteRange range = {start, start + bytes};
  for (int i = 0; i < tensor.ndim; ++i) {
    const Wide reach = Wide{tensor.shape[i] - 1} * tensor.strides[i] * bytes;
    (reach < 0 ? range.first : range.end) += reach;
  }
  return range;
}

bool may_overlap(const anyflash_tensor& a, int64_t a_bytes, const anyflash_tensor& b,
                 int64_t b_bytes) {
  if (has_no_memory(a) || has_no_memory(b)) return false;
  const Bytes first = bytes_of(a, a_bytes), second = bytes_of(b, b_bytes);
  int budget = 1000;
  return meet(first, 0, second, 0, second.start - first.start, budget);
}

bool may_share_memory_with_itself(const anyflash_tensor& tensor, int64_t bytes) {
  if (std::any_of(tensor.shape, tensor.shape + tensor.ndim, [](int64_t n) { return n == 0; }))
    return false;
  const Bytes all = bytes_of(tensor, bytes);
  for (int i = 0; i < all.count; ++i)
    if (all.dims[i].stride < all.extent(i + 1)) return true;
  return false;
}

} // namespace anyflash
