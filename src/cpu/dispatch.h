// Which of the compiled instruction sets runs.
#pragma once

#include "cpu/block.h"

namespace anyflash::cpu {

/// The one in use: the best that this machine can run, or what ANYFLASH_CPU asks for. Throws
/// InvalidValue, naming what is available.
const InstructionSet& chosen_instruction_set();

} // namespace anyflash::cpu
