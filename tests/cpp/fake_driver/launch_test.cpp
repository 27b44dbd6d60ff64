// Plans to launches, on a driver that records what is asked of it.
#include "core/launch.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <thread>

#include "../problems.h"
#include "../scoped_env.h"
#include "core/archive.h"
#include "core/cache.h"
#include "core/error.h"
#include "core/hopper_params.h"
#include "core/images.h"
#include "core/kernel_params.h"
#include "core/notice.h"
#include "core/plan.h"
#include "fake_cuda.h"

namespace anyflash {
namespace {

namespace fs = std::filesystem;

/// A row that no other test has loaded: loaded kernels stay for the life of the process.
const Row& next_row() {
  static size_t next = 0;
  for (; next < rows().size(); ++next) {
    const Row& row = rows()[next];
    if (row.op == "forward" && row.in_image("80") && row.in_image("90")) return rows()[next++];
  }
  throw std::logic_error("the table has too few rows for these tests");
}

Problem problem_of(const Row& row, int device) {
  Problem p;
  p.dtype = row.dtype;
  p.device_type = ANYFLASH_CUDA;
  p.device_index = device;
  p.batch = 2;
  p.heads = p.heads_k = 4;
  p.seqlen_q = p.seqlen_k = 1000;
  p.d = row.d;
  p.dv = row.dv;
  p.q.data = reinterpret_cast<void*>(0x1230);
  p.scale = 0.125f;
  return p;
}

anyflash_plan plan_of(const Row& row, int device) {
  anyflash_plan plan{};
  plan.device.index = device;
  plan.launch_count = 1;
  plan.launches[0] = {row.id,
                      ANYFLASH_KERNEL,
                      {64, 1, 1},
                      static_cast<uint32_t>(row.threads()),
                      static_cast<uint32_t>(row.shared_bytes())};
  return plan;
}

/// What the caller of the tests says; read before the tests change it.
const std::string callers_value =
    std::getenv("ANYFLASH_NVRTC") ? std::getenv("ANYFLASH_NVRTC") : "";
const char* const callers_nvrtc = callers_value.empty() ? nullptr : callers_value.c_str();

std::vector<std::string>& notices() {
  static std::vector<std::string> all;
  return all;
}

/// Each test has a folder of archives and a cache of its own, and no compiler unless it asks.
class LaunchTest : public testing::Test {
protected:
  LaunchTest()
      : folder_(fs::temp_directory_path() / ("anyflash-launch-test-" + std::to_string(getpid()))),
        kernels_("ANYFLASH_KERNELS", (folder_ / "kernels" / test_name()).c_str()),
        cache_("ANYFLASH_CACHE_DIR", (folder_ / "cache" / test_name()).c_str()),
        no_compiler_("ANYFLASH_NVRTC", "/nowhere/libnvrtc.so.12") {
    fs::create_directories(archive_folder());
    fake_cuda::state().launches.clear();
    fake_cuda::state().attributes.clear();
    fake_cuda::state().params_bytes = sizeof(ForwardParams);
    fake_cuda::set_current_context(nullptr);
    notices().clear();
    set_notice_handler([](const char* text, void*) { notices().emplace_back(text); }, nullptr);
  }
  ~LaunchTest() override { fs::remove_all(folder_); }

  static std::string test_name() {
    return testing::UnitTest::GetInstance()->current_test_info()->name();
  }

  static void ship(const Row& row, const Target& target, const std::string& bytes,
                   const std::string& hash, int compiler_version = 12040) {
    write_archive(archive_folder() / (target.name() + ".bin"), compiler_version,
                  {{row.name(), hash, {bytes, {}}, 0}});
  }
  static void ship(const Row& row, const Target& target, const std::string& bytes) {
    ship(row, target, bytes, row_hash(row));
  }

  static const std::vector<fake_cuda::Launch>& launches() { return fake_cuda::state().launches; }

private:
  fs::path folder_;
  ScopedEnv kernels_, cache_, no_compiler_;
};

TEST_F(LaunchTest, RunsTheShippedImage) {
  const Row& row = next_row();
  ship(row, {"90"}, "machine code");
  const Problem problem = problem_of(row, 0);
  int stream = 0;
  launch(plan_of(row, 0), problem, nullptr, &stream);
  ASSERT_EQ(launches().size(), 1u);
  const fake_cuda::Launch& recorded = launches()[0];
  EXPECT_EQ(recorded.kernel->image, "machine code");
  EXPECT_EQ(recorded.grid[0], 64u);
  EXPECT_EQ(recorded.block[0], static_cast<unsigned>(row.threads()));
  EXPECT_EQ(recorded.shared_bytes, static_cast<unsigned>(row.shared_bytes()));
  EXPECT_EQ(recorded.stream, &stream);
  ForwardParams params;
  std::memcpy(&params, recorded.params.data(), sizeof params);
  const ForwardParams expected = forward_params(problem, row);
  EXPECT_EQ(std::memcmp(&params, &expected, sizeof params), 0);
  EXPECT_TRUE(notices().empty());
}

const Row& hopper_row(int d, int dv) {
  for (const Row& row : rows())
    if (row.family == "sm90" && row.op == "forward" && row.d == d && row.dv == dv) return row;
  throw std::logic_error("no such row");
}

fake_cuda::TensorMap decoded(const sm90::TensorMap& map) {
  fake_cuda::TensorMap result;
  std::memcpy(&result, &map, sizeof result);
  return result;
}

TEST_F(LaunchTest, HopperGetsTensorMaps) {
  const Row& row = hopper_row(192, 128);
  fake_cuda::state().params_bytes = sizeof(sm90::ForwardParams);
  Problem p = problem_of(row, 0);
  p.heads_k = 2;
  p.k = {reinterpret_cast<void*>(0x2000), 1000 * 2 * 192, 2 * 192, 192};
  p.q = {reinterpret_cast<void*>(0x1000), 1000 * 4 * 192, 4 * 192, 192};
  p.v = {reinterpret_cast<void*>(0x3000), 1000 * 2 * 128, 2 * 128, 128};
  p.o = {reinterpret_cast<void*>(0x4000), 1000 * 4 * 128, 4 * 128, 128};
  ship(row, {"90a"}, "hopper");
  launch(plan_of(row, 0), p, nullptr, nullptr);
  ASSERT_EQ(launches().size(), 1u);
  EXPECT_EQ(launches()[0].kernel->image, "hopper");
  sm90::ForwardParams params;
  std::memcpy(static_cast<void*>(&params), launches()[0].params.data(), sizeof params);
  const fake_cuda::TensorMap k = decoded(params.k_map);
  EXPECT_EQ(k.data, reinterpret_cast<char*>(0x2000));
  EXPECT_EQ(k.rank, 4);
  EXPECT_EQ(std::vector<uint32_t>(k.sizes, k.sizes + 4), (std::vector<uint32_t>{192, 1000, 2, 2}));
  EXPECT_EQ(std::vector<uint64_t>(k.strides, k.strides + 3),
            (std::vector<uint64_t>{2 * 192 * 2, 192 * 2, 1000 * 2 * 192 * 2}));
  EXPECT_EQ(k.box[0], 64u) << "a page of the shared tile";
  EXPECT_EQ(k.box[1], row.Bc);
  EXPECT_EQ(decoded(params.q_map).box[1], row.Br);
  EXPECT_EQ(decoded(params.o_map).box[1], 16u) << "what one warp writes";
  EXPECT_EQ(params.order.grid, 64);
}

TEST_F(LaunchTest, HopperWithoutKeysGetsMapsOfMemoryThatIsThere) {
  const Row& row = hopper_row(96, 96);
  fake_cuda::state().params_bytes = sizeof(sm90::ForwardParams);
  Problem p = problem_of(row, 0);
  p.seqlen_k = 0;
  p.q = p.o = {reinterpret_cast<void*>(0x1000), 1000 * 4 * 96, 4 * 96, 96};
  ship(row, {"90a"}, "hopper");
  launch(plan_of(row, 0), p, nullptr, nullptr);
  sm90::ForwardParams params;
  std::memcpy(static_cast<void*>(&params), launches()[0].params.data(), sizeof params);
  EXPECT_EQ(decoded(params.k_map).data, reinterpret_cast<char*>(0x1000));
  EXPECT_EQ(decoded(params.k_map).sizes[1], 1u);
  EXPECT_EQ(decoded(params.k_map).box[0], 32u)
      << "pages of 32 columns where d is no multiple of 64";
}

TEST_F(LaunchTest, TheBackwardRunsTheEntriesOfItsRowInOrder) {
  const auto is_wanted = [](const Row& row) { return row.op == "backward" && row.in_image("90"); };
  const Row& row = *std::ranges::find_if(rows(), is_wanted);
  ship(row, {"90"}, "three kernels");
  Problem problem = problem_of(row, 0);
  problem.op = ANYFLASH_BACKWARD;
  fake_cuda::state().params_bytes = sizeof(BackwardParams);
  anyflash_plan plan{};
  plan.device.index = 0;
  plan.launch_count = 3;
  const anyflash_entry order[] = {ANYFLASH_KERNEL_PRE, ANYFLASH_KERNEL, ANYFLASH_KERNEL_POST};
  for (int i = 0; i < 3; ++i) plan.launches[i] = {row.id, order[i], {8, 1, 1}, 128, 0};
  plan.launches[2].grid[0] = 0; // nothing to do there
  char workspace[1];
  launch(plan, problem, workspace, nullptr);
  ASSERT_EQ(launches().size(), 2u);
  EXPECT_EQ(launches()[0].kernel->name, "kernel_pre");
  EXPECT_EQ(launches()[1].kernel->name, "kernel");
  for (const fake_cuda::Launch& recorded : launches()) {
    EXPECT_EQ(recorded.kernel->image, "three kernels");
    BackwardParams params;
    std::memcpy(&params, recorded.params.data(), sizeof params);
    const BackwardParams expected = backward_params(problem, row, workspace, false);
    EXPECT_EQ(std::memcmp(&params, &expected, sizeof params), 0);
  }
}

TEST_F(LaunchTest, PairsOfThreadBlocksAreLaunchedTogether) {
  const auto is_wanted = [](const Row& row) { return row.op == "backward" && row.cluster() == 2; };
  const Row& row = *std::ranges::find_if(rows(), is_wanted);
  ship(row, {"90a"}, "pairs");
  Problem problem = problem_of(row, 0);
  problem.op = ANYFLASH_BACKWARD;
  for (View* view : {&problem.q, &problem.k, &problem.v, &problem.dout})
    *view = {reinterpret_cast<void*>(0x1000), 1000 * 4 * 256, 4 * 256, 256};
  anyflash_plan plan{};
  plan.device.index = 0;
  plan.device.multiprocessors = 132;
  plan.launch_count = 2;
  plan.launches[0] = {row.id, ANYFLASH_KERNEL_PRE, {8, 1, 1}, 128, 0};
  plan.launches[1] = {row.id, ANYFLASH_KERNEL, {8, 1, 1}, 128, 0};
  char workspace[1];
  launch(plan, problem, workspace, nullptr);
  ASSERT_EQ(launches().size(), 2u);
  EXPECT_EQ(launches()[0].cluster, 1u);
  EXPECT_EQ(launches()[1].cluster, 2u);
}

TEST_F(LaunchTest, LoadsOnceAndSetsSharedMemoryOnce) {
  const Row& row = next_row();
  ship(row, {"90"}, "machine code");
  fake_cuda::state().capture_mode_at_load.clear();
  for (int i = 0; i < 3; ++i) launch(plan_of(row, 0), problem_of(row, 0), nullptr, nullptr);
  EXPECT_EQ(launches().size(), 3u);
  EXPECT_EQ(fake_cuda::state().capture_mode_at_load, std::vector<int>{2}) << "not once, relaxed";
  EXPECT_EQ(fake_cuda::capture_mode(), 0) << "the thread's capture mode was not restored";
  ASSERT_EQ(fake_cuda::state().attributes.size(), 1u);
  EXPECT_EQ(fake_cuda::state().attributes[0].attribute, 8);
  EXPECT_EQ(fake_cuda::state().attributes[0].value, row.shared_bytes());
}

TEST_F(LaunchTest, WarmUpLoadsWithoutLaunching) {
  const Row& row = next_row();
  ship(row, {"90"}, "machine code");
  warm_up(plan_of(row, 0));
  EXPECT_TRUE(launches().empty());
  EXPECT_EQ(fake_cuda::state().attributes.size(), 1u);
}

TEST_F(LaunchTest, WarmUpOfABackwardLoadsAllOfItsKernels) {
  const auto is_wanted = [](const Row& row) {
    return row.op == "backward" && row.variant == "general" && row.in_image("90");
  };
  const Row& row = *std::ranges::find_if(rows(), is_wanted);
  ship(row, {"90"}, "three kernels");
  anyflash_plan plan{};
  plan.struct_size = sizeof plan;
  plan.op = ANYFLASH_BACKWARD;
  plan.device.type = ANYFLASH_CUDA;
  plan.launch_count = 3;
  const anyflash_entry order[] = {ANYFLASH_KERNEL_PRE, ANYFLASH_KERNEL, ANYFLASH_KERNEL_POST};
  for (int i = 0; i < 3; ++i) plan.launches[i] = {row.id, order[i], {8, 1, 1}, 128, 0};
  ASSERT_EQ(anyflash_warm_up(&plan), ANYFLASH_OK) << anyflash_last_error();
  EXPECT_TRUE(launches().empty());
  fake_cuda::state().capture_mode_at_load.clear();
  Problem problem = problem_of(row, 0);
  problem.op = ANYFLASH_BACKWARD;
  char workspace[1];
  launch(plan, problem, workspace, nullptr);
  EXPECT_EQ(launches().size(), 3u);
  EXPECT_TRUE(fake_cuda::state().capture_mode_at_load.empty()) << "loaded only by the launch";
}

TEST_F(LaunchTest, EachGpuRunsItsOwnImageInItsOwnContext) {
  const Row& row = next_row();
  ship(row, {"90"}, "for 9.0");
  ship(row, {"80"}, "for 8.0");
  fake_cuda::set_current_context(fake_cuda::primary_context(0));
  launch(plan_of(row, 0), problem_of(row, 0), nullptr, nullptr);
  launch(plan_of(row, 1), problem_of(row, 1), nullptr, nullptr);
  ASSERT_EQ(launches().size(), 2u);
  EXPECT_EQ(launches()[0].kernel->image, "for 9.0");
  EXPECT_EQ(launches()[0].context->device, 0);
  EXPECT_EQ(launches()[1].kernel->image, "for 8.0");
  EXPECT_EQ(launches()[1].context->device, 1);
  EXPECT_EQ(fake_cuda::current_context(), fake_cuda::primary_context(0)) << "not restored";
}

TEST_F(LaunchTest, TheCallersContextIsUsedWhenItIsOfTheRightGpu) {
  const Row& row = next_row();
  ship(row, {"80"}, "machine code");
  fake_cuda::Context callers{1};
  fake_cuda::set_current_context(&callers);
  launch(plan_of(row, 1), problem_of(row, 1), nullptr, nullptr);
  ASSERT_EQ(launches().size(), 1u);
  EXPECT_EQ(launches()[0].context, &callers);
}

TEST_F(LaunchTest, AFailedLaunchNamesTheDriversErrorAndLeavesTheContext) {
  const Row& row = next_row();
  ship(row, {"90"}, "machine code");
  fake_cuda::state().fail_next_launch_with = 700;
  fake_cuda::set_current_context(fake_cuda::primary_context(1));
  try {
    launch(plan_of(row, 0), problem_of(row, 0), nullptr, nullptr);
    FAIL() << "launched";
  } catch (const RuntimeError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find(row.name()), std::string::npos) << text;
    EXPECT_NE(text.find("CUDA_ERROR_ILLEGAL_ADDRESS"), std::string::npos) << text;
  }
  EXPECT_EQ(fake_cuda::current_context(), fake_cuda::primary_context(1)) << "not restored";
}

TEST_F(LaunchTest, AThreadWithoutAContextIsOnTheFirstGpuAfterwards) {
  const Row& row = next_row();
  ship(row, {"90"}, "for 9.0");
  ship(row, {"80"}, "for 8.0");
  launch(plan_of(row, 1), problem_of(row, 1), nullptr, nullptr);
  EXPECT_EQ(fake_cuda::current_context(), nullptr) << "the runtime would say: GPU 1";
  launch(plan_of(row, 0), problem_of(row, 0), nullptr, nullptr);
  EXPECT_EQ(fake_cuda::current_context(), fake_cuda::primary_context(0));
  launch(plan_of(row, 1), problem_of(row, 1), nullptr, nullptr);
  EXPECT_EQ(fake_cuda::current_context(), fake_cuda::primary_context(0)) << "not restored";
}

TEST_F(LaunchTest, ThreadsThatStartTogetherLoadOnce) {
  const Row& row = next_row();
  ship(row, {"90"}, "machine code");
  fake_cuda::state().capture_mode_at_load.clear();
  std::atomic<int> waiting{8};
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i)
    threads.emplace_back([&] {
      --waiting;
      while (waiting > 0) std::this_thread::yield();
      launch(plan_of(row, 0), problem_of(row, 0), nullptr, nullptr);
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(launches().size(), 8u);
  EXPECT_EQ(fake_cuda::state().capture_mode_at_load.size(), 1u);
}

TEST_F(LaunchTest, StaleArchivesCountAsNotBuilt) {
  const Row& row = next_row();
  ship(row, {"90"}, "machine code", "0000000000000000");
  try {
    launch(plan_of(row, 0), problem_of(row, 0), nullptr, nullptr);
    FAIL() << "launched";
  } catch (const RuntimeError& error) {
    const std::string text = error.what();
    for (const char* part : {"Fake 9.0", "9.0", "driver 12.4", "sm_90", "/nowhere/libnvrtc",
                             "pip install nvidia-cuda-nvrtc-cu12", "FLASH_ATTN_CUDA_ARCHS=90"})
      EXPECT_NE(text.find(part), std::string::npos) << part << " not in: " << text;
  }
  EXPECT_TRUE(launches().empty());
}

TEST_F(LaunchTest, DamagedArchivesCountAsNotBuilt) {
  const Row& row = next_row();
  ship(row, {"90"}, std::string(1000, 'x'));
  fs::resize_file(archive_folder() / "sm_90.bin", 300);
  EXPECT_THROW(launch(plan_of(row, 0), problem_of(row, 0), nullptr, nullptr), RuntimeError);
}

TEST_F(LaunchTest, ThePtxIsTheInsuranceAndIsAnnouncedOnce) {
  const Row& row = next_row();
  ship(row, {"80", true}, ".version 8.8");
  for (int i = 0; i < 2; ++i) launch(plan_of(row, 0), problem_of(row, 0), nullptr, nullptr);
  ASSERT_EQ(launches().size(), 2u);
  EXPECT_EQ(launches()[0].kernel->image, ".version 8.8");
  ASSERT_EQ(notices().size(), 1u);
  EXPECT_NE(notices()[0].find("compute_80"), std::string::npos) << notices()[0];
}

Problem problem_without_data(int64_t d) {
  return validate(dense({1, 300, 300, 2, 2, d, d}, ANYFLASH_BFLOAT16, ANYFLASH_CUDA));
}

TEST_F(LaunchTest, APackageOfPtxRunsOnHopper) {
  const Row& row = *std::ranges::find_if(rows(), [](const Row& one) {
    return one.family == "sm80" && one.dtype == DType::bfloat16 && one.d == 256 &&
           one.in_image("80");
  });
  ship(row, {"80", true}, ".version 8.8");
  const Problem problem = problem_without_data(256);
  launch(make_plan(problem, get_gpu(0)), problem, nullptr, nullptr);
  ASSERT_EQ(launches().size(), 1u);
  EXPECT_EQ(launches()[0].kernel->image, ".version 8.8");
  EXPECT_EQ(launches()[0].shared_bytes, static_cast<unsigned>(row.shared_bytes()));
  EXPECT_EQ(notices().size(), 1u);
}

TEST_F(LaunchTest, ACompilerBringsHoppersOwnRows) {
  const ScopedEnv callers_compiler("ANYFLASH_NVRTC", callers_nvrtc);
  if (!find_compiler(12040)) GTEST_SKIP() << "no libnvrtc found (set ANYFLASH_NVRTC or CUDA_HOME)";
  const anyflash_plan plan = make_plan(problem_without_data(192), get_gpu(0));
  EXPECT_EQ(rows()[static_cast<size_t>(plan.launches[0].row)].family, "sm90");
}

TEST_F(LaunchTest, PtxOfANewerCompilerThanTheDriverIsNotTried) {
  const Row& row = next_row();
  ship(row, {"80", true}, ".version 8.8", row_hash(row), 12090);
  try {
    launch(plan_of(row, 0), problem_of(row, 0), nullptr, nullptr);
    FAIL() << "launched";
  } catch (const RuntimeError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("its PTX (CUDA 12.9) needs a newer driver"), std::string::npos) << text;
  }
}

TEST_F(LaunchTest, AnImageCanBeForced) {
  const Row& row = next_row();
  ship(row, {"90"}, "machine code");
  ship(row, {"80", true}, ".version 8.8");
  const ScopedEnv forced("ANYFLASH_IMAGE", "compute_80");
  launch(plan_of(row, 0), problem_of(row, 0), nullptr, nullptr);
  ASSERT_EQ(launches().size(), 1u);
  EXPECT_EQ(launches()[0].kernel->image, ".version 8.8");
}

TEST_F(LaunchTest, WhatIsKeptOnDiskNeedsNoCompiler) {
  const Row& row = next_row();
  ASSERT_TRUE(cache_store({row.name(), "sm_90", row_hash(row), 12090}, "kept"));
  launch(plan_of(row, 0), problem_of(row, 0), nullptr, nullptr);
  ASSERT_EQ(launches().size(), 1u);
  EXPECT_EQ(launches()[0].kernel->image, "kept");
}

TEST_F(LaunchTest, WhatIsMissingIsCompiledAnnouncedAndKept) {
  const ScopedEnv callers_compiler("ANYFLASH_NVRTC", callers_nvrtc);
  if (!find_compiler(12040)) GTEST_SKIP() << "no libnvrtc found (set ANYFLASH_NVRTC or CUDA_HOME)";
  const Row& row = next_row();
  launch(plan_of(row, 1), problem_of(row, 1), nullptr, nullptr);
  ASSERT_EQ(launches().size(), 1u);
  EXPECT_EQ(launches()[0].kernel->image.substr(1, 3), "ELF");
  ASSERT_EQ(notices().size(), 1u);
  EXPECT_NE(notices()[0].find(row.name()), std::string::npos);
  EXPECT_NE(notices()[0].find("sm_80"), std::string::npos);
  const int version = find_compiler(12040)->version();
  EXPECT_TRUE(cache_load({row.name(), "sm_80", row_hash(row), version}));
}

TEST_F(LaunchTest, NothingIsLaunchedWithoutBlocks) {
  const Row& row = next_row();
  anyflash_plan plan = plan_of(row, 0);
  plan.launches[0].grid[0] = 0;
  launch(plan, problem_of(row, 0), nullptr, nullptr);
  EXPECT_TRUE(launches().empty());
}

TEST_F(LaunchTest, UnknownGpusAndRowsAreNamed) {
  EXPECT_THROW(get_gpu(fake_cuda::device_count), RuntimeError);
  EXPECT_THROW(get_gpu(-1), RuntimeError);
  anyflash_plan plan = plan_of(rows()[0], 0);
  plan.launches[0].row = 100000;
  EXPECT_THROW(launch(plan, problem_of(rows()[0], 0), nullptr, nullptr), InvalidValue);
}

TEST_F(LaunchTest, DescribesGpusAndPlansForOthers) {
  const anyflash_device device = get_gpu(1);
  EXPECT_EQ(device.compute_capability, 80);
  EXPECT_EQ(device.index, 1);
  EXPECT_EQ(device.shared_bytes, 163 * 1024);
  EXPECT_EQ(device.driver, 12040);
  const ScopedEnv other("ANYFLASH_PLAN_FOR", "86");
  EXPECT_EQ(get_gpu(0).compute_capability, 86);
  EXPECT_EQ(get_gpu(0).shared_bytes, describe_gpu(86).shared_bytes);
}

TEST_F(LaunchTest, RowsOfAnotherGenerationAreCompiledForTheGpuThatIsHere) {
  for (const Row& row : rows())
    if (!row.in_image("90") && !row.in_image("90a")) {
      EXPECT_EQ(native_target(row, 90), Target{"90"});
    }
  EXPECT_EQ(native_target(next_row(), 90), Target{"90"});
  EXPECT_EQ(native_target(rows()[0], 130), Target{"130"}) << "a generation nobody knew";
}

TEST_F(LaunchTest, AChildOfForkIsToldThatCudaIsGone) {
  get_gpu(0);
  const pid_t child = fork();
  if (child == 0) {
    try {
      get_gpu(0);
    } catch (const RuntimeError& error) {
      _exit(std::string(error.what()).find("fork") != std::string::npos ? 0 : 2);
    }
    _exit(1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

} // namespace
} // namespace anyflash
