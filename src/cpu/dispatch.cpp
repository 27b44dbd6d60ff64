#include "cpu/dispatch.h"

#include <cstdlib>
#include <string_view>

#include "core/error.h"
#include "cpu/cpu.h"

namespace anyflash::cpu {
namespace {

/// Best first.
const InstructionSet* const compiled[] = {
#if defined(__x86_64__) || defined(_M_X64)
    &avx512,
    &avx2,
#endif
#if defined(__aarch64__) || defined(_M_ARM64)
    &neon,
#endif
    &scalar,
};

std::string available_names() {
  std::string names;
  for (const std::string& name : instruction_sets()) names += (names.empty() ? "" : ", ") + name;
  return names;
}

} // namespace

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet* set : compiled)
    if (set->available()) names.emplace_back(set->name);
  return names;
}

const InstructionSet& chosen_instruction_set() {
  const char* variable = std::getenv("ANYFLASH_CPU");
  const std::string_view asked = variable ? variable : "";
  for (const InstructionSet* set : compiled)
    if (set->available() && (asked.empty() || asked == set->name)) return *set;
  throw InvalidValue("ANYFLASH_CPU asks for \"" + std::string(asked) +
                     "\"; this machine has: " + available_names());
}

std::string instruction_set() { return chosen_instruction_set().name; }

} // namespace anyflash::cpu
