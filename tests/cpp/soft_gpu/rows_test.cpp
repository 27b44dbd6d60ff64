// Every kernel of the table on a GPU in software: the case list, for each image.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <memory>
#include <random>
#include <set>

#include "../accuracy.h"
#include "../case_problem.h"
#include "../fake_driver/fake_cuda.h"
#include "../scoped_env.h"
#include "block.h"
#include "core/launch.h"
#include "core/plan.h"
#include "core/row.h"

namespace anyflash {
namespace {

/// A device of the fake driver, and the image whose rows the plan prefers there. A device for each:
/// plans are kept.
struct Target {
  int device;
  const char* image;
};
constexpr Target hopper{0, "sm_90a"};
constexpr Target targets[] = {hopper,       {5, "sm_90"},  {1, "sm_80"},
                              {2, "sm_86"}, {3, "sm_100"}, {4, "sm_120"}};

void PrintTo(const Target& target, std::ostream* out) { *out << target.image; }

/// Decides who runs when and what lands when. Another one in each process; a failure says it.
unsigned seed = std::getenv("SOFT_GPU_SEED")
                    ? static_cast<unsigned>(std::atoi(std::getenv("SOFT_GPU_SEED")))
                    : std::random_device{}() % 1000000;

soft_gpu::Entry entry_of(const fake_cuda::Kernel& kernel) {
  void* const library = dlopen(kernel.image.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) throw std::runtime_error(dlerror());
  return reinterpret_cast<soft_gpu::Entry>(dlsym(library, ("enter_" + kernel.name).c_str()));
}

std::string execute(const fake_cuda::Launch& launch, const void* params) {
  try {
    soft_gpu::run_grid({entry_of(*launch.kernel),
                        params,
                        {launch.grid[0], launch.grid[1], launch.grid[2]},
                        launch.cluster,
                        launch.block[0],
                        launch.shared_bytes,
                        seed});
    return "";
  } catch (const std::exception& error) {
    return launch.kernel->name + ": " + error.what();
  }
}

/// The normal form that kernels rely on, as validate() makes it.
Problem normal(Problem p, const Target& target) {
  p.device_type = ANYFLASH_CUDA;
  p.device_index = target.device;
  for (View* view : {&p.q, &p.k, &p.v, &p.o, &p.dout, &p.dq, &p.dk, &p.dv_out}) {
    if (p.packed) view->batch = 0;
    const int64_t all = static_cast<int64_t>(reinterpret_cast<intptr_t>(view->data) / 2) |
                        view->batch | view->row | view->head | p.d | p.dv;
    p.aligned = p.aligned && all % 8 == 0;
  }
  return p;
}

anyflash_plan plan_of(const Problem& problem, const Target& target) {
  const ScopedEnv image("ANYFLASH_IMAGE", target.image);
  return make_plan(problem, get_gpu(target.device));
}

/// Plans and runs on a GPU whose memory is the host's; the workspace begins as NaN.
void run(const Problem& asked, const Target& target) {
  const Problem problem = normal(asked, target);
  const anyflash_plan plan = plan_of(problem, target);
  const size_t bytes = (plan.workspace_bytes + 511) / 256 * 256;
  const std::unique_ptr<void, void (*)(void*)> workspace(std::aligned_alloc(256, bytes), std::free);
  std::memset(workspace.get(), 0xff, bytes);
  fake_cuda::state().execute = execute;
  launch(plan, problem, workspace.get(), nullptr);
}

/// The forward and both orders of the backward, against the formula.
void check(const Case& c, DType dtype, const Target& target) {
  SCOPED_TRACE("SOFT_GPU_SEED=" + std::to_string(seed));
  CaseProblem computed(c, dtype);
  computed.poison();
  ASSERT_NO_THROW(run(computed.problem(), target));
  EXPECT_EQ(violation(computed, expected(c, dtype)), "");
  {
    const ScopedEnv any_order("ANYFLASH_FREE_ORDER", "1");
    ASSERT_NO_THROW(run(computed.backward_problem(), target));
  }
  EXPECT_EQ(violation(computed, expected_gradients(c, dtype)), "");
  computed.poison_gradients();
  Problem in_turns = computed.backward_problem();
  in_turns.deterministic = true;
  ASSERT_NO_THROW(run(in_turns, target));
  EXPECT_EQ(violation(computed, expected_gradients(c, dtype)), "") << "deterministic";
}

class CaseList : public testing::TestWithParam<std::tuple<Case, DType, Target>> {};

TEST_P(CaseList, MeetsTheRule) {
  const auto& [c, dtype, target] = GetParam();
  check(c, dtype, target);
}

std::string name_of_case(const testing::TestParamInfo<CaseList::ParamType>& info) {
  const auto& [c, dtype, target] = info.param;
  return test_name(c.name) + "_" + name_of(dtype) + "_" + target.image;
}

INSTANTIATE_TEST_SUITE_P(Bf16, CaseList,
                         testing::Combine(testing::ValuesIn(cases()),
                                          testing::Values(DType::bfloat16),
                                          testing::ValuesIn(targets)),
                         name_of_case);
INSTANTIATE_TEST_SUITE_P(Fp16, CaseList,
                         testing::Combine(testing::ValuesIn(cases()),
                                          testing::Values(DType::float16), testing::Values(hopper)),
                         name_of_case);

class Random : public testing::TestWithParam<Target> {};

/// SOFT_GPU_CASES=lines.json: cases that tests/random_cases.py has drawn.
TEST_P(Random, MeetsTheRule) {
  const char* const path = std::getenv("SOFT_GPU_CASES");
  if (!path) GTEST_SKIP() << "SOFT_GPU_CASES names no list";
  std::ifstream file(path);
  DType dtype = DType::bfloat16;
  for (const nlohmann::json& line : nlohmann::json::parse(file)) {
    SCOPED_TRACE(line.dump() + " " + name_of(dtype));
    check(case_of(line), dtype, GetParam());
    if (HasFailure()) return;
    dtype = dtype == DType::bfloat16 ? DType::float16 : DType::bfloat16;
  }
}

INSTANTIATE_TEST_SUITE_P(Cases, Random, testing::ValuesIn(targets),
                         [](const auto& info) { return std::string(info.param.image); });

/// More than are sorted by size.
TEST(PackedOrder, HundredsOfSequences) {
  Case c = make_case("many", 64, 0, 0);
  for (int i = 0; i < 300; ++i) c.packed.push_back({i % 5, i % 7});
  c.batch = static_cast<int>(c.packed.size());
  c.q = 4;
  c.k = 6;
  CaseProblem computed(c, DType::bfloat16);
  computed.poison();
  ASSERT_NO_THROW(run(computed.problem(), hopper));
  EXPECT_EQ(violation(computed, expected(c, DType::bfloat16)), "");
}

/// So many tiles that they are dealt in couples; an odd number of heads, one of them a pair with
/// itself.
TEST(PackedOrder, InCouples) {
  for (const bool causal : {false, true}) {
    Case c = make_case("couples", 64, 0, 0);
    c.heads = c.heads_k = 7;
    c.causal = causal;
    for (int i = 0; i < 24; ++i) c.packed.push_back({i * 37 % 250, i * 53 % 310});
    c.batch = static_cast<int>(c.packed.size());
    c.q = 249;
    c.k = 309;
    CaseProblem computed(c, DType::bfloat16);
    computed.poison();
    ASSERT_NO_THROW(run(computed.problem(), hopper));
    EXPECT_EQ(violation(computed, expected(c, DType::bfloat16)), "") << causal;
  }
}

/// A head dim on an image.
using Dim = std::tuple<int, Target>;

std::string name_of_dim(const testing::TestParamInfo<Dim>& info) {
  const auto& [d, target] = info.param;
  return "d" + std::to_string(d) + "_" + target.image;
}

class Infection : public testing::TestWithParam<Dim> {};

/// Who trains looks for NaN: a query with one, or with an infinity, has NaN in its O, L and dQ, and
/// no other query has.
TEST_P(Infection, ShowsInItsRowAlone) {
  const auto& [d, target] = GetParam();
  SCOPED_TRACE("SOFT_GPU_SEED=" + std::to_string(seed));
  constexpr int64_t ill = 33;
  for (const double bad : {std::numeric_limits<double>::quiet_NaN(), HUGE_VAL}) {
    CaseProblem computed(make_case("nan", d, 70, 150), DType::bfloat16);
    computed.q.set(computed.q.at(0, ill, 0, 1), bad);
    computed.poison();
    run(computed.problem(), target);
    run(computed.backward_problem(), target);
    const auto is_nan = [](const Strided& x, int64_t row) {
      return std::isnan(x.get(x.at(0, row, 0, 0)));
    };
    for (int64_t row = 0; row < 70; ++row) {
      EXPECT_EQ(std::isnan(computed.lse[static_cast<size_t>(row)]), row == ill) << row;
      EXPECT_EQ(is_nan(computed.o, row), row == ill) << row;
      EXPECT_EQ(is_nan(computed.dq, row), row == ill) << row;
    }
    EXPECT_TRUE(is_nan(computed.dk, 0));
  }
}

INSTANTIATE_TEST_SUITE_P(Rows, Infection,
                         testing::Combine(testing::Values(64, 128), testing::ValuesIn(targets)),
                         name_of_dim);

class Reproducible : public testing::TestWithParam<Dim> {};

/// dK and dV always, dQ where asked, whoever runs first. One head: its key blocks run side by side.
TEST_P(Reproducible, BitEqualInEveryOrder) {
  const auto& [d, target] = GetParam();
  const Case c = make_case("order", d, 200, 96000 / d);
  CaseProblem computed(c, DType::float16); // the finer one
  computed.poison();
  run(computed.problem(), target);
  std::vector<std::vector<unsigned char>> first;
  for (int order = 0; order < 3; ++order, ++seed) {
    SCOPED_TRACE("SOFT_GPU_SEED=" + std::to_string(seed));
    Problem backward = computed.backward_problem();
    backward.deterministic = true;
    ASSERT_NO_THROW(run(backward, target));
    if (first.empty()) first = {computed.dq.bytes, computed.dk.bytes, computed.dv.bytes};
    EXPECT_EQ(computed.dq.bytes, first[0]);
    backward.deterministic = false;
    const ScopedEnv any_order("ANYFLASH_FREE_ORDER", "1");
    ASSERT_NO_THROW(run(backward, target));
    EXPECT_EQ(computed.dk.bytes, first[1]);
    EXPECT_EQ(computed.dv.bytes, first[2]);
  }
}

INSTANTIATE_TEST_SUITE_P(Rows, Reproducible,
                         testing::Combine(testing::Values(64, 128, 256),
                                          testing::ValuesIn(targets)),
                         name_of_dim);

/// The list reaches the whole table, so that nothing in it was never run.
TEST(Coverage, EveryRowIsReachedByTheList) {
  std::set<std::string> reached, wanted;
  for (const Row& row : rows())
    if (row.dtype == DType::bfloat16) wanted.insert(row.name());
  for (const Case& c : cases())
    for (const Target& target : targets) {
      CaseProblem problem(c, DType::bfloat16);
      for (const Problem& p : {problem.problem(), problem.backward_problem()}) {
        const anyflash_plan plan = plan_of(normal(p, target), target);
        for (int i = 0; i < plan.launch_count; ++i)
          reached.insert(rows()[static_cast<size_t>(plan.launches[i].row)].name());
      }
    }
  for (const std::string& name : wanted) EXPECT_TRUE(reached.contains(name)) << name;
}

} // namespace
} // namespace anyflash

int main(int count, char** arguments) {
  fake_cuda::state().multiprocessors = 5; // few blocks that stay: each has several tiles
  setenv("ANYFLASH_NVRTC", SOFT_GPU_NVRTC, 1);
  setenv("ANYFLASH_CACHE_DIR", SOFT_GPU_CACHE, 1);
  setenv("ANYFLASH_KERNELS", "/nowhere", 1); // nothing is shipped: all is compiled, and kept
  testing::InitGoogleTest(&count, arguments);
  return RUN_ALL_TESTS();
}
