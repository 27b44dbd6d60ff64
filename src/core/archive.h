// Kernel images as they are shipped: one file a target beside the library, raw and memory-mapped.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/compile.h"

namespace anyflash {

/// One image of an archive; `bytes` points into the mapped file.
struct ArchivedImage {
  std::string_view row;  // Row::name()
  std::string_view hash; // row_hash() of what it was compiled from
  std::string_view bytes;
  Resources resources;
  double peak_mb = 0; // memory of the process that compiled it
};

/// A file of images of one target. Kept mapped for the life of the object.
class Archive {
public:
  /// Null if there is no such file. Throws RuntimeError for one that is damaged.
  static std::shared_ptr<const Archive> open(const std::filesystem::path& path);

  ~Archive();
  Archive(const Archive&) = delete;
  Archive& operator=(const Archive&) = delete;

  const std::filesystem::path& path() const { return path_; }
  int compiler_version() const { return compiler_version_; }
  const std::vector<ArchivedImage>& images() const { return images_; }
  /// The image of a row, unless it was compiled from other sources than this library carries.
  const ArchivedImage* find(const Row& row) const;

private:
  Archive() = default;
  void map();
  void read();

  std::filesystem::path path_;
  const char* data_ = nullptr;
  size_t size_ = 0;
  int compiler_version_ = 0;
  std::vector<ArchivedImage> images_;
};

/// What write_archive stores of one kernel.
struct ArchiveEntry {
  std::string row, hash;
  Image image;
  double peak_mb = 0;
};

/// Writes an archive: complete or not at all (a temporary file, renamed). Throws RuntimeError.
void write_archive(const std::filesystem::path& path, int compiler_version,
                   const std::vector<ArchiveEntry>& entries);

/// Where the archives of this library are: <folder of the library>/kernels, or ANYFLASH_KERNELS.
std::filesystem::path archive_folder();

/// The shipped archive of a target, opened once; null if there is none or it is damaged.
std::shared_ptr<const Archive> shipped_archive(const Target& target);

} // namespace anyflash
