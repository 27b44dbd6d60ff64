#include "core/cache.h"

#include <unistd.h>

#include <atomic>
#include <charconv>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "core/sources.h"

namespace anyflash {
namespace {

namespace fs = std::filesystem;

// A file: "anyflash1 <hash of the bytes> <size>\n", then the bytes.
constexpr const char* magic = "anyflash1";

std::string header_of(const std::string& bytes) {
  return std::string(magic) + " " + Hash().add(bytes).hex() + " " + std::to_string(bytes.size()) +
         "\n";
}

std::optional<std::string> read_file(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return std::nullopt;
  std::ostringstream text;
  text << file.rdbuf();
  if (file.bad()) return std::nullopt;
  return std::move(text).str();
}

std::optional<std::string> load(const fs::path& path) {
  std::optional<std::string> file = read_file(path);
  if (!file) return std::nullopt;
  const size_t newline = file->find('\n');
  if (newline == file->npos) return std::nullopt;
  std::string bytes = file->substr(newline + 1);
  if (file->compare(0, newline + 1, header_of(bytes)) != 0) return std::nullopt;
  return bytes;
}

/// A name that no other process or thread writes to.
fs::path temporary_in(const fs::path& folder) {
  static std::atomic<unsigned> counter{0};
  return folder / (".tmp." + std::to_string(getpid()) + "." + std::to_string(counter++));
}

} // namespace

std::string CacheKey::file_name() const {
  return row + "." + target + "." + hash + ".nvrtc" + std::to_string(compiler_version);
}

fs::path cache_folder() {
  const auto variable = [](const char* name) -> fs::path {
    const char* value = std::getenv(name);
    return value ? value : "";
  };
  if (const fs::path folder = variable("ANYFLASH_CACHE_DIR"); !folder.empty()) return folder;
  if (const fs::path folder = variable("XDG_CACHE_HOME"); folder.is_absolute())
    return folder / "anyflash";
  if (const fs::path home = variable("HOME"); !home.empty()) return home / ".cache" / "anyflash";
  return {};
}

std::optional<std::string> cache_load(const CacheKey& key) {
  const fs::path folder = cache_folder();
  return folder.empty() ? std::nullopt : load(folder / key.file_name());
}

std::optional<std::string> cache_load_any_compiler(CacheKey key, int newest) {
  const fs::path folder = cache_folder();
  if (folder.empty()) return std::nullopt;
  const std::string full = key.file_name();
  const std::string stem = full.substr(0, full.rfind(".nvrtc") + 6);
  std::error_code ignored;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, ignored)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(stem)) continue;
    int version = 0;
    std::from_chars(name.data() + stem.size(), name.data() + name.size(), version);
    if (version == 0 || version > newest) continue;
    if (std::optional<std::string> bytes = load(entry.path())) return bytes;
  }
  return std::nullopt;
}

bool cache_store(const CacheKey& key, const std::string& bytes) {
  const fs::path folder = cache_folder();
  if (folder.empty()) return false;
  std::error_code error;
  fs::create_directories(folder, error);
  const fs::path temporary = temporary_in(folder);
  std::ofstream file(temporary, std::ios::binary);
  file << header_of(bytes) << bytes;
  file.close();
  error.clear();
  if (file) fs::rename(temporary, folder / key.file_name(), error);
  if (file && !error) return true;
  std::error_code ignored;
  fs::remove(temporary, ignored);
  return false;
}

bool cache_writable() {
  const fs::path folder = cache_folder();
  if (folder.empty()) return false;
  std::error_code error;
  fs::create_directories(folder, error);
  const fs::path temporary = temporary_in(folder);
  const bool written = static_cast<bool>(std::ofstream(temporary) << "anyflash");
  fs::remove(temporary, error);
  return written;
}

} // namespace anyflash
