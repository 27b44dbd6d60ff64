#include "core/environment.h"

#include "core/row.h"

namespace anyflash {

std::string rows_json() {
  std::string text = "[";
  for (const Row& row : rows())
    text += (row.id ? ", " : "") + ("{\"name\": \"" + row.name()) + "\"}";
  return text + "]";
}

std::string environment_json() { return "{}"; }

} // namespace anyflash
