// Problem -> plan: which row, which grid, how much workspace. Pure host arithmetic, tested without
// a GPU.
#pragma once

#include <string>
#include <string_view>

#include "core/problem.h"

namespace anyflash {

/// Decides everything about a validated problem on a device. Throws NotSupported: asked / available
/// / missing.
anyflash_plan make_plan(const Problem& problem, const anyflash_device& device);

/// Why the variant `plain` cannot serve this problem; empty if it can.
std::string why_not_plain(const Problem& problem);

/// Why a plan took a row of an older family although the device has a newer one for this operation;
/// empty if there is none.
std::string why_older_family(const Problem& problem, const anyflash_device& device,
                             std::string_view family);

/// The plan in words: row, grid, shared memory, flops, bytes, the machine's floor.
std::string explain(const Problem& problem, const anyflash_plan& plan);

/// A GPU of this compute capability as planning sees it. Throws NotSupported for one older than
/// every row.
anyflash_device describe_gpu(int compute_capability);

} // namespace anyflash
