// Problem -> what the kernels of the sm90 family's backward read.
#pragma once

#include "core/problem.h"
#include "core/row.h"
#include "cuda/sm90/params.h"

namespace anyflash {

/// Parameters of the kernels of a backward row of the sm90 family, for a GPU of so many
/// multiprocessors; turns as in backward_params. Needs the driver, which encodes the tensor maps.
sm90::BackwardParams hopper_backward_params(const Problem& problem, const Row& row, void* workspace,
                                            int multiprocessors, bool turns);

} // namespace anyflash
