// Three sentences of different lengths in one call, with the log-sum-exp; checked against the
// reference. Also: a plan for a GPU that is not here, and what an error looks like.
#include <anyflash/anyflash.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

namespace {

using anyflash::tensor;

std::vector<float> random_floats(size_t count) {
  static std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> data(count);
  for (float& x : data) x = normal(random);
  return data;
}

float largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  float worst = 0;
  for (size_t i = 0; i < a.size(); ++i)
    if (const float difference = std::abs(a[i] - b[i]); !(difference <= worst)) worst = difference;
  return worst;
}

bool run_packed() {
  constexpr int64_t heads = 4, heads_k = 2, d = 64;
  const std::vector<int32_t> starts = {0, 7, 120, 200}; // sentence b: rows [starts[b], starts[b+1])
  const int64_t total = starts.back(), longest = 113;
  const std::vector<float> q = random_floats(total * heads * d);
  const std::vector<float> k = random_floats(total * heads_k * d);
  const std::vector<float> v = random_floats(total * heads_k * d);
  std::vector<float> o(q.size()), lse(total * heads);

  const auto cu_seqlens =
      tensor(starts.data(), ANYFLASH_INT32, {static_cast<int64_t>(starts.size())});
  const auto problem_into = [&](std::vector<float>& o, std::vector<float>& lse) {
    return anyflash::Problem(tensor(q.data(), ANYFLASH_FLOAT32, {total, heads, d}),
                             tensor(k.data(), ANYFLASH_FLOAT32, {total, heads_k, d}),
                             tensor(v.data(), ANYFLASH_FLOAT32, {total, heads_k, d}),
                             tensor(o.data(), ANYFLASH_FLOAT32, {total, heads, d}))
        .packed(cu_seqlens, cu_seqlens, longest, longest)
        .lse(tensor(lse.data(), ANYFLASH_FLOAT32, {heads, total}))
        .causal();
  };

  const anyflash::Problem problem = problem_into(o, lse);
  const anyflash::Plan plan(problem);
  std::vector<unsigned char> workspace(plan.workspace_bytes() + 256);
  void* aligned = workspace.data() + 256 - reinterpret_cast<uintptr_t>(workspace.data()) % 256;
  plan.run(problem, aligned);
  std::puts(anyflash::explain(problem).c_str());

  std::vector<float> expected_o(o.size()), expected_lse(lse.size());
  anyflash::reference(problem_into(expected_o, expected_lse));
  const float difference =
      std::max(largest_difference(o, expected_o), largest_difference(lse, expected_lse));
  std::printf("largest difference from the reference: %.2g\n", difference);
  return difference < 1e-4f;
}

/// Planning needs shapes only: no GPU, no data.
bool plan_for_a_gpu_that_is_not_here() {
  const auto half = [](int64_t heads) {
    return tensor(nullptr, ANYFLASH_FLOAT16, {2, 4096, heads, 128}, anyflash::cuda());
  };
  const anyflash::Problem problem(half(32), half(8), half(8), half(32));
  const anyflash::Plan plan(problem, anyflash::describe_gpu(90));
  const anyflash_launch& launch = plan.raw().launches[0];
  std::printf("on compute capability 9.0: %u blocks of %u threads, %u bytes of shared memory\n",
              launch.grid[0] * launch.grid[1] * launch.grid[2], launch.threads,
              launch.shared_bytes);
  return launch.threads > 0;
}

bool refuses_nonsense() {
  std::vector<float> data(64);
  const auto two = tensor(data.data(), ANYFLASH_FLOAT32, {1, 1, 2, 16});
  const auto three = tensor(data.data(), ANYFLASH_FLOAT32, {1, 1, 3, 16});
  try {
    anyflash::Plan plan(anyflash::Problem(three, two, two, three));
  } catch (const anyflash::Exception& error) {
    std::printf("an error: %s\n", error.what());
    return error.status() == ANYFLASH_INVALID_VALUE;
  }
  return false;
}

} // namespace

int main() {
  try {
    return run_packed() && plan_for_a_gpu_that_is_not_here() && refuses_nonsense() ? 0 : 1;
  } catch (const anyflash::Exception& error) {
    std::fprintf(stderr, "anyflash: %s\n", error.what());
    return 1;
  }
}
