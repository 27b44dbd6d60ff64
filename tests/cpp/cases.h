// tests/cases.json in C++. The fields are described in tests/README.md.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <ostream>
#include <string>
#include <vector>

namespace anyflash {

struct Lengths {
  int q, k;
};

/// One line of the list with its defaults filled in.
struct Case {
  std::string name;
  int d, dv, heads, heads_k;
  int batch, q, k;             // packed: the number of sequences and the largest lengths
  std::vector<Lengths> packed; // empty: dense
  std::vector<int32_t> seqused_q, seqused_k; // empty: all rows are used
  bool causal;
  std::optional<int> window_left, window_right; // absent: unbounded
  float softcap, scale;
  std::string alibi, layout, values, where; // alibi "": none
};

/// GoogleTest prints a case as its name.
inline void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

/// Reads one line. Throws for a field that nobody knows.
Case case_of(nlohmann::json line);

/// A dense case without options.
Case make_case(const std::string& name, int d, int q, int k, int heads = 1);

/// The cases that run everywhere.
const std::vector<Case>& cases();

/// A name that GoogleTest accepts.
std::string test_name(const std::string& name);

} // namespace anyflash
