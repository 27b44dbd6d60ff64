// Problem -> what the forward kernels read.
#pragma once

#include "core/problem.h"
#include "core/row.h"
#include "cuda/params.h"

namespace anyflash {

/// The constants by which divide() divides, for 1 <= divisor < 2^31.
Divisor make_divisor(int64_t divisor);

/// Parameters of the forward kernel of a row. The problem is valid and has something to write.
ForwardParams forward_params(const Problem& problem, const Row& row);

} // namespace anyflash
