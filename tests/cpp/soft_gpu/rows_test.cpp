// Every kernel of the table on a GPU in software: the case list, on each generation.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <mutex>
#include <set>

#include "../case_problem.h"
#include "../fake_driver/fake_cuda.h"
#include "block.h"
#include "core/launch.h"
#include "core/plan.h"
#include "core/row.h"

namespace anyflash {
namespace {

namespace fs = std::filesystem;

soft_gpu::Entry entry_of(const fake_cuda::Kernel& kernel) {
  void* const library = dlopen(kernel.image.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(dlerror());
  return reinterpret_cast<soft_gpu::Entry>(dlsym(library, ("enter_" + kernel.name).c_str()));
}

/// Changes from launch to launch and from run to run; a failure says it.
unsigned seed = std::getenv("SOFT_GPU_SEED") ? std::atoi(std::getenv("SOFT_GPU_SEED"))
                                             : std::random_device{}() % 100000;

std::string execute(const fake_cuda::Launch& launch, const void* params) {
  try {
    soft_gpu::run_grid({entry_of(*launch.kernel), params,
              {launch.grid[0], launch.grid[1], launch.grid[2]}, launch.block[0],
              launch.shared_bytes, seed});
    return "";
  } catch (const std::exception& error) {
    return launch.kernel->name + ", seed " + std::to_string(seed) + ": " + error.what();
  }
}

/// The normal form that kernels rely on, as validate() makes it.
void normalise(Problem& p) {
  for (View* view : {&p.q, &p.k, &p.v, &p.o, &p.dout, &p.dq, &p.dk, &p.dv_out}) {
    if (p.packed) view->batch = 0;
    const int64_t bits = reinterpret_cast<intptr_t>(view->data) / 2 | view->batch | view->row |
                         view->head | p.d | p.dv;
    p.aligned = p.aligned && bits % 8 == 0;
  }
}

/// Plans and runs on a GPU whose memory is the host's. The rows that ran.
void run(Problem problem, int device) {
  problem.device_type = ANYFLASH_CUDA;
  problem.device_index = device;
  normalise(problem);
  const anyflash_device gpu = get_gpu(device);
  const anyflash_plan plan = make_plan(problem, gpu);
  void* const workspace = std::aligned_alloc(256, (plan.workspace_bytes + 511) / 256 * 256);
  std::memset(workspace, 0xff, plan.workspace_bytes);
  try {
    launch(plan, problem, workspace, nullptr);
  } catch (...) {
    std::free(workspace);
    throw;
  }
  std::free(workspace);
}

class SoftGpu : public testing::TestWithParam<std::tuple<Case, DType, int>> {
protected:
  SoftGpu() { fake_cuda::state().execute = execute; }
};

TEST_P(SoftGpu, MeetsTheRule) {
  const auto& [c, dtype, device] = GetParam();
  CaseProblem computed(c, dtype);
  computed.poison();
  run(computed.problem(), device);
  EXPECT_EQ(violation(computed, expected(c, dtype)), "");
  run(computed.backward_problem(), device);
  EXPECT_EQ(violation(computed, expected_gradients(c, dtype)), "");
}

INSTANTIATE_TEST_SUITE_P(
    Rows, SoftGpu,
    testing::Combine(testing::ValuesIn(cases()), testing::Values(DType::bfloat16, DType::float16),
                     testing::Range(0, fake_cuda::device_count)),
    [](const auto& info) {
      return test_name(std::get<0>(info.param).name) + "_" + name_of(std::get<1>(info.param)) +
             "_sm_" + std::to_string(fake_cuda::capabilities[std::get<2>(info.param)]);
    });

} // namespace
} // namespace anyflash

int main(int count, char** arguments) {
  fake_cuda::state().multiprocessors = 3; // few blocks that stay: each has several tiles
  setenv("ANYFLASH_NVRTC", SOFT_GPU_NVRTC, 1);
  setenv("ANYFLASH_CACHE_DIR", SOFT_GPU_CACHE, 1);
  setenv("ANYFLASH_KERNELS", "/nowhere", 1);
  testing::InitGoogleTest(&count, arguments);
  return RUN_ALL_TESTS();
}
