// A GPU in software, as the instruction headers of this folder (cuda/ptx) see it: the threads of a
// block are fibers of one thread of the processor, and whatever the hardware may do late is done at
// a random moment between the first and the last that it may choose. What lands late is NaN before.
//
// Every function is called by a running GPU thread. A fault (a deadlock, an access outside of
// shared memory, lanes that part ways) ends the launch with an error that says who waited for what.
#pragma once

#include <cstddef>
#include <cstdint>

namespace soft_gpu {

struct Index {
  unsigned x, y, z;
};

Index thread_index();
Index block_index();
Index grid_size();

/// Ends the launch.
[[noreturn]] void fault(const char* what);

/// Lets other threads run: for who looks at memory again and again.
void yield();

// Things that the lanes of a warp do together: the last of them to come runs `act` on what each of
// them brought; null for lanes that are over.

constexpr int warp_lanes = 32, warpgroup_lanes = 128;
using Act = void (*)(void* const* lanes);
void warp_together(Act act, void* mine);

// Shared memory. Addresses are those of PTX: 32-bit, from the block's window.

/// The address of a place in the block's only array in shared memory.
uint32_t shared_address(const void* place);
/// Where it is; a fault if [address, address + bytes) leaves the window or is not aligned to
/// `alignment`.
char* shared_place(uint32_t address, uint32_t bytes, uint32_t alignment);
/// The same for what a thread (of this warp: a lane) writes there.
char* shared_target(uint32_t address, uint32_t bytes, uint32_t alignment);
char* shared_target(uint32_t address, uint32_t bytes, uint32_t alignment, int lane);

// Barriers.

/// Barrier `id` of the block is over when `threads` threads have come, waiting or not; 0 threads:
/// all that are not over.
void block_barrier(int id, int threads, bool waits);

void mbarrier_init(uint32_t barrier, uint32_t arrivals);
void mbarrier_arrive(uint32_t barrier, uint32_t bytes);
void mbarrier_wait(uint32_t barrier, uint32_t parity);

// Copies.

/// 16 bytes to shared memory, in the thread's current group of copies.
void copy_async(uint32_t shared, const void* global, bool valid);
void copy_async_commit();
void copy_async_wait(int pending);

/// A box of a tensor to shared memory; its bytes count on `barrier`.
void load_box(uint32_t shared, const void* map, uint32_t barrier, const int* coordinates, int rank);
void load_bytes(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier);
/// From shared memory, in the thread's current bulk group.
void store_box(const void* map, uint32_t shared, const int* coordinates, int rank);
void add_floats(float* global, uint32_t shared, uint32_t bytes);
void bulk_commit();
void bulk_wait(int pending);
/// What this thread wrote to shared memory before may be read by the copy engine and by products of
/// warpgroups; without it that is a fault.
void fence_async();

// Other blocks of the cluster. An address there is one here and the rank of the block.

uint32_t cluster_address(int rank, uint32_t address);
/// Waits for all threads of all blocks that are not over.
void cluster_barrier();
void cluster_store(uint32_t there, uint32_t value);
void cluster_arrive(uint32_t there, uint32_t bytes);
/// From this block's shared memory; counts on a barrier of the other block.
void cluster_copy(uint32_t there, uint32_t shared, uint32_t bytes, uint32_t barrier_there);

// Products of a warpgroup.

struct Product {
  float* d;          // this lane's accumulators
  const uint32_t* a; // this lane's fragments; null: `a_shared` describes A
  uint64_t a_shared, b_shared;
  int n;                     // columns of B
  bool a_by_rows, b_by_rows; // the operand in shared memory is stored by its k
  bool is_bf16, accumulate;
};
void start_product(Product& mine);
void products_commit();
void products_wait(int pending);

float to_float(uint16_t bits, bool is_bf16);
uint16_t to_half(float x, bool is_bf16);

} // namespace soft_gpu
