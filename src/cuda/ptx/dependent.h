// Kernels that start before the one in front of them is over. PTX ISA, "griddepcontrol". sm_90+.
#pragma once

#include "cuda/ptx/device.h"

namespace anyflash {

/// The kernel after this one may start, once every block of this one has said so or is over.
DEVICE void let_next_kernel_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

/// Waits until the kernel before this one is over, and what it wrote can be seen.
DEVICE void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

} // namespace anyflash
