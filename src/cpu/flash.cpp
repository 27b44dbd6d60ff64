// The tiled algorithm's front. For now the reference does the work.
#include "cpu/cpu.h"

namespace anyflash::cpu {

Tiling tiling(const Problem&) { return {64, 64, 1}; }

void forward(const Problem& problem, const Tiling&) { reference(problem); }

std::vector<std::string> instruction_sets() { return {"scalar"}; }

std::string instruction_set() { return "scalar"; }

int threads() { return 1; }

} // namespace anyflash::cpu
