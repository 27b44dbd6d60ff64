// The plan in words, with the work counted exactly and the least time that the machine allows.
#include <algorithm>
#include <cstdio>
#include <limits>

#include "core/compile.h"
#include "core/plan.h"
#include "core/row.h"
#include "core/tensor_checks.h"
#include "core/work.h"
#include "cpu/cpu.h"

namespace anyflash {
namespace {

using std::to_string;

/// What a card can do at most. Source: the makers' data sheets; dense 16-bit products with fp32
/// sums, TB/s of its memory.
struct Machine {
  int compute_capability;
  const char* name;
  double tera_flops;
  double tera_bytes;
};

constexpr Machine machines[] = {
    {80, "A100 80GB", 312, 2.04}, {86, "RTX 3090", 71, 0.94},   {89, "RTX 4090", 165, 1.01},
    {90, "H100 SXM", 989, 3.35},  {120, "RTX 5090", 209, 1.79},
};

std::string in_units(double value, const char* unit) {
  static constexpr const char* prefixes[] = {"", "k", "M", "G", "T", "P", "E"};
  int power = 0;
  for (; value >= 1000 && power < 6; ++power) value /= 1000;
  char text[64];
  std::snprintf(text, sizeof text, "%.4g %s%s", value, prefixes[power], unit);
  return text;
}

std::string whole(double value) {
  char text[64];
  std::snprintf(text, sizeof text, "%.0f", value);
  return text;
}

std::string in_microseconds(double seconds) {
  char text[64];
  std::snprintf(text, sizeof text, "%.3g us", seconds * 1e6);
  return text;
}

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  return text;
}

std::string side(int64_t window) {
  return window == Mask::unbounded ? "unbounded" : to_string(window);
}

std::string mask_words(const Mask& mask) {
  if (mask.left == Mask::unbounded && mask.right == Mask::unbounded) return "none";
  if (mask.left == Mask::unbounded && mask.right == 0) return "causal";
  return "window left " + side(mask.left) + ", right " + side(mask.right);
}

std::string lse_words(const Problem& p) {
  if (p.op == ANYFLASH_FORWARD) return p.want_lse ? "returned" : "not wanted";
  return std::string(p.has_dlse ? "has a gradient" : "without gradient") +
         (p.deterministic ? ", dQ deterministic" : "");
}

std::string problem_words(const Problem& p) {
  std::string text = "problem    " + std::string(op_name(p.op)) + ", " + dtype_name(p.dtype) + ", ";
  text += p.packed ? "packed: " + to_string(p.batch) + " sequences, " + to_string(p.total_q) +
                         " rows of q (at most " + to_string(p.seqlen_q) + " a sequence), " +
                         to_string(p.total_k) + " of k (at most " + to_string(p.seqlen_k) + ")"
                   : "dense: batch " + to_string(p.batch) + ", seqlen_q " + to_string(p.seqlen_q) +
                         ", seqlen_k " + to_string(p.seqlen_k);
  text += ", heads " + to_string(p.heads) + " over " + to_string(p.heads_k) + ", d " +
          to_string(p.d) + ", dv " + to_string(p.dv) + "\n";
  text += "options    mask " + mask_words(p.mask) + ", scale " + number(p.scale) + ", softcap " +
          (p.softcap != 0 ? number(p.softcap) : "off") + ", ALiBi " + (p.alibi ? "on" : "off") +
          ", LSE " + lse_words(p) + "\n";
  return text;
}

std::string device_words(const anyflash_device& device) {
  if (device.type == ANYFLASH_CPU)
    return "device     cpu, " + cpu::instruction_set() + ", " + to_string(cpu::threads()) +
           " threads\n";
  return "device     cuda, sm_" + to_string(device.compute_capability) + ", " +
         to_string(device.multiprocessors) + " multiprocessors, " +
         to_string(device.shared_bytes / 1024) + " KiB shared memory a block\n";
}

/// "grid       128 blocks of 128 threads, 65536 bytes of shared memory each"
std::string grid_words(const anyflash_launch& launch, const std::string& blocks) {
  static constexpr const char* names[] = {"grid       ", "before     ", "after      "};
  return names[launch.entry] + blocks + " blocks of " + to_string(launch.threads) + " threads, " +
         to_string(launch.shared_bytes) + " bytes of shared memory each\n";
}

std::string image_words(const Row& row, const anyflash_device& device) {
  if (runs_as_ptx(row, device)) return ptx_target().name() + ", compiled by the driver";
  return std::string(image_for(device.compute_capability, row.family));
}

std::string launch_words(const Problem& problem, const anyflash_plan& plan,
                         const anyflash_launch& launch) {
  const std::string blocks = to_string(launch.grid[0]) + " x " + to_string(launch.grid[1]) + " x " +
                             to_string(launch.grid[2]);
  const bool split_queries = launch.row < 0 && problem.op == ANYFLASH_BACKWARD; // see cpu::Tiling
  const std::string tiles = "blocks of " + to_string(plan.Br) + " queries by " +
                            to_string(plan.Bc) +
                            (split_queries ? " keys, queries in " : " keys, keys in ") +
                            to_string(plan.splits) + (plan.splits == 1 ? " part" : " parts");
  if (launch.row < 0)
    return "row        the tiled algorithm of the CPU\nblocks     " + tiles + "\ngrid       " +
           blocks + " (query blocks, heads, sequences)\n";
  if (launch.entry != ANYFLASH_KERNEL) return grid_words(launch, blocks);
  const Row& row = rows()[static_cast<size_t>(launch.row)];
  const std::string reason = why_not_plain(problem);
  std::string text = "row        " + row.name() + " (row " + to_string(row.id) + "), image " +
                     image_words(row, plan.device) + "\n";
  const std::string older = why_older_family(problem, plan.device, row.family);
  if (!older.empty())
    text += "family     " + std::string(row.family) + " rather than a newer one: " + older + "\n";
  if (row.variant == "general")
    text += "variant    general rather than plain: " +
            (reason.empty() ? "no plain row holds these head dims" : reason) + "\n";
  return text + "blocks     " + tiles + "\n" + grid_words(launch, blocks);
}

std::string floor_words(const Work& work, const anyflash_device& device) {
  if (device.type == ANYFLASH_CPU)
    return "floor      not known without measuring this CPU: python -m anyflash bench\n";
  for (const Machine& machine : machines) {
    if (machine.compute_capability != device.compute_capability) continue;
    const double compute = work.flops / (machine.tera_flops * 1e12);
    const double memory = work.bytes / (machine.tera_bytes * 1e12);
    return "floor      " + in_microseconds(std::max(compute, memory)) + " on an " + machine.name +
           ": the larger of " + in_microseconds(compute) + " at " + number(machine.tera_flops) +
           " TFLOP/s and " + in_microseconds(memory) + " at " + number(machine.tera_bytes) +
           " TB/s\n";
  }
  return "floor      not known for this GPU\n";
}

} // namespace

std::string explain(const Problem& problem, const anyflash_plan& plan) {
  std::string text = problem_words(problem) + device_words(plan.device);
  if (plan.launch_count == 0) return text + "launches   none: there is nothing to write\n";
  for (int i = 0; i < plan.launch_count; ++i) text += launch_words(problem, plan, plan.launches[i]);
  text += "workspace  " + to_string(plan.workspace_bytes) + " bytes\n";
  const Work work = work_of(problem);
  const char* exactly = work.exact ? "" : "at most ";
  text += "work       " + std::string(exactly) + in_units(work.flops, "FLOP") + " (" +
          whole(work.pairs) + " visible pairs of query and key over all heads), " + exactly +
          in_units(work.bytes, "B") + " of least traffic\n";
  return text + floor_words(work, plan.device);
}

} // namespace anyflash
