// cuda/ptx/warpgroup.h in software: registers are plenty.
#pragma once

#include "cuda/ptx/device.h"

namespace anyflash {

constexpr int warpgroup_size = 128;

inline int warpgroup_index() { return static_cast<int>(threadIdx.x / warpgroup_size); }

template <int registers>
void more_registers() {}
template <int registers>
void fewer_registers() {}

} // namespace anyflash
