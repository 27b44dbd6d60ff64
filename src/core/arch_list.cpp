#include "core/arch_list.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <optional>
#include <tuple>

#include "core/error.h"

namespace anyflash {
namespace {

/// The names that torch knows, and their compute capabilities.
struct NamedGeneration {
  std::string_view name;
  std::string_view entries;
};

constexpr NamedGeneration named_generations[] = {
    {"kepler", "3.5+PTX"},           {"maxwell", "5.0 5.2+PTX"},
    {"pascal", "6.0 6.1+PTX"},       {"volta", "7.0+PTX"},
    {"turing", "7.5+PTX"},           {"ampere", "8.0 8.6+PTX"},
    {"ampere+tegra", "8.7"},         {"ada", "8.9+PTX"},
    {"hopper", "9.0+PTX"},           {"blackwell", "10.0 10.3 12.0 12.1+PTX"},
    {"blackwell+tegra", "10.1+PTX"},
};

std::string lower(std::string_view text) {
  std::string result(text);
  for (char& c : result) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return result;
}

std::vector<std::string> words_of(std::string_view list) {
  constexpr std::string_view separators = ";, \t\n";
  std::vector<std::string> words;
  while (!list.empty()) {
    const size_t begin = list.find_first_not_of(separators);
    if (begin == list.npos) break;
    const size_t end = std::min(list.find_first_of(separators, begin), list.size());
    words.push_back(lower(list.substr(begin, end - begin)));
    list.remove_prefix(end);
  }
  return words;
}

/// "8.0", "80", "90a", "12.0" -> 80, 80, 90, 120; nothing for anything else.
std::optional<int> capability_of(std::string text) {
  if (!text.empty() && (text.back() == 'a' || text.back() == 'f')) text.pop_back();
  const size_t dot = text.find('.');
  if (dot != text.npos) {
    if (dot + 2 != text.size() || dot == 0) return std::nullopt;
    text.erase(dot, 1);
  }
  const bool digits = !text.empty() && std::ranges::all_of(text, [](unsigned char c) {
    return std::isdigit(c) != 0;
  });
  if (!digits || text.size() < 2 || text.size() > 3) return std::nullopt;
  return std::atoi(text.c_str());
}

std::string dotted(int capability) {
  return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

class Selection {
public:
  explicit Selection(const BuildMachine& machine) : machine_(machine) {}

  void add_word(std::string word) {
    for (const NamedGeneration& named : named_generations)
      if (word == named.name) {
        for (std::string& entry : words_of(named.entries)) add_word(std::move(entry));
        return;
      }
    constexpr std::string_view ptx_suffix = "+ptx";
    if (word.ends_with(ptx_suffix)) {
      word.resize(word.size() - ptx_suffix.size());
      add_ptx();
    }
    if (word == "all") return add_all();
    if (word == "native") return add_present();
    const std::optional<int> capability = capability_of(word);
    if (!capability)
      throw InvalidValue(
          "'" + word +
          "' is no GPU generation; expected e.g. 8.0, 90, 9.0+PTX, Ampere, native or "
          "all, separated by semicolons");
    add_generation(*capability);
  }

  void add_all() {
    for (std::string_view arch : image_archs()) add_image(std::string(arch), arch);
    add_ptx();
  }

  void add_present() {
    if (machine_.gpus.empty()) skip("native", "no GPU is present");
    for (const int gpu : machine_.gpus) add_generation(gpu);
  }

  void add_ptx() { add_target(ptx_target()); }

  ArchSelection result() && {
    std::ranges::sort(selection_.targets, [](const Target& a, const Target& b) {
      return std::tuple(a.ptx, std::atoi(a.arch.c_str()), a.arch) <
             std::tuple(b.ptx, std::atoi(b.arch.c_str()), b.arch);
    });
    return std::move(selection_);
  }

private:
  /// Every image that serves this compute capability, one a family of kernels.
  void add_generation(int capability) {
    bool served = false;
    for (const Row& row : rows()) {
      const std::string arch(image_for(capability, row.family));
      if (arch.empty()) continue;
      served = true;
      if (std::atoi(arch.c_str()) / 10 == capability / 10)
        add_image(dotted(capability), arch);
      else
        add_ptx_for(capability);
    }
    if (!served) skip(dotted(capability), "no kernel serves it (8.0 and newer are served)");
  }

  void add_ptx_for(int capability) {
    add_ptx();
    skip(dotted(capability), "no image is made for it; PTX of compute_80 serves it");
  }

  void add_image(const std::string& entry, std::string_view arch) {
    const int number = std::atoi(std::string(arch).c_str());
    const std::vector<int>& known = machine_.capabilities;
    if (!known.empty() && std::ranges::find(known, number) == known.end())
      return skip(entry, "this NVRTC does not compile for sm_" + std::string(arch));
    add_target({std::string(arch)});
  }

  void add_target(const Target& target) {
    if (std::ranges::find(selection_.targets, target) == selection_.targets.end())
      selection_.targets.push_back(target);
  }

  void skip(const std::string& entry, const std::string& reason) {
    const std::string line = "skipped " + entry + ": " + reason;
    if (std::ranges::find(selection_.skipped, line) == selection_.skipped.end())
      selection_.skipped.push_back(line);
  }

  const BuildMachine& machine_;
  ArchSelection selection_;
};

} // namespace

std::string requested_archs() {
  for (const char* name : {"FLASH_ATTN_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"})
    if (const char* value = std::getenv(name); value && !words_of(value).empty()) return value;
  return "";
}

ArchSelection select_targets(std::string_view list, const BuildMachine& machine) {
  Selection selection(machine);
  const std::vector<std::string> words = words_of(list);
  for (const std::string& word : words) selection.add_word(word);
  if (words.empty()) {
    if (machine.gpus.empty())
      selection.add_all();
    else
      selection.add_present();
    selection.add_ptx();
  }
  ArchSelection result = std::move(selection).result();
  if (result.targets.empty()) {
    std::string text = "no GPU generation is left to build for of '" + std::string(list) + "'";
    for (const std::string& line : result.skipped) text += "; " + line;
    throw InvalidValue(text);
  }
  return result;
}

} // namespace anyflash
