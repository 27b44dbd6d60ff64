// What the build made, for people and for CI: ledger.json, and the checks on it.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "jobs.h"

namespace anyflash::build {

struct Built {
  Job job;
  ArchiveEntry entry;
};

struct Summary {
  int compiler_version = 0; // 0: there was none
  size_t compiled = 0;      // kernels of this run; the others were up to date
  int processes = 0;
  double seconds = 0; // of this run
};

/// Peak memory of the largest process, of all kernels.
double largest_mb(const std::vector<Built>& kernels);

void write_ledger(const std::filesystem::path& path, const Summary& summary,
                  const std::vector<Built>& kernels);

/// One line for each thing that a kernel of ours must not do: spills above the row's allowance,
/// local-memory arrays, ptxas warnings that slow, loads that an arrival may overtake (on Hopper),
/// more memory than `process_limit_mb` to compile.
std::vector<std::string> complaints(const std::vector<Built>& kernels);

} // namespace anyflash::build
