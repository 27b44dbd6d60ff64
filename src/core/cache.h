// Compiled kernels on disk, shared by the processes of a user.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

namespace anyflash {

/// What a kept image was made from; all of it is part of the file's name.
struct CacheKey {
  std::string row;    // Row::name()
  std::string target; // Target::name()
  std::string hash;   // row_hash()
  int compiler_version = 0;

  std::string file_name() const;
};

/// ANYFLASH_CACHE_DIR, or $XDG_CACHE_HOME/anyflash, or ~/.cache/anyflash; empty if there is none.
std::filesystem::path cache_folder();

/// The bytes kept under this key; nothing if there are none or the file is damaged.
std::optional<std::string> cache_load(const CacheKey& key);

/// Like cache_load, from any compiler whose version is at most `newest`: for machines without one.
std::optional<std::string> cache_load_any_compiler(CacheKey key, int newest);

/// Keeps bytes under this key. Atomic; a folder that cannot be written only costs the keeping:
/// returns false.
bool cache_store(const CacheKey& key, const std::string& bytes);

/// True when cache_store would work now.
bool cache_writable();

} // namespace anyflash
