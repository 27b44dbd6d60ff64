// Lines of the case list, drawn at random.
#pragma once

#include <nlohmann/json.hpp>

namespace anyflash {

/// A small case with any mixture of options; the same seed, the same case.
nlohmann::json random_case(unsigned seed);

} // namespace anyflash
