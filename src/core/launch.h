// Plan -> GPU: finds or compiles the image, loads it once a device, launches. The only place that
// calls the driver's launch.
#pragma once

#include "core/problem.h"

namespace anyflash {

/// Launches a plan on `stream` of the problem's device. Allocates, copies and synchronises nothing
/// once the kernels are loaded (warm_up). Throws RuntimeError.
void launch(const anyflash_plan& plan, const Problem& problem, void* workspace, void* stream);

/// Loads the kernels of a plan and sets their attributes.
void warm_up(const anyflash_plan& plan);

/// A GPU of this machine. Throws RuntimeError with the remedy when there is no driver or no such
/// GPU.
anyflash_device get_gpu(int index);

} // namespace anyflash
