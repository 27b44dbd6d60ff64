#include "core/sources.h"

#include <algorithm>
#include <cctype>
#include <cstdio>

namespace anyflash {
namespace {

/// The names in quotes after #include, in order.
std::vector<std::string_view> includes_of(std::string_view text) {
  constexpr std::string_view directive = "#include \"";
  std::vector<std::string_view> names;
  for (size_t at = text.find(directive); at != text.npos; at = text.find(directive, at)) {
    at += directive.size();
    const size_t quote = text.find('"', at);
    if (quote == text.npos) break;
    names.push_back(text.substr(at, quote - at));
  }
  return names;
}

/// Where the string or character literal that opens at `begin` ends (one past its closing quote).
size_t literal_end(std::string_view text, size_t begin) {
  const char quote = text[begin];
  size_t at = begin + 1;
  while (at < text.size() && text[at] != quote) at += text[at] == '\\' ? 2 : 1;
  return std::min(at + 1, text.size());
}

/// A quote between two digits separates thousands (1'000) and opens no literal.
bool opens_literal(std::string_view text, size_t at) {
  if (text[at] == '"') return true;
  return text[at] == '\'' && (at == 0 || !std::isalnum(static_cast<unsigned char>(text[at - 1])));
}

std::string trimmed_lines(std::string_view text) {
  std::string result;
  while (!text.empty()) {
    const size_t newline = std::min(text.find('\n'), text.size());
    std::string_view line = text.substr(0, newline);
    text.remove_prefix(std::min(newline + 1, text.size()));
    const size_t first = line.find_first_not_of(" \t\r");
    if (first == line.npos) continue;
    line = line.substr(first, line.find_last_not_of(" \t\r") - first + 1);
    result.append(line).push_back('\n');
  }
  return result;
}

} // namespace

const Source* find_source(std::string_view name) {
  for (const Source& source : sources())
    if (source.name == name) return &source;
  return nullptr;
}

std::vector<const Source*> source_closure(std::string_view name) {
  std::vector<const Source*> closure;
  std::vector<std::string_view> open = {name};
  while (!open.empty()) {
    const Source* source = find_source(open.back());
    open.pop_back();
    if (!source || std::find(closure.begin(), closure.end(), source) != closure.end()) continue;
    closure.push_back(source);
    for (std::string_view included : includes_of(source->text)) open.push_back(included);
  }
  std::sort(closure.begin(), closure.end(),
            [](const Source* a, const Source* b) { return a->name < b->name; });
  return closure;
}

std::string without_comments(std::string_view text) {
  std::string code;
  for (size_t at = 0; at < text.size();) {
    const std::string_view rest = text.substr(at);
    if (rest.starts_with("//")) {
      at = std::min(text.find('\n', at), text.size());
    } else if (rest.starts_with("/*")) {
      const size_t end = text.find("*/", at + 2);
      at = end == text.npos ? text.size() : end + 2;
      code.push_back(' ');
    } else if (opens_literal(text, at)) {
      const size_t end = literal_end(text, at);
      code.append(text.substr(at, end - at));
      at = end;
    } else {
      code.push_back(text[at++]);
    }
  }
  return trimmed_lines(code);
}

std::string Hash::hex() const {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value_));
  return text;
}

} // namespace anyflash
