#include "cases.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <fstream>
#include <stdexcept>

namespace anyflash {
namespace {

/// Takes a field out of a line.
template <class T>
T take(nlohmann::json& line, const char* field, T missing) {
  const auto found = line.find(field);
  if (found == line.end()) return missing;
  T value = found->get<T>();
  line.erase(found);
  return value;
}

std::optional<int> bound(const nlohmann::json& value) {
  return value.is_null() ? std::optional<int>() : value.get<int>();
}

} // namespace

Case case_of(nlohmann::json line) {
  Case c{};
  c.name = line.at("name").get<std::string>();
  line.erase("name");
  c.d = line.at("d").get<int>();
  line.erase("d");
  c.dv = take(line, "dv", c.d);
  c.heads = take(line, "heads", 1);
  c.heads_k = take(line, "heads_k", c.heads);
  c.batch = take(line, "batch", 1);
  c.q = take(line, "q", 0);
  c.k = take(line, "k", 0);
  for (const nlohmann::json& pair : take(line, "packed", nlohmann::json::array())) {
    c.packed.push_back({pair.at(0).get<int>(), pair.at(1).get<int>()});
    c.q = std::max(c.q, c.packed.back().q);
    c.k = std::max(c.k, c.packed.back().k);
    c.batch = static_cast<int>(c.packed.size());
  }
  c.seqused_q = take(line, "seqused_q", std::vector<int32_t>());
  c.seqused_k = take(line, "seqused_k", std::vector<int32_t>());
  c.causal = take(line, "causal", false);
  const nlohmann::json window = take(line, "window", nlohmann::json{nullptr, nullptr});
  c.window_left = bound(window.at(0));
  c.window_right = bound(window.at(1));
  c.softcap = take(line, "softcap", 0.0f);
  c.scale = take(line, "scale", 1 / std::sqrt(static_cast<float>(c.d)));
  c.alibi = take(line, "alibi", std::string());
  c.layout = take(line, "layout", std::string("contiguous"));
  c.values = take(line, "values", std::string("normal"));
  c.where = take(line, "where", std::string("everywhere"));
  if (!line.empty())
    throw std::runtime_error("case " + c.name + " has unknown fields: " + line.dump());
  return c;
}

Case make_case(const std::string& name, int d, int q, int k, int heads) {
  return case_of({{"name", name}, {"d", d}, {"q", q}, {"k", k}, {"heads", heads}});
}

const std::vector<Case>& cases() {
  static const std::vector<Case> all = [] {
    std::ifstream file(ANYFLASH_CASES);
    std::vector<Case> read;
    for (const nlohmann::json& line : nlohmann::json::parse(file)) {
      read.push_back(case_of(line));
      if (read.back().where != "everywhere") read.pop_back();
    }
    return read;
  }();
  return all;
}

std::string test_name(const std::string& name) {
  std::string result = name;
  for (char& letter : result)
    if (!std::isalnum(static_cast<unsigned char>(letter))) letter = '_';
  return result;
}

} // namespace anyflash
