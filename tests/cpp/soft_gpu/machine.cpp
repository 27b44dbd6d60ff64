#include "machine.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "../fake_driver/fake_cuda.h"
#include "block.h"
#include "cpu/convert.h"

namespace soft_gpu {
namespace {

constexpr uint32_t window_begin = 1024, window_end = window_begin + (227 << 10);
constexpr unsigned char nothing = 0xff; // bytes of NaN in every type

Thread& self() { return block().self(); }

/// Moves the 16-byte chunks of 8 rows against each other, as tiles in shared memory are stored.
uint32_t swizzle(uint32_t address, unsigned bytes) {
  const uint32_t mask = bytes == 128 ? 7 : bytes == 64 ? 3 : 0;
  return address ^ (address >> 7 & mask) << 4;
}

} // namespace

Index thread_index() { return self().index; }
Index block_index() { return block().index; }
Index grid_size() { return block().launch->grid; }
void fault(const char* what) { block().fail(what); }
void yield() { block().yield(); }

void warp_together(Act act, void* mine) { block().together(act, mine); }

// Shared memory

uint32_t shared_address(const void* place) {
  Block& b = block();
  char* const memory = static_cast<char*>(const_cast<void*>(place));
  if (!b.window) {
    b.window = memory;
    std::memset(memory, nothing, b.launch->shared_bytes);
    b.written.assign((window_end - window_begin) / 16, Written{});
  }
  if (memory != b.window) fault("a block with two arrays in shared memory");
  return window_begin;
}

namespace {

/// In the shared memory of any block.
char* place_of(const Block& b, uint32_t address, uint32_t bytes, uint32_t alignment) {
  const uint32_t end = b.launch->shared_bytes ? window_begin + b.launch->shared_bytes : window_end;
  if (!b.window || address < window_begin || address + bytes > end)
    block().fail("outside of shared memory: " + std::to_string(bytes) + " bytes at " +
                 std::to_string(address) + " of [" + std::to_string(window_begin) + ", " +
                 std::to_string(end) + ")");
  if (address % alignment)
    block().fail("shared address " + std::to_string(address) + " is not on " +
                 std::to_string(alignment) + " bytes");
  return b.window + (address - window_begin);
}

} // namespace

char* shared_place(uint32_t address, uint32_t bytes, uint32_t alignment) {
  return place_of(block(), address, bytes, alignment);
}

char* shared_target(uint32_t address, uint32_t bytes, uint32_t alignment, int lane) {
  Block& b = block();
  const int thread = b.self_number() / warp_lanes * warp_lanes + lane;
  char* const place = shared_place(address, bytes, alignment);
  b.written[(address - window_begin) / 16] = {thread, b.thread(thread).fences};
  return place;
}
char* shared_target(uint32_t address, uint32_t bytes, uint32_t alignment) {
  return shared_target(address, bytes, alignment, block().self_number() % warp_lanes);
}

namespace {

/// For the copy engine and products of warpgroups, which see what a thread wrote only after a fence
/// of that thread.
char* read_by_engines(uint32_t address, uint32_t bytes, uint32_t alignment) {
  Block& b = block();
  char* const place = shared_place(address, bytes, alignment);
  for (uint32_t i = (address - window_begin) / 16; i <= (address + bytes - 1 - window_begin) / 16;
       ++i)
    if (const Written& last = b.written[i];
        last.thread >= 0 && b.thread(last.thread).fences == last.fences)
      b.fail("shared memory at " + std::to_string(window_begin + 16 * i) + ", written by thread " +
             std::to_string(last.thread) + ", is read by a copy or a product without a fence");
  return place;
}

/// For what copies write to the shared memory of a block.
char* written_by_engines(Block& b, uint32_t address, uint32_t bytes, uint32_t alignment) {
  char* const place = place_of(b, address, bytes, alignment);
  for (uint32_t i = (address - window_begin) / 16; i <= (address + bytes - 1 - window_begin) / 16;
       ++i)
    b.written[i] = {};
  return place;
}
char* written_by_engines(uint32_t address, uint32_t bytes, uint32_t alignment) {
  return written_by_engines(block(), address, bytes, alignment);
}

} // namespace

// Barriers

void block_barrier(int id, int threads, bool waits) { block().barrier(id, threads, waits); }

void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  shared_place(barrier, 8, 8);
  MBarrier& fresh = block().mbarriers[barrier];
  if (!fresh.waiting.empty()) fault("an mbarrier that threads wait for is initialised");
  fresh = {};
  fresh.arrivals = fresh.missing = arrivals;
}

void mbarrier_arrive(uint32_t barrier, uint32_t bytes) {
  MBarrier& it = block().mbarrier(barrier);
  it.bytes += bytes;
  if (--it.missing < 0) fault("more arrivals at an mbarrier than it counts");
  block().settle(it);
}

void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  MBarrier& it = block().mbarrier(barrier);
  if (parity > 1) fault("a parity that is neither 0 nor 1");
  while ((it.phase & 1) == parity) {
    it.waiting.push_back(block().self_number());
    block().wait("mbarrier", barrier);
  }
}

// Copies by threads

namespace {
void run(const SmallCopy& copy) {
  char* const to = shared_place(copy.shared, 16, 16);
  if (copy.valid)
    std::memcpy(to, copy.global, 16);
  else
    std::memset(to, 0, 16);
}
} // namespace

void copy_async(uint32_t shared, const void* global, bool valid) {
  if (valid && reinterpret_cast<uintptr_t>(global) % 16) fault("cp.async not from 16 bytes");
  const SmallCopy copy{shared, global, valid, self().copy_group};
  std::memset(written_by_engines(shared, 16, 16), nothing, 16);
  if (block().chance())
    run(copy);
  else
    self().copies.push_back(copy);
}

void copy_async_commit() { ++self().copy_group; }

void copy_async_wait(int pending) {
  std::deque<SmallCopy>& copies = self().copies;
  for (; !copies.empty() && copies.front().group < self().copy_group - pending; copies.pop_front())
    run(copies.front());
}

// Copies by the copy engine

namespace {

/// Calls act(shared address, global address or null) for each element of a box.
template <class Act2>
void for_each_element(uint32_t shared, const fake_cuda::TensorMap& map, const int* coordinates,
                      Act2 act) {
  int at[5] = {};
  uint32_t number = 0;
  while (true) {
    bool inside = true;
    int64_t offset = 0;
    for (int i = 0; i < map.rank; ++i) {
      const int64_t place = int64_t{coordinates[i]} + at[i];
      inside &= place >= 0 && place < map.sizes[i];
      offset += place * (i == 0 ? 2 : static_cast<int64_t>(map.strides[i - 1]));
    }
    act(swizzle(shared + 2 * number++, map.swizzle_bytes), inside ? map.data + offset : nullptr);
    int i = 0;
    for (; i < map.rank && ++at[i] == map.box[i]; ++i) at[i] = 0;
    if (i == map.rank) return;
  }
}

uint32_t box_bytes(const fake_cuda::TensorMap& map) {
  uint32_t bytes = 2;
  for (int i = 0; i < map.rank; ++i) bytes *= map.box[i];
  return bytes;
}

struct Box {
  fake_cuda::TensorMap map;
  int coordinates[5];
};

Box box_of(const void* map, const int* coordinates, int rank) {
  Box box{};
  std::memcpy(&box.map, map, sizeof box.map);
  if (box.map.rank != rank) fault("a tensor map of another rank");
  std::copy(coordinates, coordinates + rank, box.coordinates);
  return box;
}

/// True if all of it is outside of its tensor.
bool is_empty(const Box& box) {
  for (int i = 0; i < box.map.rank; ++i)
    if (box.coordinates[i] >= static_cast<int64_t>(box.map.sizes[i]) ||
        box.coordinates[i] + static_cast<int64_t>(box.map.box[i]) <= 0)
      return true;
  return false;
}

} // namespace

void load_box(uint32_t shared, const void* map, uint32_t barrier, const int* coordinates,
              int rank) {
  const Box box = box_of(map, coordinates, rank);
  if (rank == 5 && is_empty(box)) fault("an empty box of a ragged map (core/tensor_maps.h)");
  const uint32_t bytes = box_bytes(box.map);
  block().mbarrier(barrier);
  std::memset(written_by_engines(shared, bytes, 128), nothing, bytes);
  const auto run = [=] {
    for_each_element(shared, box.map, box.coordinates, [](uint32_t to, const char* from) {
      if (from)
        std::memcpy(shared_place(to, 2, 2), from, 2);
      else
        std::memset(shared_place(to, 2, 2), 0, 2);
    });
  };
  block().start_copy({run, barrier, bytes, -1, 0});
}

void load_bytes(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
  if (bytes % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    fault("a bulk copy that is not in units of 16 bytes");
  std::memset(written_by_engines(shared, bytes, 16), nothing, bytes);
  const auto run = [=] { std::memcpy(shared_place(shared, bytes, 16), global, bytes); };
  block().mbarrier(barrier);
  block().start_copy({run, barrier, bytes, -1, 0});
}

void store_box(const void* map, uint32_t shared, const int* coordinates, int rank) {
  const Box box = box_of(map, coordinates, rank);
  shared_place(shared, box_bytes(box.map), 128);
  const auto run = [=] {
    for_each_element(shared, box.map, box.coordinates, [](uint32_t from, char* to) {
      if (to) std::memcpy(to, read_by_engines(from, 2, 2), 2);
    });
  };
  block().start_copy({run, 0, 0, block().self_number(), self().bulk_group});
}

void add_floats(float* global, uint32_t shared, uint32_t bytes) {
  if (bytes % 16 || reinterpret_cast<uintptr_t>(global) % 16)
    fault("a bulk addition that is not in units of 16 bytes");
  const auto run = [=] {
    const auto* from = reinterpret_cast<const float*>(read_by_engines(shared, bytes, 16));
    for (uint32_t i = 0; i < bytes / 4; ++i)
      std::atomic_ref<float>(global[i]).fetch_add(from[i], std::memory_order_relaxed);
  };
  block().start_copy({run, 0, 0, block().self_number(), self().bulk_group});
}

void bulk_commit() { ++self().bulk_group; }

void bulk_wait(int pending) {
  block().finish_copies(block().self_number(), self().bulk_group - pending - 1);
}

void fence_async() { ++self().fences; }

// Clusters

namespace {

constexpr int rank_shift = 24;

struct There {
  int rank;
  Block& block;
  uint32_t address;
};

There at(uint32_t address) {
  const int rank = static_cast<int>(address >> rank_shift) - 1;
  if (rank < 0) fault("an address of no block of the cluster");
  return {rank, block().member(rank), address & ((1u << rank_shift) - 1)};
}

} // namespace

uint32_t cluster_address(int rank, uint32_t address) {
  return address + (static_cast<uint32_t>(rank + 1) << rank_shift);
}

void cluster_barrier() { block().cluster_barrier(); }

void cluster_store(uint32_t there, uint32_t value) {
  const There to = at(there);
  std::memcpy(place_of(to.block, to.address, 4, 4), &value, 4);
}

void cluster_arrive(uint32_t there, uint32_t bytes) {
  const There to = at(there);
  const auto found = to.block.mbarriers.find(to.address);
  if (found == to.block.mbarriers.end()) fault("no mbarrier there");
  found->second.bytes += bytes;
  if (--found->second.missing < 0) fault("more arrivals at an mbarrier than it counts");
  to.block.settle(found->second);
}

void cluster_copy(uint32_t there, uint32_t shared, uint32_t bytes, uint32_t barrier_there) {
  if (bytes % 16) fault("a bulk copy that is not in units of 16 bytes");
  const There to = at(there), barrier = at(barrier_there);
  if (to.rank != barrier.rank || !barrier.block.mbarriers.contains(barrier.address))
    fault("a copy to another block without a barrier there");
  read_by_engines(shared, bytes, 16);
  std::memset(written_by_engines(to.block, to.address, bytes, 16), nothing, bytes);
  const auto run = [=, rank = to.rank, address = to.address] {
    std::memcpy(place_of(block().member(rank), address, bytes, 16),
                read_by_engines(shared, bytes, 16), bytes);
  };
  block().start_copy({run, barrier.address, bytes, -1, 0, barrier.rank});
}

// Products

float to_float(uint16_t bits, bool is_bf16) {
  return is_bf16 ? anyflash::cpu::to_float(anyflash::cpu::BFloat16{bits})
                 : anyflash::cpu::to_float(anyflash::cpu::Float16{bits});
}

uint16_t to_half(float x, bool is_bf16) {
  return is_bf16 ? anyflash::cpu::to_bfloat16(x).bits : anyflash::cpu::to_float16(x).bits;
}

namespace {

constexpr int rows = 64, depth = 16; // of a product

/// Where element (i, k) of an operand lies; i runs over the rows of A or the columns of B.
class Descriptor {
public:
  Descriptor(uint64_t bits, bool by_rows)
      : begin_(static_cast<uint32_t>(bits & 0x3fff) << 4),
        leading_(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
        stride_(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4),
        swizzle_(bits >> 62 == 1 ? 128 : 64), by_rows_(by_rows) {
    if (bits >> 62 != 1 && bits >> 62 != 2) fault("a descriptor with another swizzle");
  }

  float read(int i, int k, bool is_bf16) const {
    const int line = by_rows_ ? k : i, along = by_rows_ ? i : k;
    const int page = static_cast<int>(swizzle_) / 2; // elements of a line
    uint32_t address = begin_ + static_cast<uint32_t>(line / 8) * stride_ +
                       static_cast<uint32_t>(line % 8) * swizzle_;
    address += by_rows_ ? static_cast<uint32_t>(along / page) * leading_ +
                              static_cast<uint32_t>(along % page) * 2
                        : static_cast<uint32_t>(along) * 2;
    uint16_t bits;
    std::memcpy(&bits, read_by_engines(swizzle(address, swizzle_), 2, 2), 2);
    return to_float(bits, is_bf16);
  }

private:
  uint32_t begin_, leading_, stride_;
  unsigned swizzle_;
  bool by_rows_;
};

void compute(RunningProduct& product) {
  Sum& sum = *product.sum;
  const Product& first = product.lanes[0];
  float a[rows][depth];
  if (first.a) {
    for (int lane = 0; lane < warpgroup_lanes; ++lane)
      for (int e = 0; e < 4; ++e)
        for (int half = 0; half < 2; ++half) {
          const int row = lane / 32 * 16 + lane % 32 / 4 + e % 2 * 8;
          const uint32_t pair = product.a[lane][e];
          a[row][lane % 4 * 2 + e / 2 * 8 + half] =
              to_float(static_cast<uint16_t>(pair >> 16 * half), first.is_bf16);
        }
  } else {
    const Descriptor from(first.a_shared, first.a_by_rows);
    for (int i = 0; i < rows; ++i)
      for (int k = 0; k < depth; ++k) a[i][k] = from.read(i, k, first.is_bf16);
  }
  const Descriptor from(first.b_shared, first.b_by_rows);
  std::vector<float> b(static_cast<size_t>(depth * first.n));
  for (int k = 0; k < depth; ++k)
    for (int j = 0; j < first.n; ++j)
      b[static_cast<size_t>(k * first.n + j)] = from.read(j, k, first.is_bf16);
  if (!first.accumulate) std::fill(sum.values.begin(), sum.values.end(), 0.0f);
  for (int i = 0; i < rows; ++i) {
    float* const d = &sum.values[static_cast<size_t>(i * first.n)];
    for (int k = 0; k < depth; ++k) {
      const float x = a[i][k];
      const float* const y = &b[static_cast<size_t>(k * first.n)];
      for (int j = 0; j < first.n; ++j) d[j] += x * y[j];
    }
  }
  product.done = true;
}

/// The element of [64, n] that accumulator i of a lane is.
size_t place_of(int lane, int i, int n) {
  const int row = lane / 32 * 16 + lane % 32 / 4 + i / 2 % 2 * 8;
  return static_cast<size_t>(row * n + i / 4 * 8 + lane % 4 * 2 + i % 2);
}

/// Those that all warps have started may run, in their order.
void run_products(Products& products, int last_group) {
  for (RunningProduct& product : products.running) {
    if (product.started < warpgroup_warps || product.group > last_group) return;
    if (!product.done) compute(product);
  }
}

int warp_of_group() { return block().self_number() % warpgroup_lanes / warp_lanes; }

/// Takes the accumulators of a warp out of its registers, and leaves NaN there.
void take(RunningProduct& product, int warp, bool fresh) {
  Sum& sum = *product.sum;
  for (int lane = warp * warp_lanes; lane < (warp + 1) * warp_lanes; ++lane)
    for (int i = 0; i < sum.n / 2; ++i) {
      float& d = product.lanes[lane].d[i];
      if (fresh) sum.values[place_of(lane, i, sum.n)] = d;
      d = std::numeric_limits<float>::quiet_NaN();
    }
}

void start(void* const* lanes) {
  Products& products = block().products();
  const int number = warp_of_group();
  Products::Warp& warp = products.warps[number];
  const size_t at = warp.started++ - products.first;
  if (!lanes[0]) fault("wgmma without all lanes");
  const Product& first = *static_cast<const Product*>(lanes[0]);
  const auto found = warp.sums.find(first.d);
  const bool fresh = found == warp.sums.end();
  if (at == products.running.size()) {
    RunningProduct& product = products.running.emplace_back();
    product.group = warp.group;
    product.waits = warp.waits;
    product.sum = fresh ? std::make_shared<Sum>(
                              Sum{first.n, std::vector<float>(static_cast<size_t>(rows * first.n))})
                        : found->second;
    product.lanes[0] = first;
  }
  RunningProduct& product = products.running[at];
  const Product& model = product.lanes[0];
  for (int i = 0; i < warp_lanes; ++i) {
    if (!lanes[i]) fault("wgmma without all lanes");
    const Product& mine = *static_cast<const Product*>(lanes[i]);
    if (mine.n != model.n || mine.b_shared != model.b_shared || mine.a_shared != model.a_shared ||
        mine.accumulate != model.accumulate || product.group != warp.group)
      fault("lanes of a warpgroup start different products");
    product.lanes[number * warp_lanes + i] = mine;
    if (mine.a) std::copy(mine.a, mine.a + 4, product.a[number * warp_lanes + i]);
  }
  if (product.waits != warp.waits)
    fault("a wait for products in a branch that not all warps of the warpgroup took");
  if (fresh)
    warp.sums[first.d] = product.sum;
  else if (found->second != product.sum || product.sum->n != first.n)
    fault("products on their way share accumulators in different ways");
  take(product, number, fresh);
  if (++product.started < warpgroup_warps) return;
  if (block().chance()) run_products(products, product.group);
  block().wake(products.waiting);
}

/// Ends products of this warp up to a group, and gives their accumulators back.
void retire(Products& products, int last_group) {
  run_products(products, last_group);
  const int number = warp_of_group();
  Products::Warp& warp = products.warps[number];
  const int first_lane = number * warp_lanes;
  for (; warp.retired < warp.started; ++warp.retired) {
    RunningProduct& product = products.running[warp.retired - products.first];
    if (product.group > last_group) break;
    ++product.retired;
    bool last = true;
    for (size_t i = warp.retired + 1; i < warp.started; ++i)
      last &= products.running[i - products.first].sum != product.sum;
    if (!last) continue;
    const Sum& sum = *product.sum;
    for (int lane = first_lane; lane < first_lane + warp_lanes; ++lane)
      for (int i = 0; i < sum.n / 2; ++i)
        product.lanes[lane].d[i] = sum.values[place_of(lane, i, sum.n)];
    warp.sums.erase(product.lanes[first_lane].d);
  }
  while (!products.running.empty() && products.running.front().retired == warpgroup_warps) {
    products.running.pop_front();
    ++products.first;
  }
}

/// True once all warps have started what this warp has in groups up to the last.
bool all_started(const Products& products, int last_group) {
  return std::all_of(products.running.begin(), products.running.end(),
                     [&](const RunningProduct& product) {
                       return product.group > last_group || product.started == warpgroup_warps;
                     });
}

struct Wait {
  int last_group;
};

} // namespace

void start_product(Product& mine) { warp_together(start, &mine); }

void products_commit() {
  warp_together([](void* const*) { ++block().products().warps[warp_of_group()].group; }, nullptr);
}

void products_wait(int pending) {
  Products& products = block().products();
  Wait mine{products.warps[warp_of_group()].group - pending - 1};
  while (!all_started(products, mine.last_group)) {
    products.waiting.push_back(block().self_number());
    block().wait("a product that not all warps have started");
  }
  warp_together(
      [](void* const* lanes) {
        Products& all = block().products();
        retire(all, static_cast<const Wait*>(lanes[0])->last_group);
        ++all.warps[warp_of_group()].waits;
      },
      &mine);
}

} // namespace soft_gpu
