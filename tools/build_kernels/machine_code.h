// A look at what the compiler made of a kernel for Hopper.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace anyflash::build {

/// Arrivals at barriers in shared memory that may overtake loads from it, in the code of a cubin
/// for compute capability 9.0: no instruction in between waits for the loads' results. What is
/// loaded may then be overwritten by who waits for the barrier (docs/decisions.md). A line each.
/// Reads the code from its begin to its end, as if no branch were taken. The encoding is not
/// documented; it is what `nvdisasm -hex` shows.
/// matrices_only: of loads, only ldmatrix counts.
std::vector<std::string> overtaken_loads(std::string_view cubin, bool matrices_only);

} // namespace anyflash::build
