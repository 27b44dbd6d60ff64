// Texts about the library and the machine, as JSON.
#pragma once

#include <string>

namespace anyflash {

/// The table of kernels: one object a row.
std::string rows_json();

/// Driver, GPUs, CPU features, compiler, caches and archives. Missing things are null, never an
/// error.
std::string environment_json();

} // namespace anyflash
