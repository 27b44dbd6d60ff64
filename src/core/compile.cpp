#include "core/compile.h"

#include <algorithm>
#include <charconv>
#include <map>
#include <mutex>

#include "core/error.h"
#include "core/nvrtc.h"
#include "core/sources.h"

namespace anyflash {
namespace {

std::string header_of(std::string_view op, std::string_view family) {
  return "cuda/" + std::string(family) + "/" + std::string(op) + ".cuh";
}

/// "forward" -> "anyflash::ForwardParams"; "anyflash::sm90::ForwardParams" where the family has
/// parameters of its own.
std::string params_of(std::string_view op, const std::string& family) {
  const bool own = find_source("cuda/" + family + "/params.h") != nullptr;
  std::string name = own ? "anyflash::" + family + "::" : "anyflash::";
  bool capital = true;
  for (const char letter : op) {
    if (letter != '_') name.push_back(capital ? static_cast<char>(letter - 'a' + 'A') : letter);
    capital = letter == '_';
  }
  return name + "Params";
}

/// One bool per variant of the table, so that a kernel asks `if constexpr (Row::general)`.
std::string variant_flags(const Row& row) {
  std::vector<std::string_view> variants;
  for (const Row& other : rows())
    if (std::find(variants.begin(), variants.end(), other.variant) == variants.end())
      variants.push_back(other.variant);
  std::string text;
  for (std::string_view variant : variants)
    text += (text.empty() ? "" : ", ") + std::string(variant) + " = " +
            (variant == row.variant ? "true" : "false");
  return text;
}

/// The first number before `unit` in a line such as "    0 bytes stack frame, 8 bytes spill
/// stores".
int number_before(std::string_view log, std::string_view unit) {
  const size_t at = log.find(unit);
  if (at == log.npos) return 0;
  size_t begin = at;
  while (begin > 0 && log[begin - 1] >= '0' && log[begin - 1] <= '9') --begin;
  int number = 0;
  std::from_chars(log.data() + begin, log.data() + at, number);
  return number;
}

/// The parts of ptxas' report that speak of one entry each; the whole if it names none.
std::vector<std::string_view> entry_sections(std::string_view log) {
  constexpr std::string_view title = "Compiling entry function";
  std::vector<std::string_view> sections;
  for (size_t at = log.find(title); at != log.npos;) {
    const size_t next = log.find(title, at + title.size());
    sections.push_back(log.substr(at, next == log.npos ? next : next - at));
    at = next;
  }
  if (sections.empty()) sections.push_back(log);
  return sections;
}

int number_after(std::string_view log, std::string_view word) {
  const size_t at = log.find(word);
  if (at == log.npos) return 0;
  int number = 0;
  std::from_chars(log.data() + at + word.size(), log.data() + log.size(), number);
  return number;
}

} // namespace

Target parse_target(std::string_view name) {
  for (const bool ptx : {false, true}) {
    const std::string_view prefix = ptx ? "compute_" : "sm_";
    if (name.starts_with(prefix) && name.size() > prefix.size())
      return {std::string(name.substr(prefix.size())), ptx};
  }
  throw InvalidValue("not an image: '" + std::string(name) +
                     "'; expected e.g. sm_90 or compute_80");
}

std::vector<Target> all_targets() {
  std::vector<Target> targets;
  for (std::string_view arch : image_archs()) targets.push_back({std::string(arch)});
  targets.push_back(ptx_target());
  return targets;
}

Resources parse_resources(std::string_view log) {
  Resources resources;
  for (std::string_view section : entry_sections(log)) {
    const int spill_stores = number_before(section, " bytes spill stores");
    const bool main = section.find("'kernel'") != section.npos || resources.registers == 0;
    if (main) {
      resources.registers = number_after(section, "Used ");
      resources.static_shared_bytes = number_before(section, " bytes smem");
    }
    resources.spill_bytes += spill_stores + number_before(section, " bytes spill loads");
    const int spill_slots = (spill_stores + 7) / 8 * 8; // frames are multiples of 8 bytes
    resources.stack_bytes +=
        std::max(0, number_before(section, " bytes stack frame") - spill_slots);
  }
  while (!log.empty()) {
    const std::string_view line = log.substr(0, log.find('\n'));
    if (line.find("(C75") != line.npos) resources.warnings.emplace_back(line);
    log.remove_prefix(std::min(line.size() + 1, log.size()));
  }
  return resources;
}

std::string source_of(const Row& row) {
  const std::string op(row.op), family(row.family);
  const std::string dtype = row.dtype == DType::bfloat16 ? "bf16" : "fp16";
  std::string text = "#include \"" + header_of(op, family) + "\"\n";
  text += "struct Row { static constexpr int d = " + std::to_string(row.d) +
          ", dv = " + std::to_string(row.dv) + ", Br = " + std::to_string(row.Br) +
          ", Bc = " + std::to_string(row.Bc);
  if (!row.constants.empty()) text += ", " + std::string(row.constants);
  text += "; static constexpr bool " + variant_flags(row);
  text += "; using T = anyflash::" + dtype + "; };\n";
  for (const EntryPoint& entry : entries_of(row.op)) {
    const bool main = entry.id == ANYFLASH_KERNEL;
    const int blocks_per_sm = main ? row.constant("blocks_per_sm", 1) : 1;
    text += "extern \"C\" __global__ void __launch_bounds__(" +
            std::to_string(row.threads(entry.id)) + ", " + std::to_string(blocks_per_sm) + ") " +
            entry.symbol + "(const __grid_constant__ " + params_of(op, family) +
            " p) { anyflash::" + family + "::" + entry.function + "<Row>(p); }\n";
  }
  return text;
}

std::string source_hash(std::string_view op, std::string_view family) {
  static std::mutex mutex;
  static auto* const known = new std::map<std::string, std::string>; // by header
  const std::lock_guard lock(mutex);
  std::string& text = (*known)[header_of(op, family)];
  if (!text.empty()) return text;
  Hash hash;
  for (const Source* source : source_closure(header_of(op, family)))
    hash.add(source->name).end().add(without_comments(source->text)).end();
  return text = hash.hex();
}

std::string row_hash(const Row& row) {
  Hash hash;
  hash.add(source_hash(row.op, row.family)).end().add(source_of(row)).end();
  for (const std::string& option : nvrtc_options({})) hash.add(option).end();
  return hash.hex();
}

Image compile(const Row& row, const Target& target, const Compiler& compiler) {
  const std::string what = "kernel " + row.name() + " for " + target.name();
  if (!find_source(header_of(row.op, row.family)))
    throw RuntimeError("cannot compile " + what + ": this library carries no source " +
                       header_of(row.op, row.family));
  try {
    return compiler.compile(source_of(row), row.name() + ".cu", target);
  } catch (const RuntimeError& error) {
    throw RuntimeError("cannot compile " + what + ": " + error.what());
  }
}

} // namespace anyflash
