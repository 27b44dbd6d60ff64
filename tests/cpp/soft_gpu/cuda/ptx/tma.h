// cuda/ptx/tma.h in software.
#pragma once

#include "cuda/ptx/device.h"

namespace anyflash {

inline void prefetch_tensor_map(const void*) {}

inline void tma_load(uint32_t shared, const void* map, uint32_t barrier, int column, int row,
                     int head, int batch) {
  const int coordinates[] = {column, row, head, batch};
  soft_gpu::load_box(shared, map, barrier, coordinates, 4);
}
inline void tma_load_ragged(uint32_t shared, const void* map, uint32_t barrier, int column,
                            int skip, int row, int head, int batch) {
  const int coordinates[] = {column, skip, row, head, batch};
  soft_gpu::load_box(shared, map, barrier, coordinates, 5);
}
inline void tma_store(const void* map, uint32_t shared, int column, int row, int head, int batch) {
  const int coordinates[] = {column, row, head, batch};
  soft_gpu::store_box(map, shared, coordinates, 4);
}
inline void bulk_load(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
  soft_gpu::load_bytes(shared, global, bytes, barrier);
}
inline void bulk_add(float* global, uint32_t shared, uint32_t bytes) {
  soft_gpu::add_floats(global, shared, bytes);
}
inline void bulk_commit() { soft_gpu::bulk_commit(); }
template <int pending>
void bulk_wait_read() {
  soft_gpu::bulk_wait(pending);
}
template <int pending>
void bulk_wait() {
  soft_gpu::bulk_wait(pending);
}
inline void fence_async_shared() { soft_gpu::fence_async(); }

} // namespace anyflash
