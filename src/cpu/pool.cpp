// NOTE: what can go wrong with a pool in a library, and what is done about it:
//   fork        threads do not exist in the child: it leaves the old pool alone and makes its own
//   exit        the workers are stopped and joined; later calls run on their caller alone
//   no threads  if the system refuses a thread, the work is done by those there are
#include "cpu/pool.h"

#include <algorithm>
#include <atomic>
#include <charconv>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

#include "core/error.h"

namespace anyflash::cpu {

Scratch::~Scratch() { ::operator delete(data_, std::align_val_t{64}); }

float* Scratch::floats(int64_t count) {
  if (count > capacity_) {
    ::operator delete(data_, std::align_val_t{64});
    data_ = nullptr;
    capacity_ = 0;
    data_ = static_cast<float*>(
        ::operator new(static_cast<size_t>(count) * sizeof(float), std::align_val_t{64}));
    capacity_ = count;
  }
  return data_;
}

namespace {

/// One call of run_tasks: lives on its caller's stack. The pool's mutex guards all but `next`.
struct Job {
  const Task& task;
  const int64_t count;
  int wanted;                   // workers that may still join
  std::atomic<int64_t> next{0}; // first index that nobody has taken
  int working = 0;              // workers inside
  std::exception_ptr error = nullptr;

  bool open() const { return wanted > 0 && next.load(std::memory_order_relaxed) < count; }
};

/// Scratch of the callers, one for each that runs at the same time.
struct SpareScratch {
  Scratch scratch;
  std::unique_ptr<SpareScratch> rest; // a list, so that giving back cannot fail
};

/// The pool owns it, not the thread: in a forked child there is no thread.
struct Worker {
  Scratch scratch;
  std::thread thread;
};

class Pool {
public:
  void run(int64_t count, int threads, const Task& task) {
    Job job{task, count, threads - 1};
    std::unique_lock lock(mutex_);
    std::unique_ptr<SpareScratch> mine = take_spare();
    if (threads > 1 && !stopped_) {
      add_workers(threads - 1);
      jobs_.push_back(&job);
      wake_.notify_all();
    }
    work(job, lock, mine->scratch);
    std::erase(jobs_, &job);
    done_.wait(lock, [&] { return job.working == 0; });
    mine->rest = std::move(spare_);
    spare_ = std::move(mine);
    lock.unlock();
    if (job.error) std::rethrow_exception(job.error);
  }

  void stop() {
    std::unique_lock lock(mutex_);
    stopped_ = true;
    const std::vector<std::unique_ptr<Worker>> workers = std::move(workers_);
    lock.unlock();
    wake_.notify_all();
    for (const std::unique_ptr<Worker>& worker : workers) worker->thread.join();
  }

  Pool* before_fork = nullptr; // the parent's: kept reachable, never touched

private:
  void add_workers(int wanted) {
    try {
      while (static_cast<int>(workers_.size()) < wanted) {
        auto worker = std::make_unique<Worker>();
        workers_.reserve(workers_.size() + 1); // a thread that runs must be kept
        worker->thread = std::thread([this, &scratch = worker->scratch] { serve(scratch); });
        workers_.push_back(std::move(worker));
      }
    } catch (const std::system_error&) { // fewer threads, then
    }
  }

  /// A worker's life: helps the oldest job that wants help.
  void serve(Scratch& scratch) {
    std::unique_lock lock(mutex_);
    while (true) {
      Job* job = nullptr;
      wake_.wait(lock, [&] { return (job = find_job()) || stopped_; });
      if (!job) return;
      --job->wanted;
      ++job->working;
      work(*job, lock, scratch);
      if (--job->working == 0) done_.notify_all();
    }
  }

  Job* find_job() const {
    for (Job* job : jobs_)
      if (job->open()) return job;
    return nullptr;
  }

  /// Takes indices until none is left. Entered and left with the lock held; works without it.
  static void work(Job& job, std::unique_lock<std::mutex>& lock, Scratch& scratch) {
    lock.unlock();
    std::exception_ptr error;
    try {
      for (int64_t i; (i = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count;)
        job.task(i, scratch);
    } catch (...) {
      error = std::current_exception();
      job.next.store(job.count, std::memory_order_relaxed);
    }
    lock.lock();
    if (error && !job.error) job.error = error;
  }

  std::unique_ptr<SpareScratch> take_spare() {
    if (!spare_) return std::make_unique<SpareScratch>();
    std::unique_ptr<SpareScratch> taken = std::move(spare_);
    spare_ = std::move(taken->rest);
    return taken;
  }

  std::mutex mutex_;
  std::condition_variable wake_; // a job came, or the end
  std::condition_variable done_; // a worker left a job
  std::vector<std::unique_ptr<Worker>> workers_;
  std::vector<Job*> jobs_;
  std::unique_ptr<SpareScratch> spare_;
  bool stopped_ = false;
};

std::atomic<Pool*> current{nullptr};
Pool* abandoned = nullptr; // pools of the processes that this one was forked from

[[maybe_unused]] void leave_pool_to_parent() {
  Pool* pool = current.exchange(nullptr);
  if (!pool) return;
  pool->before_fork = abandoned;
  abandoned = pool;
}

Pool& pool() {
  Pool* found = current.load(std::memory_order_acquire);
  if (found) return *found;
  auto fresh = std::make_unique<Pool>();
  if (current.compare_exchange_strong(found, fresh.get(), std::memory_order_acq_rel))
    return *fresh.release();
  return *found;
}

#if !defined(_WIN32) // there, nothing forks, and the system has ended the threads before it unloads
/// From the library's loading to the end of the process or of the library.
struct Lifetime {
  Lifetime() { pthread_atfork(nullptr, nullptr, leave_pool_to_parent); }
  /// Joins the workers. The pool itself stays: a thread that outlives this may still be in it.
  ~Lifetime() {
    if (Pool* pool = current.load()) pool->stop();
  }
} lifetime;
#endif

int processors() {
#if defined(__linux__)
  for (size_t size = 1024; size <= (1u << 20); size *= 2) { // processors the set can name
    cpu_set_t* set = CPU_ALLOC(size);
    if (!set) break;
    const size_t bytes = CPU_ALLOC_SIZE(size);
    const bool fits = sched_getaffinity(0, bytes, set) == 0;
    const int count = fits ? CPU_COUNT_S(bytes, set) : 0;
    CPU_FREE(set);
    if (count > 0) return count;
  }
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

} // namespace

void run_tasks(int64_t count, int threads, const Task& task) {
  if (count <= 0) return;
  const int64_t useful = std::clamp<int64_t>(threads, 1, count);
  pool().run(count, static_cast<int>(useful), task);
}

int thread_count() {
  constexpr int most = 1024;
  const char* text = std::getenv("ANYFLASH_NUM_THREADS");
  if (!text || !*text) return std::min(processors(), most);
  int number = 0;
  const char* end = text + std::strlen(text);
  const auto [stop, error] = std::from_chars(text, end, number);
  if (error != std::errc{} || stop != end || number < 1 || number > most)
    throw InvalidValue("ANYFLASH_NUM_THREADS must be a number from 1 to " + std::to_string(most) +
                       ", not \"" + text + "\"");
  return number;
}

} // namespace anyflash::cpu
