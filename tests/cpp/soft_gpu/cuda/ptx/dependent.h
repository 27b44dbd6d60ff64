// cuda/ptx/dependent.h in software: kernels run one after the other.
#pragma once

#include "cuda/ptx/device.h"

namespace anyflash {

inline void let_next_kernel_start() {}
inline void wait_for_kernel_before() {}

} // namespace anyflash
