#include "core/archive.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>

#include "core/error.h"
#include "core/shared_library.h"

namespace anyflash {
namespace {

namespace fs = std::filesystem;

// The file: Header, then Header::count entries, then the images, each on a 64-byte boundary.
// Little-endian, like every machine that these kernels run beside.
constexpr char magic[8] = {'A', 'N', 'Y', 'F', 'L', 'A', 'S', 'H'};
constexpr uint32_t format_version = 1;

struct Header {
  char magic[8];
  uint32_t format;
  uint32_t count;
  int32_t compiler_version;
  uint32_t padding;
};

struct Entry {
  char row[96];
  char hash[32];
  uint64_t offset;
  uint64_t size;
  int32_t registers, spill_bytes, stack_bytes, static_shared_bytes;
  double seconds, peak_mb;
};

static_assert(sizeof(Header) == 24 && sizeof(Entry) == 176);

constexpr uint64_t alignment = 64;
constexpr uint64_t align(uint64_t offset) {
  return (offset + alignment - 1) / alignment * alignment;
}

/// Text of a field that ends with a 0, or fills it.
template <size_t size>
std::string_view text_of(const char (&field)[size]) {
  return {field, strnlen(field, size)};
}

template <size_t size>
void set_text(char (&field)[size], const std::string& text) {
  if (text.size() >= size) throw RuntimeError("too long for an archive: " + text);
  std::memcpy(field, text.data(), text.size());
}

Entry entry_of(const ArchiveEntry& from, uint64_t offset) {
  Entry entry{};
  set_text(entry.row, from.row);
  set_text(entry.hash, from.hash);
  entry.offset = offset;
  entry.size = from.image.bytes.size();
  const Resources& resources = from.image.resources;
  entry.registers = resources.registers;
  entry.spill_bytes = resources.spill_bytes;
  entry.stack_bytes = resources.stack_bytes;
  entry.static_shared_bytes = resources.static_shared_bytes;
  entry.seconds = resources.seconds;
  entry.peak_mb = from.peak_mb;
  return entry;
}

std::string archive_bytes(int compiler_version, const std::vector<ArchiveEntry>& entries) {
  Header header{};
  std::memcpy(header.magic, magic, sizeof magic);
  header.format = format_version;
  header.count = static_cast<uint32_t>(entries.size());
  header.compiler_version = compiler_version;
  std::string table(reinterpret_cast<const char*>(&header), sizeof header);
  std::string images;
  const uint64_t first = align(sizeof(Header) + entries.size() * sizeof(Entry));
  for (const ArchiveEntry& from : entries) {
    images.resize(align(images.size()));
    const Entry entry = entry_of(from, first + images.size());
    table.append(reinterpret_cast<const char*>(&entry), sizeof entry);
    images += from.image.bytes;
  }
  table.resize(first);
  return table + images;
}

} // namespace

std::shared_ptr<const Archive> Archive::open(const fs::path& path) {
  std::error_code ignored;
  if (!fs::exists(path, ignored)) return nullptr;
  std::shared_ptr<Archive> archive(new Archive);
  archive->path_ = path;
  archive->map();
  archive->read();
  return archive;
}

Archive::~Archive() {
  if (data_) munmap(const_cast<char*>(data_), size_);
}

void Archive::map() {
  const int file = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat status{};
  const bool known = file >= 0 && fstat(file, &status) == 0;
  size_ = known ? static_cast<size_t>(status.st_size) : 0;
  void* address = size_ ? mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0) : MAP_FAILED;
  const std::string reason = std::strerror(errno);
  if (file >= 0) close(file);
  if (address == MAP_FAILED) throw RuntimeError("cannot read " + path_.string() + ": " + reason);
  data_ = static_cast<const char*>(address);
}

void Archive::read() {
  const auto damaged = [&](const char* what) {
    return RuntimeError("damaged archive " + path_.string() + ": " + what + "; reinstall anyflash");
  };
  Header header;
  if (size_ < sizeof header) throw damaged("too short");
  std::memcpy(&header, data_, sizeof header);
  if (std::memcmp(header.magic, magic, sizeof magic) != 0) throw damaged("not an archive");
  if (header.format != format_version) throw damaged("of another version");
  if ((size_ - sizeof header) / sizeof(Entry) < header.count) throw damaged("its table is cut off");
  compiler_version_ = header.compiler_version;
  const auto* entries = reinterpret_cast<const Entry*>(data_ + sizeof header);
  for (uint32_t i = 0; i < header.count; ++i) {
    const Entry& entry = entries[i];
    if (entry.offset > size_ || entry.size > size_ - entry.offset)
      throw damaged("an image is cut off");
    ArchivedImage image;
    image.row = text_of(entry.row);
    image.hash = text_of(entry.hash);
    image.bytes = {data_ + entry.offset, entry.size};
    image.resources = {entry.registers,           entry.spill_bytes, entry.stack_bytes,
                       entry.static_shared_bytes, entry.seconds,     {}};
    image.peak_mb = entry.peak_mb;
    images_.push_back(image);
  }
}

const ArchivedImage* Archive::find(const Row& row) const {
  const std::string name = row.name(), hash = row_hash(row);
  for (const ArchivedImage& image : images_)
    if (image.row == name && image.hash == hash) return &image;
  return nullptr;
}

void write_archive(const fs::path& path, int compiler_version,
                   const std::vector<ArchiveEntry>& entries) {
  const std::string bytes = archive_bytes(compiler_version, entries);
  const fs::path temporary = path.string() + ".tmp" + std::to_string(getpid());
  std::ofstream file(temporary, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  std::error_code error;
  if (file) fs::rename(temporary, path, error);
  if (!file || error) {
    std::error_code ignored;
    fs::remove(temporary, ignored);
    throw RuntimeError("cannot write " + path.string());
  }
}

fs::path archive_folder() {
  if (const char* folder = std::getenv("ANYFLASH_KERNELS"); folder && *folder) return folder;
  return SharedLibrary::file_of(reinterpret_cast<const void*>(&archive_folder)).parent_path() /
         "kernels";
}

std::shared_ptr<const Archive> shipped_archive(const Target& target) {
  static std::mutex mutex;
  static std::map<fs::path, std::shared_ptr<const Archive>> opened;
  const fs::path path = archive_folder() / (target.name() + ".bin");
  const std::lock_guard lock(mutex);
  const auto known = opened.find(path);
  if (known != opened.end()) return known->second;
  std::shared_ptr<const Archive> archive;
  try {
    archive = Archive::open(path);
  } catch (const RuntimeError&) {
    // Served like a package without this image; environment_json() names the damage.
  }
  return opened[path] = archive;
}

} // namespace anyflash
