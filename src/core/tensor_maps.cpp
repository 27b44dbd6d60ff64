#include "core/tensor_maps.h"

#include <array>

#include "core/driver.h"
#include "core/error.h"

namespace anyflash {
namespace {

constexpr int64_t bytes_of_element = 2;
constexpr int64_t stride_limit = int64_t{1} << 40; // bytes
constexpr int64_t extent_limit = int64_t{1} << 31; // coordinates are int32

/// Bytes between neighbours of a dimension; where it has one element any valid stride will do.
uint64_t stride_bytes(int64_t stride, int64_t extent) {
  return extent > 1 ? static_cast<uint64_t>(stride * bytes_of_element) : 16;
}

uint64_t extent_of(int64_t extent) { return static_cast<uint64_t>(extent); }

sm90::TensorMap encode(DType dtype, const void* data, uint32_t rank, const uint64_t* sizes,
                       const uint64_t* strides, const uint32_t* box, const uint32_t* steps) {
  sm90::TensorMap map{};
  const cuda::Driver& driver = cuda::driver();
  driver.check(driver.TensorMapEncodeTiled(
                   &map, dtype == DType::bfloat16 ? cuda::map_bfloat16 : cuda::map_float16, rank,
                   const_cast<void*>(data), sizes, strides, box, steps, cuda::map_not_interleaved,
                   box[0] == 64 ? cuda::map_swizzle_128_bytes : cuda::map_swizzle_64_bytes,
                   cuda::map_l2_256_bytes, cuda::map_fill_zero),
               "cuTensorMapEncodeTiled");
  return map;
}

std::string why_not(const View& view, const Extents& extents) {
  if (view == View{}) return ""; // absent: only planning
  const std::array<std::array<int64_t, 2>, 3> dims = {
      {{view.row, extents.rows}, {view.head, extents.heads}, {view.batch, extents.batch}}};
  for (const auto& [stride, extent] : dims) {
    if (extent >= extent_limit) return "a dimension of 2^31 elements";
    if (extent <= 1) continue;
    if (stride <= 0) return "a stride that is not positive";
    if (stride >= stride_limit / bytes_of_element) return "a stride of 2^40 bytes";
  }
  return "";
}

} // namespace

Extents query_extents(const Problem& p, int64_t d) {
  return p.packed ? Extents{1, p.total_q, p.heads, d} : Extents{p.batch, p.seqlen_q, p.heads, d};
}

Extents key_extents(const Problem& p, int64_t d) {
  return p.packed ? Extents{1, p.total_k, p.heads_k, d}
                  : Extents{p.batch, p.seqlen_k, p.heads_k, d};
}

sm90::TensorMap tensor_map(const View& view, const Extents& extents, DType dtype, int columns,
                           int box_rows) {
  const uint64_t sizes[] = {extent_of(extents.d), extent_of(extents.rows), extent_of(extents.heads),
                            extent_of(extents.batch)};
  const uint64_t strides[] = {stride_bytes(view.row, extents.rows),
                              stride_bytes(view.head, extents.heads),
                              stride_bytes(view.batch, extents.batch)};
  const uint32_t box[] = {static_cast<uint32_t>(columns), static_cast<uint32_t>(box_rows), 1, 1};
  const uint32_t steps[] = {1, 1, 1, 1};
  return encode(dtype, view.data, 4, sizes, strides, box, steps);
}

sm90::TensorMap ragged_tensor_map(const View& view, const Extents& extents, DType dtype,
                                  int columns, int box_rows) {
  // What stands for the data of an empty tensor, whose pointer may be null; never read.
  alignas(16) static constexpr char nothing[16] = {};
  const bool empty = extents.d * extents.rows * extents.heads * extents.batch == 0;
  const Extents e = empty ? Extents{1, 1, 1, extents.d} : extents;
  const auto high = static_cast<uint32_t>(box_rows);
  const uint64_t row = stride_bytes(view.row, e.rows);
  const uint64_t sizes[] = {extent_of(e.d), high, extent_of(e.rows) + 1, extent_of(e.heads),
                            extent_of(e.batch)};
  const uint64_t strides[] = {row, row, stride_bytes(view.head, e.heads),
                              stride_bytes(view.batch, e.batch)};
  const uint32_t box[] = {static_cast<uint32_t>(columns), high, 1, 1, 1};
  const uint32_t steps[] = {1, 1, 1, 1, 1};
  const auto data = reinterpret_cast<uintptr_t>(empty ? nothing : view.data) - high * row;
  return encode(dtype, reinterpret_cast<const void*>(data), 5, sizes, strides, box, steps);
}

std::string why_not_tensor_maps(const Problem& p) {
  if (!p.aligned) return "rows of a tensor that do not start on 16 bytes";
  const Extents q = query_extents(p, p.d), k = key_extents(p, p.d);
  for (const auto& [view, extents] :
       {std::pair(p.q, q), std::pair(p.k, k), std::pair(p.v, k), std::pair(p.o, q)})
    if (std::string reason = why_not(view, extents); !reason.empty()) return reason;
  if (p.op == ANYFLASH_BACKWARD) return why_not(p.dout, q);
  return "";
}

} // namespace anyflash
