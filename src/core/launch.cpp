#include "core/launch.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <span>

#include "core/driver.h"
#include "core/error.h"
#include "core/hopper_backward_params.h"
#include "core/hopper_params.h"
#include "core/kernel_params.h"
#include "core/kernels.h"
#include "core/plan.h"

namespace anyflash {
namespace {

std::span<const anyflash_launch> launches_of(const anyflash_plan& plan) {
  return {plan.launches, static_cast<size_t>(plan.launch_count)};
}

const Row& row_of(const anyflash_launch& launch) {
  const std::span<const Row> table = rows();
  if (launch.row < 0 || static_cast<size_t>(launch.row) >= table.size())
    throw InvalidValue("a plan for a GPU names row " + std::to_string(launch.row) +
                       "; the table has rows 0 to " + std::to_string(table.size() - 1));
  return table[static_cast<size_t>(launch.row)];
}

/// The row of the table that all launches of a plan are kernels of.
const Row& row_of(const anyflash_plan& plan) {
  const std::span<const anyflash_launch> launches = launches_of(plan);
  for (const anyflash_launch& one : launches)
    if (one.row != launches[0].row)
      throw InvalidValue("the launches of a plan for a GPU name rows " +
                         std::to_string(launches[0].row) + " and " + std::to_string(one.row) +
                         "; they are kernels of one row");
  return row_of(launches[0]);
}

bool has_blocks(const anyflash_launch& launch) {
  return launch.grid[0] != 0 && launch.grid[1] != 0 && launch.grid[2] != 0;
}

/// CUDA 12.3: since then a launch that starts early may be captured into a graph.
constexpr int graphs_know_early_starts = 12030;

/// True for kernels that may start before the kernel in front of them, of the same row, is over,
/// because they wait for it themselves (programmatic dependent launch).
bool starts_early(const Row& row, const anyflash_launch& launch) {
  return row.family == "sm90" && row.op == "backward" && launch.entry != ANYFLASH_KERNEL_PRE;
}

/// What a launch asks for beyond its grid; on the stack, since every call passes here.
struct Attributes {
  cuda::LaunchAttribute list[2];
  unsigned count = 0;

  cuda::LaunchAttribute& add(cuda::LaunchAttributeId id) {
    cuda::LaunchAttribute& attribute = list[count++] = {};
    attribute.id = id;
    return attribute;
  }
};

Attributes attributes_of(const Row& row, const anyflash_launch& launch, int driver_version) {
  Attributes attributes;
  if (starts_early(row, launch) && driver_version >= graphs_know_early_starts)
    attributes.add(cuda::programmatic_stream_serialization).value = 1;
  if (row.cluster() > 1 && launch.entry == ANYFLASH_KERNEL) {
    cuda::LaunchAttribute& cluster = attributes.add(cuda::cluster_dimension);
    cluster.blocks[0] = static_cast<unsigned>(row.cluster());
    cluster.blocks[1] = cluster.blocks[2] = 1;
  }
  return attributes;
}

void launch_one(const anyflash_launch& launch, const Row& row, void* params, int device,
                void* stream) {
  void* arguments[] = {params};
  const cuda::Driver& driver = cuda::driver();
  Attributes attributes = attributes_of(row, launch, driver.version);
  const cuda::LaunchConfig config = {{launch.grid[0], launch.grid[1], launch.grid[2]},
                                     {launch.threads, 1, 1},
                                     launch.shared_bytes,
                                     stream,
                                     attributes.list,
                                     attributes.count};
  const cuda::Kernel kernel = kernel_of(row, static_cast<anyflash_entry>(launch.entry), device);
  const cuda::Status status = driver.LaunchKernelEx(&config, kernel, arguments, nullptr);
  if (status != 0) driver.fail(status, "launching kernel " + row.name());
}

/// The kernels of a plan, which all read the same parameters.
template <class Params>
void launch_all(const anyflash_plan& plan, const Row& row, Params params, void* stream) {
  for (const anyflash_launch& one : launches_of(plan))
    if (has_blocks(one)) launch_one(one, row, &params, plan.device.index, stream);
}

/// ANYFLASH_PLAN_FOR=86: plan as if the GPU were of this compute capability, so that the rows of
/// another generation run on it. For verification.
int planned_capability() {
  const char* text = std::getenv("ANYFLASH_PLAN_FOR");
  int capability = 0;
  if (text) std::from_chars(text, text + std::strlen(text), capability);
  return capability;
}

/// Whether blocks of keys add to dQ in turns: where it has to be the same from run to run, and
/// where the last of them finishes it, so that the plan has no kernel for that.
bool in_turns(const anyflash_plan& plan, const Problem& problem) {
  return problem.deterministic ||
         plan.launches[plan.launch_count - 1].entry != ANYFLASH_KERNEL_POST;
}

} // namespace

void launch(const anyflash_plan& plan, const Problem& problem, void* workspace, void* stream) {
  if (std::ranges::none_of(launches_of(plan), has_blocks)) return;
  const ScopedContext context(plan.device.index);
  const Row& row = row_of(plan);
  const bool hopper = row.family == "sm90";
  if (problem.op == ANYFLASH_FORWARD && hopper)
    launch_all(plan, row, hopper_forward_params(problem, row, plan.launches[0].grid[0]), stream);
  else if (problem.op == ANYFLASH_FORWARD)
    launch_all(plan, row, forward_params(problem, row), stream);
  else if (hopper)
    launch_all(plan, row,
               hopper_backward_params(problem, row, workspace, plan.device.multiprocessors,
                                      in_turns(plan, problem)),
               stream);
  else
    launch_all(plan, row, backward_params(problem, row, workspace, in_turns(plan, problem)),
               stream);
}

void warm_up(const anyflash_plan& plan) {
  if (plan.launch_count == 0) return;
  const ScopedContext context(plan.device.index);
  kernel_of(row_of(plan), ANYFLASH_KERNEL, plan.device.index); // loads the row's others too
}

anyflash_device get_gpu(int index) {
  const Gpu& gpu = gpu_at(index);
  anyflash_device device{};
  device.struct_size = sizeof device;
  device.type = ANYFLASH_CUDA;
  device.index = index;
  device.compute_capability = gpu.compute_capability;
  device.multiprocessors = gpu.multiprocessors;
  device.shared_bytes = gpu.shared_bytes;
  device.driver = gpu.driver;
  if (const int planned = planned_capability()) {
    device.compute_capability = planned;
    device.shared_bytes = std::min(device.shared_bytes, describe_gpu(planned).shared_bytes);
  }
  return device;
}

} // namespace anyflash
