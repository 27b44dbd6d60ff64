// Which GPU generations to build for: what users write in TORCH_CUDA_ARCH_LIST and its relatives.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/compile.h"

namespace anyflash {

/// What the machine that builds has.
struct BuildMachine {
  std::vector<int> gpus;         // compute capabilities of the GPUs present
  std::vector<int> capabilities; // what the compiler compiles for; empty: not known, everything
};

struct ArchSelection {
  std::vector<Target> targets;      // ascending, machine code before PTX
  std::vector<std::string> skipped; // one line for each entry that is not built, with the reason
};

/// FLASH_ATTN_CUDA_ARCHS, or else TORCH_CUDA_ARCH_LIST; empty when neither is set.
std::string requested_archs();

/// The targets of a list: "8.0;9.0+PTX", "80;90", "90a", "Ampere Hopper", "native", "all";
/// separated by semicolons, commas or spaces. An entry is a GPU generation, and brings every image
/// that serves it. +PTX, "all" and the empty list (the GPUs present, or all when there is none) add
/// PTX of compute_80, the insurance for GPUs that nobody knew yet. Throws InvalidValue for an entry
/// that makes no sense, and when no entry is left.
ArchSelection select_targets(std::string_view list, const BuildMachine& machine);

} // namespace anyflash
