// Where libnvrtc may be, and which of those fits the driver.
#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <mutex>

#include "core/compile.h"
#include "core/error.h"
#include "core/nvrtc.h"

namespace anyflash {
namespace {

namespace fs = std::filesystem;

std::mutex paths_mutex;
std::vector<std::string> site_packages_folders;

/// libnvrtc.so.12, libnvrtc.so.13, ... of a folder; not their variants, debug links or builtins.
std::vector<std::string> libraries_in(const fs::path& folder) {
  std::vector<std::string> found;
  std::error_code ignored;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, ignored)) {
    const std::string name = entry.path().filename().string();
    constexpr std::string_view prefix = "libnvrtc.so.";
    const bool major_only = name.starts_with(prefix) &&
                            name.find_first_not_of("0123456789", prefix.size()) == name.npos;
    if (major_only) found.push_back(entry.path().string());
  }
  std::sort(found.begin(), found.end());
  return found;
}

void append(std::vector<std::string>& all, const std::vector<std::string>& more) {
  for (const std::string& path : more)
    if (std::find(all.begin(), all.end(), path) == all.end()) all.push_back(path);
}

std::vector<std::string> toolkit_folders() {
  std::vector<std::string> folders;
  for (const char* name : {"CUDA_HOME", "CUDA_PATH"})
    if (const char* value = std::getenv(name); value && *value) folders.emplace_back(value);
  folders.emplace_back("/usr/local/cuda");
  return folders;
}

/// Every libnvrtc to try, best first: full paths, then names for the system's search path.
std::vector<std::string> candidates() {
  if (const char* only = std::getenv("ANYFLASH_NVRTC"); only && *only) return {only};
  std::vector<std::string> all, site_packages;
  {
    const std::lock_guard lock(paths_mutex);
    site_packages = site_packages_folders;
  }
  for (const std::string& folder : site_packages)
    for (const char* package : {"nvidia/cuda_nvrtc/lib", "nvidia/cu13/lib"})
      append(all, libraries_in(fs::path(folder) / package));
  for (const std::string& folder : toolkit_folders())
    for (const char* lib : {"lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"})
      append(all, libraries_in(fs::path(folder) / lib));
  append(all, {"libnvrtc.so.12", "libnvrtc.so.13"});
  return all;
}

/// Why a compiler does not serve; empty: it does.
std::string why_not(const Compiler& compiler, int driver, int capability) {
  if (driver != 0 && compiler.version() / 1000 > driver / 1000)
    return "its machine code (CUDA " + version_text(compiler.version()) +
           ") needs a newer driver than this one (" + version_text(driver) + ")";
  const std::vector<int>& known = compiler.capabilities();
  if (capability != 0 && std::find(known.begin(), known.end(), capability) == known.end())
    return "NVRTC " + version_text(compiler.version()) + " does not compile for sm_" +
           std::to_string(capability);
  return "";
}

} // namespace

void add_compiler_path(const std::string& site_packages) {
  const std::lock_guard lock(paths_mutex);
  append(site_packages_folders, {site_packages});
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

CompilerSearch search_compiler(int driver, int capability) {
  CompilerSearch search;
  for (const std::string& path : candidates()) {
    try {
      std::shared_ptr<const Compiler> compiler = open_nvrtc(path);
      const std::string reason = why_not(*compiler, driver, capability);
      if (reason.empty()) {
        search.compiler = std::move(compiler);
        return search;
      }
      search.rejected.push_back({compiler->path(), reason});
    } catch (const RuntimeError& error) {
      search.rejected.push_back({path, error.what()});
    }
  }
  return search;
}

std::shared_ptr<const Compiler> find_compiler(int driver) {
  return search_compiler(driver).compiler;
}

} // namespace anyflash
