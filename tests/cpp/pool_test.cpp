// The thread pool, and the whole backend under threads and fork.
#include "cpu/pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <new>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "case_problem.h"
#include "core/error.h"
#include "cpu/cpu.h"
#include "scoped_env.h"

#if defined(__SANITIZE_ADDRESS__)
// A child of fork has none of its parent's threads: what they held is no leak.
static const pid_t parent = getpid();
extern "C" __attribute__((visibility("default"))) int __lsan_is_turned_off() {
  return getpid() != parent;
}
#endif

namespace anyflash {
namespace {

using cpu::run_tasks;
using cpu::Scratch;

TEST(Pool, RunsEachTaskOnce) {
  for (int threads : {1, 2, 5})
    for (int64_t count : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> runs(static_cast<size_t>(count));
      run_tasks(count, threads, [&](int64_t i, Scratch& scratch) {
        scratch.floats(100)[99] = 1;
        ++runs[i];
      });
      for (const auto& n : runs) EXPECT_EQ(n, 1);
    }
}

TEST(Pool, OneThreadMeansTheCallersOwn) {
  const std::thread::id caller = std::this_thread::get_id();
  run_tasks(50, 1, [&](int64_t, Scratch&) { EXPECT_EQ(std::this_thread::get_id(), caller); });
}

TEST(Pool, UsesNoMoreThreadsThanAsked) {
  std::mutex mutex;
  std::set<std::thread::id> seen;
  run_tasks(200, 3, [&](int64_t, Scratch&) {
    std::this_thread::yield();
    const std::lock_guard lock(mutex);
    seen.insert(std::this_thread::get_id());
  });
  EXPECT_LE(seen.size(), 3u);
}

TEST(Pool, ServesConcurrentCallers) {
  std::vector<std::thread> callers;
  std::atomic<int64_t> sum{0};
  for (int c = 0; c < 8; ++c)
    callers.emplace_back([&] {
      for (int round = 0; round < 50; ++round)
        run_tasks(20, 4, [&](int64_t i, Scratch&) { sum += i; });
    });
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(sum, 8 * 50 * 190);
}

TEST(Pool, AnErrorReachesTheCaller) {
  for (int threads : {1, 3}) {
    EXPECT_THROW(run_tasks(100, threads,
                           [](int64_t i, Scratch&) {
                             if (i == 40) throw std::bad_alloc();
                           }),
                 std::bad_alloc);
    int64_t done = 0; // and the pool still works
    run_tasks(1, threads, [&](int64_t, Scratch&) { ++done; });
    EXPECT_EQ(done, 1);
  }
}

TEST(Pool, NumberOfThreads) {
  const ScopedEnv set("ANYFLASH_NUM_THREADS", "3");
  EXPECT_EQ(cpu::threads(), 3);
  for (const char* wrong : {"0", "-1", "two", "2x", "99999999999"}) {
    const ScopedEnv bad("ANYFLASH_NUM_THREADS", wrong);
    EXPECT_THROW(cpu::threads(), InvalidValue) << wrong;
  }
  const ScopedEnv unset("ANYFLASH_NUM_THREADS", nullptr);
  EXPECT_GE(cpu::threads(), 1);
}

#if defined(__linux__)
TEST(Pool, FollowsTheProcessesAffinity) {
  const ScopedEnv unset("ANYFLASH_NUM_THREADS", nullptr);
  cpu_set_t before, one;
  ASSERT_EQ(sched_getaffinity(0, sizeof before, &before), 0);
  CPU_ZERO(&one);
  for (int processor = 0; processor < CPU_SETSIZE; ++processor)
    if (CPU_ISSET(processor, &before)) {
      CPU_SET(processor, &one);
      break;
    }
  ASSERT_EQ(sched_setaffinity(0, sizeof one, &one), 0);
  EXPECT_EQ(cpu::threads(), 1);
  ASSERT_EQ(sched_setaffinity(0, sizeof before, &before), 0);
  EXPECT_EQ(cpu::threads(), CPU_COUNT(&before));
}
#endif

Case medium_case() {
  Case c = make_case("threads", 64, 200, 300, 4);
  c.causal = true;
  return c;
}

/// O of a fresh run of the case, as bytes.
std::vector<unsigned char> run_forward() {
  CaseProblem c(medium_case(), DType::float32);
  const Problem problem = c.problem();
  cpu::forward(problem, cpu::tiling(problem));
  return c.o.bytes;
}

TEST(Forward, ConcurrentCallersAgree) {
  const ScopedEnv threads("ANYFLASH_NUM_THREADS", "3");
  const std::vector<unsigned char> alone = run_forward();
  std::vector<std::thread> callers;
  std::atomic<int> wrong{0};
  for (int c = 0; c < 4; ++c)
    callers.emplace_back([&] {
      for (int round = 0; round < 3; ++round) wrong += run_forward() != alone;
    });
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong, 0);
}

// TSan and qemu-user do not follow threads over a fork.
#if !defined(_WIN32) && !defined(__SANITIZE_THREAD__) && !defined(ANYFLASH_EMULATED)
TEST(Forward, SurvivesFork) {
  const ScopedEnv threads("ANYFLASH_NUM_THREADS", "3");
  const std::vector<unsigned char> parent = run_forward(); // the pool has threads now
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) _exit(run_forward() == parent ? 0 : 1);
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status;
  EXPECT_EQ(run_forward(), parent);
}

TEST(Forward, AChildMayExitTheUsualWay) {
  const ScopedEnv threads("ANYFLASH_NUM_THREADS", "3");
  run_forward();
  EXPECT_EXIT(
      {
        run_forward();
        std::exit(7);
      },
      testing::ExitedWithCode(7), "");
}
#endif

} // namespace
} // namespace anyflash
