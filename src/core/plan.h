// Problem -> plan: which row, which grid, how much workspace. Host arithmetic, and for a GPU of
// this machine, once a process, which rows can be had; tested without a GPU.
#pragma once

#include <string>
#include <string_view>

#include "core/problem.h"
#include "core/row.h"

namespace anyflash {

/// ANYFLASH_FREE_ORDER=1: without determinism blocks of keys add to dQ in any order, also where the
/// plan would have them take turns. For verification.
bool free_order();

/// Decides everything about a validated problem on a device. Throws NotSupported: asked / available
/// / missing.
anyflash_plan make_plan(const Problem& problem, const anyflash_device& device);

/// Why the variant `plain` cannot serve this problem; empty if it can.
std::string why_not_plain(const Problem& problem);

/// Why a plan took a row of an older family although the device has a newer one for this operation
/// (or its image cannot be had); empty if there is none.
std::string why_older_family(const Problem& problem, const anyflash_device& device,
                             std::string_view family);

/// True if a row runs on this GPU as PTX for want of machine code. False for a GPU elsewhere.
bool runs_as_ptx(const Row& row, const anyflash_device& device);

/// The plan in words: row, grid, shared memory, flops, bytes, the machine's floor.
std::string explain(const Problem& problem, const anyflash_plan& plan);

/// A GPU of this compute capability as planning sees it. Throws NotSupported for one older than
/// every row.
anyflash_device describe_gpu(int compute_capability);

} // namespace anyflash
