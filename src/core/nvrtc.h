// NVRTC opened at run time.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/compile.h"

namespace anyflash {

/// The options that every kernel is compiled with; `target` adds the architecture (an empty one
/// adds none).
std::vector<std::string> nvrtc_options(const Target& target);

/// Opens this libnvrtc, and the builtins beside it. Throws RuntimeError when it cannot be used.
std::shared_ptr<const Compiler> open_nvrtc(const std::string& path);

} // namespace anyflash
