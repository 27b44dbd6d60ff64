// What four warps with one role are: their index, their share of the registers. sm_90a.
#pragma once

#include "cuda/ptx/device.h"

namespace anyflash {

constexpr int warpgroup_size = 128;

/// The index of this warpgroup in its block, as warp_index() in a uniform register.
DEVICE int warpgroup_index() { return __shfl_sync(0xffffffff, threadIdx.x / warpgroup_size, 0); }

/// Changes the registers of every thread of this warpgroup; by all of its warps, once. Multiples of
/// 8 from 24 to 256. More waits until another warpgroup has given enough back.
template <int registers>
DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}
template <int registers>
DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

} // namespace anyflash
