// variants.def as data; the only place that includes it.
#include <algorithm>
#include <charconv>
#include <map>
#include <vector>

#include "core/error.h"
#include "core/row.h"
#include "cuda/sm80/shared_memory.h"
#include "cuda/sm90/backward/shared_memory.h"
#include "cuda/sm90/shared_memory.h"

namespace anyflash {
namespace {

struct Line {
  std::string_view op, family, variant, archs, dtypes;
  int d, dv, Br, Bc;
  std::string_view constants;
};

constexpr Line lines[] = {
#define KERNEL(op, family, variant, archs, dtypes, d, dv, Br, Bc, ...)                             \
  {#op, #family, #variant, archs, #dtypes, d, dv, Br, Bc, #__VA_ARGS__},
#include "../../variants.def"
#undef KERNEL
};

/// Calls visit(word) for each run of characters between separators.
template <class Visit>
void for_each_word(std::string_view text, std::string_view separators, Visit visit) {
  while (!text.empty()) {
    const size_t begin = text.find_first_not_of(separators);
    if (begin == text.npos) return;
    const size_t end = std::min(text.find_first_of(separators, begin), text.size());
    visit(text.substr(begin, end - begin));
    text.remove_prefix(end);
  }
}

std::string_view dtype_name(DType dtype) { return dtype == DType::bfloat16 ? "bf16" : "fp16"; }

/// "90a" -> 90
int capability_of(std::string_view arch) {
  int number = 0;
  std::from_chars(arch.data(), arch.data() + arch.size(), number);
  return number;
}

/// "warps = 4, k_stages = 2": names and numbers take turns.
std::vector<Constant> read_constants(std::string_view text) {
  std::vector<Constant> constants;
  bool is_name = false;
  for_each_word(text, " ,=", [&](std::string_view word) {
    is_name = !is_name;
    if (is_name)
      constants.push_back({word, 0});
    else
      std::from_chars(word.data(), word.data() + word.size(), constants.back().value);
  });
  return constants;
}

std::vector<Row> expand() {
  std::vector<Row> rows;
  for (const Line& line : lines) {
    for_each_word(line.dtypes, " |", [&](std::string_view name) {
      const DType dtype = name == "bf16" ? DType::bfloat16 : DType::float16;
      rows.push_back({static_cast<int>(rows.size()), line.op, line.family, line.variant, line.archs,
                      dtype, line.d, line.dv, line.Br, line.Bc, line.constants,
                      read_constants(line.constants)});
    });
  }
  return rows;
}

/// The images that each family has rows in, ascending.
std::map<std::string_view, std::vector<std::string_view>> expand_families() {
  std::map<std::string_view, std::vector<std::string_view>> images;
  for (const Row& row : rows()) images[row.family];
  for (auto& [family, archs] : images)
    for (std::string_view arch : image_archs())
      if (std::ranges::any_of(
              rows(), [&](const Row& row) { return row.family == family && row.in_image(arch); }))
        archs.push_back(arch);
  return images;
}

std::vector<std::string_view> expand_archs() {
  std::vector<std::string_view> archs;
  for (const Line& line : lines) {
    for_each_word(line.archs, " ", [&](std::string_view arch) {
      if (std::find(archs.begin(), archs.end(), arch) == archs.end()) archs.push_back(arch);
    });
  }
  std::sort(archs.begin(), archs.end(), [](auto a, auto b) {
    return std::pair(capability_of(a), a.size()) < std::pair(capability_of(b), b.size());
  });
  return archs;
}

} // namespace

std::span<const Row> rows() {
  static const std::vector<Row> all = expand();
  return all;
}

std::span<const std::string_view> image_archs() {
  static const std::vector<std::string_view> all = expand_archs();
  return all;
}

int Row::constant(std::string_view name, int missing) const {
  const auto found = std::ranges::find(values, name, &Constant::name);
  return found == values.end() ? missing : found->value;
}

std::span<const EntryPoint> entries_of(std::string_view op) {
  static constexpr EntryPoint forward[] = {{ANYFLASH_KERNEL, "kernel", "forward"}};
  static constexpr EntryPoint backward[] = {{ANYFLASH_KERNEL_PRE, "kernel_pre", "backward_pre"},
                                            {ANYFLASH_KERNEL, "kernel", "backward"},
                                            {ANYFLASH_KERNEL_POST, "kernel_post", "backward_post"}};
  if (op == "backward") return backward;
  return forward;
}

int Row::shared_bytes() const {
  if (op == "backward" && family == "sm90")
    return sm90::backward_shared(d, dv, Br, Bc, constant("kv_stages", 1), constant("q_stages", 1),
                                 constant("o_stages", 1), cluster(), constant("peer_stages", 0),
                                 constant("direct_v", 0))
        .end;
  if (family == "sm90")
    return sm90::ForwardShared(d, dv, Br, Bc, constant("stages", 1), constant("q_stages", 1),
                               constant("o_parts", 1))
        .bytes;
  if (op == "backward")
    return sm80::backward_shared_bytes(d, dv, Br, Bc, constant("q_stages", 1),
                                       constant("o_stages", 1));
  return sm80::forward_shared_bytes(d, dv, Br, Bc, constant("k_stages", 1),
                                    constant("v_stages", 1));
}

std::string Row::name() const {
  return std::string(op) + "_" + std::string(family) + "_" + std::string(variant) + "_" +
         std::string(dtype_name(dtype)) + "_d" + std::to_string(d) + "_dv" + std::to_string(dv) +
         "_" + std::to_string(Br) + "x" + std::to_string(Bc);
}

bool Row::in_image(std::string_view arch) const {
  bool found = false;
  for_each_word(archs, " ", [&](std::string_view word) { found |= word == arch; });
  return found;
}

std::string_view image_for(int compute_capability, std::string_view family) {
  static const auto images = expand_families();
  const auto known = images.find(family);
  if (known == images.end()) return "";
  std::string_view best;
  for (std::string_view arch : known->second) {
    const int number = capability_of(arch);
    const bool exact_only = arch.back() == 'a';
    if (exact_only ? number == compute_capability
                   : number / 10 == compute_capability / 10 && number <= compute_capability)
      best = arch;
  }
  if (!best.empty()) return best;
  // No image of this major: PTX of compute_80 serves anything newer than Ampere.
  return family == "sm80" && compute_capability >= 80 ? "80" : "";
}

} // namespace anyflash
