#include "machine_code.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>

namespace anyflash::build {
namespace {

template <class T>
T read(std::string_view bytes, size_t at) {
  T value{};
  if (at + sizeof value <= bytes.size()) std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}

/// The sections of an ELF file whose names begin with .text: one a kernel.
std::vector<std::string_view> texts_of(std::string_view elf) {
  const auto table = read<uint64_t>(elf, 0x28);
  const auto size = read<uint16_t>(elf, 0x3a), count = read<uint16_t>(elf, 0x3c);
  const auto header = [&](size_t i) { return table + i * size; };
  const auto offset = [&](size_t i) { return read<uint64_t>(elf, header(i) + 0x18); };
  const auto names = offset(read<uint16_t>(elf, 0x3e));
  std::vector<std::string_view> texts;
  for (size_t i = 0; i < count; ++i) {
    const size_t name = names + read<uint32_t>(elf, header(i));
    if (name < elf.size() && elf.substr(name).starts_with(".text"))
      texts.push_back(elf.substr(std::min<size_t>(offset(i), elf.size()),
                                 read<uint64_t>(elf, header(i) + 0x20)));
  }
  return texts;
}

struct Instruction {
  uint64_t low, high;

  uint32_t operation() const { return low & 0xfff; }
  bool always() const { return (low >> 12 & 0xf) == 7; } // no predicate
  uint32_t scoreboard() const { return high >> 46 & 7; } // that its result frees; 7: none
  uint32_t waits_for() const { return high >> 52 & 63; } // scoreboards, a bit each
};

constexpr uint32_t lds = 0x984, ldsm = 0x83b, arrive = 0x9a7, bra = 0x947, exit = 0x94d;
constexpr uint32_t shfl[] = {0x389, 0x589, 0x989, 0xf89};

/// A load, or a shuffle: these come back in the order in which they were started, so that who waits
/// for one has also waited for those before.
struct Pending {
  size_t at;
  uint32_t operation, scoreboard;
};

/// What is under way at some point of the code.
class UnderWay {
public:
  void step(size_t at, const Instruction& one) {
    const auto waited = std::find_if(pending_.rbegin(), pending_.rend(), [&](const Pending& p) {
      return p.scoreboard < 6 && (one.waits_for() >> p.scoreboard & 1);
    });
    pending_.erase(pending_.begin(), waited.base());
    const uint32_t operation = one.operation();
    if ((operation == bra || operation == exit) && one.always()) pending_.clear();
    if (operation == lds || operation == ldsm || std::ranges::count(shfl, operation))
      pending_.push_back({at, operation, one.scoreboard()});
  }

  void report(size_t arrival, bool matrices_only, std::vector<std::string>& lines) const {
    for (const Pending& load : pending_) {
      if (load.operation != ldsm && (matrices_only || load.operation != lds)) continue;
      char line[128];
      std::snprintf(line, sizeof line, "the arrival at 0x%zx may overtake the load at 0x%zx",
                    arrival, load.at);
      lines.emplace_back(line);
    }
  }

private:
  std::vector<Pending> pending_;
};

} // namespace

std::vector<std::string> overtaken_loads(std::string_view cubin, bool matrices_only) {
  std::vector<std::string> lines;
  for (const std::string_view text : texts_of(cubin)) {
    UnderWay loads;
    for (size_t at = 0; at + 16 <= text.size(); at += 16) {
      const Instruction one{read<uint64_t>(text, at), read<uint64_t>(text, at + 8)};
      loads.step(at, one);
      if (one.operation() == arrive) loads.report(at, matrices_only, lines);
    }
  }
  return lines;
}

} // namespace anyflash::build
