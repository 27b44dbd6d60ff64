// One thread block at work: its threads, its barriers, its shared memory, and what is on its way.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"
#include "machine.h"

namespace soft_gpu {

using Entry = void (*)(const void* params);

/// A launch: what all of its blocks share.
struct Launch {
  Entry entry;
  const void* params;
  Index grid;
  unsigned cluster; // blocks, neighbours along x
  unsigned threads, shared_bytes;
  unsigned seed;
};

/// A copy by the copy engine: `run` does it.
struct Copy {
  std::function<void()> run;
  uint32_t barrier = 0, bytes = 0; // of a load
  int thread = -1, group = 0;      // of a store: whose, and in which bulk group
  int rank = -1;                   // of the block whose barrier it is; -1: this one's
};

/// A copy of 16 bytes that a thread has started.
struct SmallCopy {
  uint32_t shared;
  const void* global;
  bool valid;
  int group;
};

struct Thread {
  enum State { ready, waiting, over };
  Fiber fiber;
  Index index{};
  State state = over;
  const char* waits_for = "";
  uint32_t waits_at = 0;
  std::deque<SmallCopy> copies;
  int copy_group = 0, bulk_group = 0;
  int fences = 0; // between what it wrote and what the copy engine and products read
};

/// Who wrote 16 bytes of shared memory last, if a thread did, and after how many of its fences.
struct Written {
  int thread = -1;
  int fences = 0;
};

/// What the lanes of a warp are about to do together.
struct Warp {
  int arrived = 0;
  Act act = nullptr;
  std::array<void*, warp_lanes> brought{};
};

struct NamedBarrier {
  int arrived = 0, threads = 0;
  std::vector<int> waiting;
};

struct MBarrier {
  int64_t arrivals = 0; // of each phase
  int64_t missing = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;
  std::vector<int> waiting;
};

/// The accumulators of products on their way, [64, n]; the registers are NaN meanwhile.
struct Sum {
  int n;
  std::vector<float> values;
};

constexpr int warpgroup_warps = warpgroup_lanes / warp_lanes;

/// A product on its way. It runs some time after all four warps have started it.
struct RunningProduct {
  Product lanes[warpgroup_lanes];
  uint32_t a[warpgroup_lanes][4]; // fragments as they were when it was started
  int group;
  int waits;                    // of each warp before it
  int started = 0, retired = 0; // warps
  bool done = false;
  std::shared_ptr<Sum> sum;
};

/// The products of a warpgroup. Each warp starts, commits and waits for itself; all must wait
/// equally often before a product (PTX ISA, "wgmma.wait_group": .aligned).
struct Products {
  struct Warp {
    size_t started = 0, retired = 0;             // products
    int group = 0;                               // of the next one
    int waits = 0;                               // so far
    std::map<float*, std::shared_ptr<Sum>> sums; // by the registers of its first lane
  };
  Warp warps[warpgroup_warps];
  std::deque<RunningProduct> running;
  size_t first = 0; // number of the first of these
  std::vector<int> waiting;
};

class Block;

/// Blocks side by side, each on a thread of the processor of its own; one of them moves at a time.
struct Cluster {
  std::mutex mutex;
  std::vector<Block*> blocks; // by rank; null before and after it runs
  size_t begun = 0;
  int arrived = 0; // threads at the cluster's barrier
  std::string fault;

  bool all_arrived() const;
  /// Nothing will ever move.
  bool is_stuck() const;
};

class Block {
public:
  /// Runs one block after the other; throws what() of the first fault.
  void run(const Launch& launch, Index index, Cluster& cluster);

  // For threads of the block; see machine.h.
  void together(Act act, void* mine);
  void barrier(int id, int threads, bool waits);
  MBarrier& mbarrier(uint32_t address);
  void settle(MBarrier& barrier);
  void wait(const char* what, uint32_t at = 0);
  void yield();
  void wake(std::vector<int>& threads);
  void start_copy(Copy copy);
  void run_copy(size_t i);
  void finish_copies(int thread, int group);
  void cluster_barrier();
  /// Another block, or this one.
  Block& member(int rank);
  [[noreturn]] void fail(const std::string& what);

  Thread& self() { return *threads_[static_cast<size_t>(current_)]; }
  int self_number() const { return current_; }
  Warp& warp() { return warps_[static_cast<size_t>(current_ / warp_lanes)]; }
  Products& products() { return products_[static_cast<size_t>(current_ / warpgroup_lanes)]; }
  bool chance() { return random_() & 1; }
  bool can_move() const;
  int alive() const { return alive_; }
  const Thread& thread(int number) const { return *threads_[static_cast<size_t>(number)]; }

  const Launch* launch = nullptr;
  Index index{};
  char* window = nullptr;       // the array in shared memory, once its address was asked for
  std::vector<Written> written; // by 16 bytes of it
  std::map<uint32_t, MBarrier> mbarriers;

private:
  void begin(const Launch& launch, Index index);
  void end();
  bool move();
  void open_cluster_barrier();
  bool run_warp(size_t warp);
  bool is_ready(size_t warp) const;
  std::span<const std::unique_ptr<Thread>> lanes_of(size_t warp) const {
    return std::span(threads_)
        .subspan(warp * warp_lanes)
        .first(std::min<size_t>(warp_lanes, static_cast<size_t>(count_) - warp * warp_lanes));
  }
  void thread_is_over();
  bool all_over() const { return alive_ == 0; }
  std::string who_waits() const;
  static void run_thread();

  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<Warp> warps_;
  std::vector<Products> products_;
  std::map<int, NamedBarrier> named_;
  std::deque<Copy> copies_;
  std::minstd_rand random_;
  int current_ = 0, count_ = 0, alive_ = 0;
  bool yielded_ = false, inside_ = false; // of a thread
  std::string fault_;
  Cluster* cluster_ = nullptr;
  std::vector<int> at_cluster_barrier_;
};

/// The block that this thread of the processor works on.
Block& block();

/// All blocks of a grid, on all processors. Throws std::runtime_error.
void run_grid(const Launch& launch);

} // namespace soft_gpu
