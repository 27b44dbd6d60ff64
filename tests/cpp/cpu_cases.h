// What the tests of the CPU backend share.
#pragma once

#include <string>
#include <vector>

#include "accuracy.h"
#include "cpu/cpu.h"

namespace anyflash {

/// What this machine can run; under emulation, which is slow, the one that it is there for.
inline std::vector<std::string> tested_instruction_sets() {
#if defined(ANYFLASH_EMULATED)
  return {cpu::instruction_sets().front()};
#else
  return cpu::instruction_sets();
#endif
}

} // namespace anyflash
