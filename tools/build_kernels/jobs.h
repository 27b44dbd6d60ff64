// Kernels to compile, each in a process of its own, as many at a time as cores and memory allow.
#pragma once

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "core/archive.h"
#include "core/compile.h"

namespace anyflash::build {

struct Job {
  const Row* row;
  Target target;
};

struct Result {
  ArchiveEntry entry;
  std::string error; // empty: compiled
};

/// Called in the order in which kernels are done.
using Progress = std::function<void(size_t done, const Job& job, const Result& result)>;

/// How many processes: MAX_JOBS or the cores of this process, as far as free memory allows.
int parallelism();

/// Compute capabilities of the GPUs present. Asked in a process of its own: the processes that
/// compile are forked, and CUDA in use does not survive a fork.
std::vector<int> gpus_present();

/// Compiles every job; results in the order of the jobs. Stops starting new ones after a failure.
/// `folder` is for temporary files.
std::vector<Result> run(const std::vector<Job>& jobs, const Compiler& compiler, int processes,
                        const std::filesystem::path& folder, const Progress& progress);

} // namespace anyflash::build
