// Plans already made, by what they depend on.
#pragma once

#include <functional>

#include "core/problem.h"

namespace anyflash {

/// The plan of this problem on this device, from the cache or by `make`. Pointers, scale and the
/// exact strides are no part of the key: a plan depends on shapes and options only. Throws what
/// `make` throws; refusals are not kept.
anyflash_plan cached_plan(const Problem& problem, const anyflash_device& device,
                          const std::function<anyflash_plan()>& make);

/// Plans held now; at most plan_cache_limit.
size_t plan_cache_size();
constexpr size_t plan_cache_limit = 4096;

} // namespace anyflash
