// The CPU backend as the core sees it.
#pragma once

#include <string>
#include <vector>

#include "core/problem.h"

namespace anyflash::cpu {

/// What the tiled algorithm will do with a problem: a function of shapes only, never of the number
/// of threads, so that results do not depend on the machine's load.
struct Tiling {
  int Br = 0;     // query rows a block
  int Bc = 0;     // keys a block
  int splits = 1; // forward: parts that the keys of a query block are split into, merged in order
                  // by their log-sum-exp; backward: parts that the queries of a key head are split
                  // into, whose shares of dK and dV are summed in order
};

/// The tiling of the problem's operation.
Tiling tiling(const Problem& problem);

/// O and L of the problem by the tiled algorithm. fp32, fp16, bf16. Returns when done.
void forward(const Problem& problem, const Tiling& tiling);

/// dQ, dK and dV of the problem by the tiled algorithm. fp32, fp16, bf16. Returns when done.
void backward(const Problem& problem, const Tiling& tiling);

/// O and L by the plain formula in double: the oracle. All dtypes, also fp64.
void reference(const Problem& problem);

/// dQ, dK and dV by the plain formula in double. Reads neither o nor lse: everything is computed
/// anew from q, k, v. All dtypes, also fp64.
void reference_backward(const Problem& problem);

/// Instruction sets this machine can run, best first ("avx512", "avx2", "neon", "scalar").
std::vector<std::string> instruction_sets();

/// The one in use: the best, or what ANYFLASH_CPU asks for. Throws InvalidValue for one that this
/// machine lacks.
std::string instruction_set();

/// Threads in use: the process's affinity, or ANYFLASH_NUM_THREADS.
int threads();

} // namespace anyflash::cpu
