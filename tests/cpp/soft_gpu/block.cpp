#include "block.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>

namespace soft_gpu {
namespace {

thread_local Block* at_work = nullptr;

/// So long may all threads of a block look at memory that does not change.
constexpr auto patience = std::chrono::minutes(5);

} // namespace

Block& block() { return *at_work; }

void Block::run_thread() {
  Block& self = *at_work;
  self.launch->entry(self.launch->params);
  self.thread_is_over();
}

void Block::begin(const Launch& new_launch, Index new_index) {
  launch = &new_launch;
  index = new_index;
  window = nullptr;
  mbarriers.clear();
  named_.clear();
  copies_.clear();
  fault_.clear();
  at_cluster_barrier_.clear();
  random_.seed(new_launch.seed + 7919 * new_index.x);
  count_ = alive_ = static_cast<int>(new_launch.threads);
  while (threads_.size() < new_launch.threads) threads_.push_back(std::make_unique<Thread>());
  for (int i = 0; i < count_; ++i) {
    Thread& thread = *threads_[static_cast<size_t>(i)];
    thread.fiber.start(run_thread);
    thread.index = {static_cast<unsigned>(i), 0, 0};
    thread.state = Thread::ready;
    thread.copies.clear();
    thread.copy_group = thread.bulk_group = thread.fences = 0;
  }
  warps_.assign(static_cast<size_t>((count_ + warp_lanes - 1) / warp_lanes), Warp{});
  products_ = std::vector<Products>((warps_.size() + warpgroup_warps - 1) / warpgroup_warps);
}

void Block::run(const Launch& new_launch, Index new_index, Cluster& cluster) {
  at_work = this;
  cluster_ = &cluster;
  const size_t rank = new_index.x % new_launch.cluster;
  {
    const std::lock_guard lock(cluster.mutex);
    begin(new_launch, new_index);
    cluster.blocks[rank] = this;
    ++cluster.begun;
  }
  auto last_progress = std::chrono::steady_clock::now();
  while (!all_over() && fault_.empty()) {
    bool moved = false;
    {
      const std::lock_guard lock(cluster.mutex);
      if (!cluster.fault.empty()) break;
      try {
        moved = move();
      } catch (const std::exception& error) {
        fault_ = error.what();
      }
      if (fault_.empty() && !moved && cluster.is_stuck()) fault_ = "deadlock" + who_waits();
      if (!fault_.empty()) cluster.fault = "block " + std::to_string(index.x) + ": " + fault_;
    }
    const auto now = std::chrono::steady_clock::now();
    if (moved) {
      last_progress = now;
    } else {
      std::this_thread::yield();
      if (now - last_progress > patience)
        fault_ = "threads look at memory that does not change" + who_waits();
    }
  }
  const std::lock_guard lock(cluster.mutex);
  if (fault_.empty() && cluster.fault.empty()) end();
  if (!fault_.empty() && cluster.fault.empty())
    cluster.fault = "block " + std::to_string(index.x) + ": " + fault_;
  cluster.blocks[rank] = nullptr;
  if (!cluster.fault.empty()) throw std::runtime_error(cluster.fault);
}

/// Lets a warp run for a while, and copies. False if nothing did anything but look at memory.
bool Block::move() {
  std::vector<size_t> candidates;
  for (size_t w = 0; w < warps_.size(); ++w)
    if (is_ready(w)) candidates.push_back(w);
  bool moved = false;
  if (!candidates.empty()) moved = run_warp(candidates[random_() % candidates.size()]);
  while (fault_.empty() && !copies_.empty() && (candidates.empty() || chance())) {
    run_copy(random_() % copies_.size());
    moved = true;
    if (candidates.empty()) break;
  }
  return moved;
}

bool Block::can_move() const {
  if (!copies_.empty()) return true;
  for (size_t w = 0; w < warps_.size(); ++w)
    if (is_ready(w)) return true;
  return false;
}

bool Cluster::is_stuck() const {
  return begun == blocks.size() && std::none_of(blocks.begin(), blocks.end(),
                                                [](const Block* b) { return b && b->can_move(); });
}

bool Cluster::all_arrived() const {
  int alive = 0;
  for (const Block* b : blocks) alive += b ? b->alive() : 0;
  return begun == blocks.size() && arrived == alive;
}

Block& Block::member(int rank) {
  const auto place = static_cast<size_t>(rank);
  if (place >= cluster_->blocks.size()) fail("a cluster without block " + std::to_string(rank));
  Block* const it = cluster_->blocks[place];
  if (!it || it->all_over() || !it->window)
    fail("block " + std::to_string(rank) + " of the cluster does not run, or not yet");
  return *it;
}

void Block::cluster_barrier() {
  ++cluster_->arrived;
  at_cluster_barrier_.push_back(current_);
  if (cluster_->all_arrived())
    open_cluster_barrier();
  else
    wait("the cluster's barrier");
}

void Block::open_cluster_barrier() {
  cluster_->arrived = 0;
  for (Block* block : cluster_->blocks)
    if (block) block->wake(block->at_cluster_barrier_);
}

bool Block::is_ready(size_t warp) const {
  const auto lanes = lanes_of(warp);
  return std::any_of(lanes.begin(), lanes.end(), [](const std::unique_ptr<Thread>& thread) {
    return thread->state == Thread::ready;
  });
}

/// What must not be left when a block is over.
void Block::end() {
  if (!copies_.empty()) fault_ = "the block is over, and a copy that uses its shared memory is not";
  for (const Products& products : products_)
    if (!products.running.empty()) fault_ = "a warpgroup is over, and a product of it is not";
}

/// Runs the ready lanes of a warp, one after the other, a few times. True if one did anything but
/// look at memory.
bool Block::run_warp(size_t warp) {
  bool moved = false;
  for (unsigned rounds = 1 + static_cast<unsigned>(random_() % 64); rounds > 0; --rounds) {
    bool any = false, looked = false;
    for (const std::unique_ptr<Thread>& thread : lanes_of(warp)) {
      if (thread->state != Thread::ready) continue;
      current_ = static_cast<int>(thread->index.x);
      yielded_ = false;
      inside_ = true;
      thread->fiber.resume();
      inside_ = false;
      if (!fault_.empty()) return true;
      any = true;
      looked |= yielded_;
      moved |= !yielded_;
    }
    if (!any || looked) break;
  }
  return moved;
}

std::string Block::who_waits() const {
  std::map<std::string, std::vector<int>> waits;
  for (int i = 0; i < count_; ++i) {
    const Thread& thread = *threads_[static_cast<size_t>(i)];
    if (thread.state == Thread::over) continue;
    std::string what = thread.state == Thread::ready ? "looks at memory" : thread.waits_for;
    if (thread.state == Thread::waiting && thread.waits_at)
      what += " " + std::to_string(thread.waits_at);
    waits[what].push_back(i);
  }
  std::string text;
  for (const auto& [what, threads] : waits)
    text += "; " + std::to_string(threads.size()) + " threads from " +
            std::to_string(threads.front()) + " to " + std::to_string(threads.back()) + ": " + what;
  return text;
}

void Block::fail(const std::string& what) {
  if (!inside_) throw std::runtime_error(what);
  fault_ = "thread " + std::to_string(current_) + ": " + what;
  while (true) Fiber::stop(); // nobody resumes it
}

void Block::wait(const char* what, uint32_t at) {
  self().state = Thread::waiting;
  self().waits_for = what;
  self().waits_at = at;
  Fiber::stop();
}

void Block::yield() {
  yielded_ = true;
  Fiber::stop();
}

void Block::wake(std::vector<int>& threads) {
  for (int i : threads) threads_[static_cast<size_t>(i)]->state = Thread::ready;
  threads.clear();
}

/// A thread is over: those that are left do without it.
void Block::thread_is_over() {
  Thread& thread = self();
  if (std::any_of(copies_.begin(), copies_.end(),
                  [&](const Copy& copy) { return copy.thread == current_; }))
    fault_ = "thread " + std::to_string(current_) +
             " is over, and shared memory that it copies from may be gone before the copy";
  thread.state = Thread::over;
  --alive_;
  if (warp().arrived > 0)
    fault_ = "thread " + std::to_string(current_) +
             " is over, and its warp waits for it to do something together";
  if (NamedBarrier& all = named_[0]; all.arrived > 0 && all.arrived == alive_) {
    all.arrived = 0;
    wake(all.waiting);
  }
  if (cluster_->arrived > 0 && cluster_->all_arrived()) open_cluster_barrier();
}

void Block::together(Act act, void* mine) {
  Warp& warp = this->warp();
  if (warp.arrived > 0 && warp.act != act) fail("lanes of a warp do different things together");
  warp.act = act;
  warp.brought[static_cast<size_t>(current_ % warp_lanes)] = mine ? mine : &warp;
  ++warp.arrived;
  const auto lanes = lanes_of(static_cast<size_t>(current_ / warp_lanes));
  const auto here = std::count_if(lanes.begin(), lanes.end(),
                                  [](const auto& thread) { return thread->state != Thread::over; });
  if (warp.arrived < here) return wait("lanes of its warp");
  act(warp.brought.data());
  warp.arrived = 0;
  warp.brought.fill(nullptr);
  for (const std::unique_ptr<Thread>& thread : lanes)
    if (thread->state == Thread::waiting) thread->state = Thread::ready;
}

void Block::barrier(int id, int threads, bool waits) {
  NamedBarrier& barrier = named_[id];
  const int wanted = threads ? threads : alive_;
  if (wanted % warp_lanes && threads)
    fail("a named barrier of a number of threads that is no multiple of 32");
  if (barrier.arrived > 0 && barrier.threads != wanted && threads)
    fail("threads come to a named barrier with different numbers of threads");
  barrier.threads = wanted;
  if (++barrier.arrived == wanted) {
    barrier.arrived = 0;
    return wake(barrier.waiting);
  }
  if (!waits) return;
  barrier.waiting.push_back(current_);
  wait("named barrier", static_cast<uint32_t>(id));
}

MBarrier& Block::mbarrier(uint32_t address) {
  const auto found = mbarriers.find(address);
  if (found == mbarriers.end()) fail("no mbarrier at " + std::to_string(address));
  return found->second;
}

/// Ends the phase if everything has come.
void Block::settle(MBarrier& barrier) {
  if (barrier.missing > 0 || barrier.bytes != 0) return;
  if (barrier.missing < 0) fail("more arrivals at an mbarrier than it counts");
  ++barrier.phase;
  barrier.missing = barrier.arrivals;
  wake(barrier.waiting);
}

void Block::start_copy(Copy copy) { copies_.push_back(std::move(copy)); }

void Block::run_copy(size_t i) {
  const Copy copy = std::move(copies_[i]);
  copies_.erase(copies_.begin() + static_cast<std::ptrdiff_t>(i));
  copy.run();
  if (!copy.barrier) return;
  Block& there = copy.rank < 0 ? *this : member(copy.rank);
  MBarrier& barrier = there.mbarriers.at(copy.barrier);
  barrier.bytes -= copy.bytes;
  if (barrier.bytes == 0 && barrier.missing == 0) there.settle(barrier);
}

/// Everything that a thread has in its bulk groups up to `group`.
void Block::finish_copies(int thread, int group) {
  for (size_t i = 0; i < copies_.size();) {
    if (copies_[i].thread == thread && copies_[i].group <= group)
      run_copy(i);
    else
      ++i;
  }
}

void run_grid(const Launch& launch) {
  const unsigned blocks = launch.grid.x * launch.grid.y * launch.grid.z;
  if (launch.grid.x % launch.cluster) throw std::runtime_error("a grid of broken clusters");
  std::vector<Cluster> clusters(blocks / launch.cluster);
  for (Cluster& cluster : clusters) cluster.blocks.resize(launch.cluster);
  // More than there are processors: blocks then run side by side in ever other orders.
  const unsigned multiprocessors = 8;
  const unsigned groups =
      std::min(multiprocessors / launch.cluster, static_cast<unsigned>(clusters.size()));
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::string fault;
  const auto work = [&](unsigned multiprocessor) {
    static thread_local Block own;
    const unsigned rank = multiprocessor % launch.cluster;
    for (unsigned i = multiprocessor / launch.cluster; i < clusters.size() && !failed;
         i += groups) {
      const unsigned b = i * launch.cluster + rank;
      try {
        own.run(launch,
                {b % launch.grid.x, b / launch.grid.x % launch.grid.y,
                 b / launch.grid.x / launch.grid.y},
                clusters[i]);
      } catch (const std::exception& error) {
        const std::lock_guard lock(mutex);
        if (fault.empty()) fault = error.what();
        failed = true;
      }
    }
  };
  std::vector<std::thread> helpers;
  for (unsigned i = 1; i < groups * launch.cluster; ++i) helpers.emplace_back(work, i);
  if (groups > 0) work(0);
  for (std::thread& helper : helpers) helper.join();
  if (!fault.empty()) throw std::runtime_error(fault);
}

} // namespace soft_gpu
