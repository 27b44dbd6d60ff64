// The copy engine: boxes of tensors, and runs of bytes, between global and shared memory. PTX ISA,
// "cp.async.bulk" and "cp.async.bulk.tensor". sm_90+. Each is called by one thread.
#pragma once

#include "cuda/ptx/device.h"

namespace anyflash {

/// Starts fetching a tensor map, which the first copy needs.
DEVICE void prefetch_tensor_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/// Copies the box at (column, row, head, batch) of a tensor to shared memory; zeros where it is
/// outside of the tensor. Its bytes count on `barrier`.
DEVICE void tma_load(uint32_t shared, const void* map, uint32_t barrier, int column, int row,
                     int head, int batch) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3,%4,%5,%6}], [%2];" ::"r"(shared),
               "l"(map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch)
               : "memory");
}

/// Copies a box of a ragged map (core/tensor_maps.h): the rows before `row`, all of the box but
/// `skip` of them, and zeros after these.
DEVICE void tma_load_ragged(uint32_t shared, const void* map, uint32_t barrier, int column,
                            int skip, int row, int head, int batch) {
  asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3,%4,%5,%6,%7}], [%2];" ::"r"(shared),
               "l"(map), "r"(barrier), "r"(column), "r"(skip), "r"(row), "r"(head), "r"(batch)
               : "memory");
}

/// Copies a box from shared memory; what is outside of the tensor is not written. Part of the group
/// that bulk_commit closes.
DEVICE void tma_store(const void* map, uint32_t shared, int column, int row, int head, int batch) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2,%3,%4,%5}], "
               "[%1];" ::"l"(map),
               "r"(shared), "r"(column), "r"(row), "r"(head), "r"(batch)
               : "memory");
}

/// Copies a run of bytes, a multiple of 16, both ends on 16, to shared memory; counts on `barrier`.
DEVICE void bulk_load(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
               "[%3];" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(barrier)
               : "memory");
}

/// Adds a run of floats in shared memory to one in global memory. Part of the group that
/// bulk_commit closes.
DEVICE void bulk_add(float* global, uint32_t shared, uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
      "r"(shared), "r"(bytes)
      : "memory");
}

/// Closes the group of stores and additions of this thread.
DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

/// Waits until all but the newest `pending` groups of this thread have read shared memory.
template <int pending>
DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
}

/// Waits until all but the newest `pending` groups of this thread have been written.
template <int pending>
DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
}

/// What this thread wrote to shared memory (or read from it) comes before what the copy engine and
/// wgmma do there after the next barrier.
DEVICE void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

} // namespace anyflash
