// Problem and device -> plan. The GPU's heuristic is the table: the first row that serves.
#include "core/plan.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <optional>
#include <vector>

#include "core/error.h"
#include "core/images.h"
#include "core/kernel_params.h"
#include "core/plan_cache.h"
#include "core/row.h"
#include "core/tensor_checks.h"
#include "core/tensor_maps.h"
#include "core/work.h"
#include "cpu/cpu.h"

namespace anyflash {
namespace {

using std::to_string;

constexpr int64_t largest_grid = (int64_t{1} << 31) - 1;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool nothing_to_write(const Problem& p) {
  if (p.batch == 0) return true;
  const bool of_queries = p.seqlen_q > 0 && p.heads > 0; // O, L; dQ
  const bool of_keys = p.op == ANYFLASH_BACKWARD && p.seqlen_k > 0;
  return !of_queries && !of_keys;
}

anyflash_plan empty_plan(const Problem& problem, const anyflash_device& device) {
  anyflash_plan plan;
  std::memset(&plan, 0, sizeof plan); // padding too: plans compare by their bytes
  plan.struct_size = sizeof plan;
  plan.op = problem.op;
  plan.device = device;
  plan.splits = 1;
  return plan;
}

// CPU

anyflash_plan plan_on_cpu(const Problem& problem, const anyflash_device& device) {
  if (problem.dtype == DType::float64)
    throw NotSupported("asked: " + std::string(op_name(problem.op)) +
                       " of float64; available: float32, float16, bfloat16 on the CPU; missing: a "
                       "tiled algorithm in double (the reference takes float64)");
  const cpu::Tiling tiling = cpu::tiling(problem);
  anyflash_plan plan = empty_plan(problem, device);
  plan.Br = tiling.Br;
  plan.Bc = tiling.Bc;
  plan.splits = tiling.splits;
  if (nothing_to_write(problem)) return plan;
  anyflash_launch& launch = plan.launches[plan.launch_count++];
  launch.row = -1;
  launch.grid[0] = static_cast<uint32_t>(ceil_div(problem.seqlen_q, std::max(tiling.Br, 1)));
  launch.grid[1] = static_cast<uint32_t>(problem.heads);
  launch.grid[2] = static_cast<uint32_t>(problem.batch);
  return plan;
}

// GPU

/// Families of the table, the newest first: "sm90", "sm80".
std::vector<std::string_view> families() {
  std::vector<std::string_view> names;
  for (const Row& row : rows())
    if (std::ranges::find(names, row.family) == names.end()) names.push_back(row.family);
  std::ranges::sort(names, std::greater<>());
  return names;
}

/// Why the sm90 family leaves a problem to an older one; empty if it does not.
std::string why_not_hopper(const Problem& problem) {
  if (problem.op == ANYFLASH_FORWARD && std::max(problem.d, problem.dv) <= 32)
    return "head dims up to 32, for which only that family has a row";
  return why_not_tensor_maps(problem);
}

/// Keys that a query sees, on average; of packed sequences one of average length.
double keys_seen(const Problem& problem) {
  const int64_t batch = std::max<int64_t>(problem.batch, 1);
  const int64_t n = std::max<int64_t>(problem.total_q / batch, 1);
  return visible_pairs(n, problem.total_k / batch, problem.mask) / static_cast<double>(n);
}

/// Up to so many keys blocks of keys add to dQ in turns in any case: the last one then finishes it,
/// and no kernel has to. Where there are more, they are faster if nobody waits. Measured:
/// docs/kernels/sm90_backward.md.
double keys_in_turns(const Row& row) {
  switch (row.d) {
  case 64:
    return 4096;
  case 128:
  case 256:
    return 2048;
  default: // 96, 192
    return 512;
  }
}

bool last_finishes(const Problem& problem, const Row& row) {
  if (row.family != "sm90" || row.variant != "plain") return false;
  if (problem.deterministic) return true;
  return !free_order() && keys_seen(problem) < keys_in_turns(row) + 1;
}

bool in_own_image(const Row& row, const anyflash_device& device) {
  const std::string_view image = image_for(device.compute_capability, row.family);
  return !image.empty() && row.in_image(image);
}

bool has_ptx(const Row& row, const anyflash_device&) { return row.in_image(ptx_target().arch); }

/// True if the row computes the problem within the device's limits, in whatever image it is.
bool holds(const Row& row, const Problem& problem, const anyflash_device& device) {
  return row.op == op_name(problem.op) && row.dtype == problem.dtype && problem.d <= row.d &&
         problem.dv <= row.dv && row.shared_bytes() <= device.shared_bytes &&
         (row.variant == "general" || why_not_plain(problem).empty()) &&
         (row.family != "sm90" || why_not_hopper(problem).empty());
}

/// With ANYFLASH_IMAGE=sm_90, rows of this image are preferred.
bool in_forced_image(const Row& row) {
  const std::optional<Target> forced = forced_target();
  return forced && row.in_image(forced->arch);
}

/// Of two rows that differ in their tiles alone: large ones read K and V less often, small ones
/// waste less along the edge of a mask. Measured: docs/kernels/sm90_forward.md.
bool few_queries(const Problem& problem) {
  return problem.mask.right != Mask::unbounded && problem.seqlen_q > 512 &&
         problem.seqlen_q <= 1024;
}

/// The same of blocks of keys: small where a query sees two to four of the large ones, as under a
/// causal mask at lengths of 512 to 1024. Of packed sequences, those of average length.
bool few_keys(const Problem& problem) {
  const double keys = keys_seen(problem);
  return keys > 256 && keys < 513;
}

/// True if row a is the better of two that serve: newer family, plain, then the smaller bucket.
bool better(const Row& a, const Row& b, const Problem& problem) {
  if (in_forced_image(a) != in_forced_image(b)) return in_forced_image(a);
  if (a.family != b.family) return a.family > b.family;
  if (a.variant != b.variant) return a.variant == "plain";
  if (a.d != b.d) return a.d < b.d;
  if (a.dv != b.dv) return a.dv < b.dv;
  if (a.Br != b.Br) return few_queries(problem) ? a.Br < b.Br : a.Br > b.Br;
  return few_keys(problem) ? a.Bc < b.Bc : a.Bc > b.Bc;
}

/// The rows of the wanted images that hold the problem, the best first.
std::vector<const Row*> rows_for(const Problem& problem, const anyflash_device& device,
                                 bool (*wanted)(const Row&, const anyflash_device&)) {
  std::vector<const Row*> found;
  for (const Row& row : rows())
    if (holds(row, problem, device) && wanted(row, device)) found.push_back(&row);
  std::ranges::stable_sort(found,
                           [&](const Row* a, const Row* b) { return better(*a, *b, problem); });
  return found;
}

/// How a row can be had on a GPU of this machine. Nothing is known of GPUs elsewhere, nor asked
/// where an image is forced.
const Availability* availability_on(const Row& row, const anyflash_device& device) {
  const bool is_here = device.driver != 0;
  if (!is_here || forced_target()) return nullptr;
  return &availability(row, device.compute_capability, device.driver);
}

/// The best row that can be had; where none can be had, the best one, so that running it says what
/// is missing.
const Row* choose_row(const Problem& problem, const anyflash_device& device) {
  const std::vector<const Row*> own = rows_for(problem, device, in_own_image);
  if (own.empty()) return nullptr;
  for (const Row* row : own) {
    const Availability* known = availability_on(*row, device);
    if (!known || known->machine_code) return row;
  }
  for (const Row* row : rows_for(problem, device, has_ptx))
    if (runs_as_ptx(*row, device)) return row;
  return own.front();
}

/// The head dims that the table has for this dtype on this GPU: "128x128 general, 128x128 plain".
std::string available_on(const Problem& problem, const anyflash_device& device) {
  std::vector<std::string> found;
  for (const Row& row : rows()) {
    if (!in_own_image(row, device) || row.op != op_name(problem.op) || row.dtype != problem.dtype ||
        row.shared_bytes() > device.shared_bytes)
      continue;
    std::string text = to_string(row.d) + "x" + to_string(row.dv) + " " + std::string(row.variant);
    if (std::ranges::find(found, text) == found.end()) found.push_back(std::move(text));
  }
  std::string all;
  for (const std::string& text : found) all += (all.empty() ? "" : ", ") + text;
  return all.empty() ? "none" : all;
}

/// Thread blocks that stay and take tile after tile, head after head: one a multiprocessor. Where
/// that gave each the same place in every head, they were seen to hold each other up (by a fifth at
/// d 64; docs/kernels/sm90_forward.md), so then it is one fewer, unless that costs a round.
uint32_t staying_blocks(uint32_t tiles, int64_t tiles_of_head, const anyflash_device& device) {
  const auto all = static_cast<uint32_t>(device.multiprocessors);
  if (tiles <= all) return tiles;
  const bool in_step = tiles_of_head > 1 && all % tiles_of_head == 0;
  return in_step && ceil_div(tiles, all - 1) == ceil_div(tiles, all) ? all - 1 : all;
}

/// One thread block for each block of rows, head and sequence. Each factor is below 2^31, the
/// product of two below 2^62.
uint32_t grid_of(const char* rows, int64_t blocks, int64_t heads, int64_t batch) {
  const int64_t pairs = heads * batch;
  if (blocks > 0 && pairs > largest_grid / blocks)
    throw NotSupported("asked: " + to_string(blocks) + " " + rows + " blocks x " +
                       to_string(heads) + " heads x batch " + to_string(batch) +
                       "; available: at most 2^31 - 1 blocks a launch; missing: a larger grid: "
                       "split the batch");
  return static_cast<uint32_t>(blocks * pairs);
}

void add_launch(anyflash_plan& plan, const Row& row, anyflash_entry entry, uint32_t blocks) {
  anyflash_launch& launch = plan.launches[plan.launch_count++];
  launch.row = row.id;
  launch.entry = entry;
  launch.grid[0] = blocks;
  launch.grid[1] = launch.grid[2] = 1;
  launch.threads = static_cast<uint32_t>(row.threads(entry));
  if (entry == ANYFLASH_KERNEL) launch.shared_bytes = static_cast<uint32_t>(row.shared_bytes());
}

anyflash_plan plan_on_gpu(const Problem& problem, const anyflash_device& device) {
  const std::string gpu = "sm_" + to_string(device.compute_capability);
  if (problem.dtype != DType::float16 && problem.dtype != DType::bfloat16)
    throw NotSupported("asked: " + std::string(op_name(problem.op)) + " of " +
                       dtype_name(problem.dtype) + " on a GPU (" + gpu +
                       "); available: float16 and bfloat16 there, float32 on the CPU; missing: "
                       "kernels for it: convert q, k, v or move them to the CPU");
  const Row* row = choose_row(problem, device);
  if (!row)
    throw NotSupported(
        "asked: " + std::string(op_name(problem.op)) + " of " + dtype_name(problem.dtype) +
        " with head dims " + to_string(problem.d) + "x" + to_string(problem.dv) + " on " + gpu +
        "; available there: head dims up to " + available_on(problem, device) +
        "; missing: a row of the kernel table that holds this problem" +
        (why_not_plain(problem).empty() ? ""
                                        : " (variant general: " + why_not_plain(problem) + ")"));
  anyflash_plan plan = empty_plan(problem, device);
  plan.Br = row->Br;
  plan.Bc = row->Bc;
  if (nothing_to_write(problem)) return plan;
  const uint32_t of_queries =
      grid_of("query", ceil_div(problem.seqlen_q, row->Br), problem.heads, problem.batch);
  if (problem.op == ANYFLASH_FORWARD) {
    const int64_t of_head = ceil_div(problem.seqlen_q, row->Br);
    add_launch(plan, *row, ANYFLASH_KERNEL,
               row->family == "sm90" ? staying_blocks(of_queries, of_head, device) : of_queries);
    return plan;
  }
  if (problem.heads == 0)
    throw NotSupported("asked: gradients of " + to_string(problem.heads_k) +
                       " key heads without a query head; available: at least one query head; "
                       "missing: kernels for it: they are 0");
  const auto cluster = static_cast<uint32_t>(row->cluster());
  const uint32_t of_keys =
      grid_of("key", ceil_div(problem.seqlen_k, row->Bc * row->cluster()) * row->cluster(),
              problem.heads_k, problem.batch);
  // Thread blocks of the sm90 family stay and take one key block after the other, from a counter
  // that the kernel before sets to 0 even where there is no query.
  const bool stay = row->family == "sm90";
  const auto resident = static_cast<uint32_t>(device.multiprocessors) / cluster * cluster;
  add_launch(plan, *row, ANYFLASH_KERNEL_PRE, stay ? std::max(of_queries, 1u) : of_queries);
  add_launch(plan, *row, ANYFLASH_KERNEL, stay ? std::min(of_keys, resident) : of_keys);
  if (!last_finishes(problem, *row)) add_launch(plan, *row, ANYFLASH_KERNEL_POST, of_queries);
  const BackwardWorkspace workspace = backward_workspace(problem, *row);
  plan.workspace_offsets[0] = workspace.dq_sum;
  plan.workspace_offsets[1] = workspace.row_stats;
  plan.workspace_offsets[2] = workspace.turns;
  plan.workspace_bytes = workspace.end;
  return plan;
}

/// Largest dynamic shared memory of one block. Source: CUDA programming guide, "Technical
/// specifications per compute capability"; an unknown newer GPU counts as a small one.
int shared_bytes_of(int compute_capability) {
  switch (compute_capability / 10) {
  case 8:
    return (compute_capability == 80 || compute_capability == 87 ? 163 : 99) * 1024;
  case 9:
  case 10:
    return 227 * 1024;
  default:
    return 99 * 1024;
  }
}

/// Multiprocessors of a typical card of the generation.
int multiprocessors_of(int compute_capability) {
  switch (compute_capability) {
  case 80:
    return 108; // A100
  case 86:
    return 82; // RTX 3090
  case 87:
    return 16; // Jetson AGX Orin
  case 89:
    return 128; // RTX 4090
  case 90:
    return 132; // H100 SXM
  case 100:
    return 148; // B200
  case 120:
    return 170; // RTX 5090
  default:
    return 100;
  }
}

} // namespace

std::string why_not_plain(const Problem& problem) {
  if (problem.softcap != 0) return "softcap";
  if (problem.alibi) return "ALiBi";
  if (problem.scale <= 0) return "a scale that is not positive";
  if (!problem.aligned)
    return "rows of q, k, v, an output or a gradient that do not start on 16 bytes";
  return "";
}

std::string why_older_family(const Problem& problem, const anyflash_device& device,
                             std::string_view family) {
  for (const Row* row : rows_for(problem, device, in_own_image)) {
    if (row->family <= family) continue;
    const Availability* known = availability_on(*row, device);
    return known ? known->missing : "ANYFLASH_IMAGE asks for an image of this one";
  }
  for (const Row& row : rows()) {
    if (row.family <= family || row.op != op_name(problem.op) || !in_own_image(row, device))
      continue;
    const std::string reason = why_not_hopper(problem);
    return reason.empty() ? "no row of " + std::string(row.family) + " holds this problem" : reason;
  }
  return "";
}

bool runs_as_ptx(const Row& row, const anyflash_device& device) {
  const Availability* known = availability_on(row, device);
  return known && known->ptx;
}

bool free_order() {
  const char* const set = std::getenv("ANYFLASH_FREE_ORDER");
  return set && *set == '1';
}

anyflash_plan make_plan(const Problem& problem, const anyflash_device& device) {
  return cached_plan(problem, device, [&] {
    return device.type == ANYFLASH_CPU ? plan_on_cpu(problem, device)
                                       : plan_on_gpu(problem, device);
  });
}

anyflash_device describe_gpu(int compute_capability) {
  const auto known = families();
  const bool served = std::ranges::any_of(known, [&](std::string_view family) {
    return !image_for(compute_capability, family).empty();
  });
  if (!served)
    throw NotSupported("asked: a GPU of compute capability " + to_string(compute_capability / 10) +
                       "." + to_string(compute_capability % 10) +
                       "; available: 8.0 and newer; missing: kernels for older GPUs");
  anyflash_device device;
  std::memset(&device, 0, sizeof device);
  device.struct_size = sizeof device;
  device.type = ANYFLASH_CUDA;
  device.compute_capability = compute_capability;
  device.multiprocessors = multiprocessors_of(compute_capability);
  device.shared_bytes = shared_bytes_of(compute_capability);
  return device;
}

} // namespace anyflash
