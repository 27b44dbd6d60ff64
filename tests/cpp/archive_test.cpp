// Archives of kernels: what is written is read back; damage is noticed.
#include "core/archive.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "core/error.h"
#include "scoped_env.h"

namespace anyflash {
namespace {

namespace fs = std::filesystem;

class ArchiveTest : public testing::Test {
protected:
  ArchiveTest()
      : folder_(fs::temp_directory_path() / ("anyflash-archive-test-" + std::to_string(getpid()))) {
    fs::create_directories(folder_);
  }
  ~ArchiveTest() override { fs::remove_all(folder_); }

  fs::path path() const { return folder_ / "sm_90.bin"; }

  static std::vector<ArchiveEntry> two_entries() {
    Image image{std::string("a\0b", 3) + std::string(100, 'x'), {168, 12, 8, 1024, 1.25, {}}};
    return {{rows()[0].name(), row_hash(rows()[0]), image, 130.5},
            {rows()[1].name(), "stale", {"second", {}}, 0}};
  }

  void overwrite(std::streamoff at, char byte) const {
    std::fstream file(path(), std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(at);
    file.put(byte);
  }

  fs::path folder_;
};

TEST_F(ArchiveTest, GivesBackWhatWasWritten) {
  write_archive(path(), 12090, two_entries());
  const auto archive = Archive::open(path());
  ASSERT_NE(archive, nullptr);
  EXPECT_EQ(archive->compiler_version(), 12090);
  ASSERT_EQ(archive->images().size(), 2u);
  const ArchivedImage* image = archive->find(rows()[0]);
  ASSERT_NE(image, nullptr);
  EXPECT_EQ(image->bytes, two_entries()[0].image.bytes);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(image->bytes.data()) % 64, 0u);
  EXPECT_EQ(image->resources.registers, 168);
  EXPECT_EQ(image->resources.spill_bytes, 12);
  EXPECT_EQ(image->resources.stack_bytes, 8);
  EXPECT_EQ(image->resources.static_shared_bytes, 1024);
  EXPECT_EQ(image->resources.seconds, 1.25);
  EXPECT_EQ(image->peak_mb, 130.5);
  EXPECT_EQ(archive->images()[1].bytes, "second");
}

TEST_F(ArchiveTest, AnotherHashIsNotFound) {
  write_archive(path(), 12090, two_entries());
  EXPECT_EQ(Archive::open(path())->find(rows()[1]), nullptr);
}

TEST_F(ArchiveTest, MayBeEmptyOrMissing) {
  EXPECT_EQ(Archive::open(path()), nullptr);
  write_archive(path(), 12090, {});
  EXPECT_TRUE(Archive::open(path())->images().empty());
}

TEST_F(ArchiveTest, DamageIsNamed) {
  write_archive(path(), 12090, two_entries());
  const auto size = fs::file_size(path());
  for (const auto shorter : {size - 1, size / 2, uintmax_t{100}, uintmax_t{10}, uintmax_t{0}}) {
    write_archive(path(), 12090, two_entries());
    fs::resize_file(path(), shorter);
    EXPECT_THROW(Archive::open(path()), RuntimeError) << shorter << " of " << size << " bytes";
  }
  write_archive(path(), 12090, two_entries());
  overwrite(0, 'X'); // the magic
  EXPECT_THROW(Archive::open(path()), RuntimeError);
  write_archive(path(), 12090, two_entries());
  overwrite(8, 99); // the format's version
  EXPECT_THROW(Archive::open(path()), RuntimeError);
  write_archive(path(), 12090, two_entries());
  overwrite(15, 127); // the number of entries
  EXPECT_THROW(Archive::open(path()), RuntimeError);
}

TEST_F(ArchiveTest, AFolderThatCannotBeWrittenIsAnError) {
  EXPECT_THROW(write_archive(folder_ / "none" / "sm_90.bin", 12090, two_entries()), RuntimeError);
}

TEST_F(ArchiveTest, ShippedArchivesAreFoundBesideTheLibraryOrWhereAsked) {
  {
    const ScopedEnv unset("ANYFLASH_KERNELS", nullptr);
    EXPECT_EQ(archive_folder().filename(), "kernels");
    EXPECT_TRUE(archive_folder().is_absolute());
  }
  const ScopedEnv asked("ANYFLASH_KERNELS", folder_.c_str());
  write_archive(path(), 12090, two_entries());
  ASSERT_NE(shipped_archive({"90"}), nullptr);
  EXPECT_EQ(shipped_archive({"90"}), shipped_archive({"90"})) << "opened twice";
  EXPECT_EQ(shipped_archive({"80", true}), nullptr);
}

} // namespace
} // namespace anyflash
