// The cache on disk: atomic, shared by processes, and never in the way.
#include "core/cache.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <optional>

#include "scoped_env.h"

namespace anyflash {
namespace {

namespace fs = std::filesystem;

const CacheKey key{"forward_row", "sm_90", "0123456789abcdef", 12090};

class CacheTest : public testing::Test {
protected:
  CacheTest()
      : folder_(fs::temp_directory_path() / ("anyflash-cache-test-" + std::to_string(getpid()))),
        env_("ANYFLASH_CACHE_DIR", folder_.c_str()) {}
  ~CacheTest() override {
    std::error_code ignored;
    fs::permissions(folder_, fs::perms::owner_all, ignored);
    fs::remove_all(folder_);
  }

  fs::path file() const { return folder_ / key.file_name(); }

  fs::path folder_;
  ScopedEnv env_;
};

TEST_F(CacheTest, KeepsBytesUnderEveryPartOfTheKey) {
  EXPECT_FALSE(cache_load(key));
  const std::string bytes("a\0\n\xff", 4);
  ASSERT_TRUE(cache_store(key, bytes));
  EXPECT_EQ(cache_load(key), bytes);
  for (const CacheKey& other : {CacheKey{"other", "sm_90", key.hash, 12090},
                                CacheKey{"forward_row", "sm_80", key.hash, 12090},
                                CacheKey{"forward_row", "sm_90", "fedcba9876543210", 12090},
                                CacheKey{"forward_row", "sm_90", key.hash, 13000}})
    EXPECT_FALSE(cache_load(other)) << other.file_name();
}

TEST_F(CacheTest, DamagedFilesCountAsMissingAndAreReplaced) {
  const std::string bytes(1000, 'x');
  for (const char* damage : {"truncated", "changed", "emptied", "nonsense"}) {
    ASSERT_TRUE(cache_store(key, bytes));
    if (damage == std::string("truncated")) {
      fs::resize_file(file(), fs::file_size(file()) - 1);
    } else if (damage == std::string("changed")) {
      std::fstream(file(), std::ios::in | std::ios::out).seekp(500).put('y');
    } else if (damage == std::string("emptied")) {
      fs::resize_file(file(), 0);
    } else {
      std::ofstream(file()) << "no newline, no header";
    }
    EXPECT_FALSE(cache_load(key)) << damage;
    ASSERT_TRUE(cache_store(key, bytes)) << damage;
    EXPECT_EQ(cache_load(key), bytes) << damage;
  }
}

TEST_F(CacheTest, AnyFittingCompilerWillDoWhereThereIsNone) {
  ASSERT_TRUE(cache_store({key.row, key.target, key.hash, 13000}, "of 13.0"));
  EXPECT_FALSE(cache_load_any_compiler(key, 12999));
  ASSERT_TRUE(cache_store({key.row, key.target, key.hash, 12080}, "of 12.8"));
  EXPECT_EQ(cache_load_any_compiler(key, 12999), "of 12.8");
  EXPECT_FALSE(cache_load_any_compiler({"forward", key.target, key.hash, 0}, 12999));
}

TEST_F(CacheTest, AFolderThatCannotBeWrittenOnlyCostsTheKeeping) {
  std::ofstream(folder_) << "a file where the folder should be"; // also refuses root
  EXPECT_FALSE(cache_store(key, "bytes"));
  EXPECT_FALSE(cache_load(key));
  EXPECT_FALSE(cache_load_any_compiler(key, 99999));
  EXPECT_FALSE(cache_writable());
}

TEST_F(CacheTest, AReadOnlyFolderStillServesWhatItHolds) {
  ASSERT_TRUE(cache_store(key, "bytes"));
  fs::permissions(folder_, fs::perms(0555));
  const pid_t child = fork();
  if (child == 0) {
    if (geteuid() == 0 && setuid(65534) != 0) _exit(2); // root writes anywhere
    const bool refused = !cache_store({"other", "sm_90", key.hash, 12090}, "bytes");
    _exit(refused && cache_load(key) == "bytes" && !cache_writable() ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_EQ(status, 0);
}

TEST_F(CacheTest, AFullDiskOnlyCostsTheKeeping) {
  if (!fs::exists("/dev/full")) GTEST_SKIP() << "no /dev/full here";
  // Every temporary file of this process would be /dev/full: writing to it fails like a full disk.
  fs::create_directories(folder_);
  const std::string prefix = ".tmp." + std::to_string(getpid()) + ".";
  for (int i = 0; i < 200; ++i)
    fs::create_symlink("/dev/full", folder_ / (prefix + std::to_string(i)));
  EXPECT_FALSE(cache_store(key, std::string(100000, 'x')));
  EXPECT_FALSE(fs::exists(file()));
}

TEST_F(CacheTest, ProcessesWriteAndReadTheSameFileAtOnce) {
  constexpr int processes = 4;
  const auto bytes_of = [](int writer) {
    return std::string(50000, static_cast<char>('a' + writer));
  };
  for (int writer = 0; writer < processes; ++writer)
    if (fork() == 0) {
      bool good = true;
      for (int i = 0; i < 50 && good; ++i) {
        good = cache_store(key, bytes_of(writer));
        const std::optional<std::string> found = cache_load(key);
        good &= found && found->size() == 50000 &&
                found->find_first_not_of(found->front()) == found->npos;
      }
      _exit(good ? 0 : 1);
    }
  for (int i = 0; i < processes; ++i) {
    int status = 0;
    wait(&status);
    EXPECT_EQ(status, 0) << "a process read a mixture, or nothing";
  }
  size_t files = 0;
  for ([[maybe_unused]] const auto& entry : fs::directory_iterator(folder_)) ++files;
  EXPECT_EQ(files, 1u) << "temporary files were left";
}

TEST_F(CacheTest, LivesWhereTheUserSays) {
  EXPECT_EQ(cache_folder(), folder_);
  const ScopedEnv none("ANYFLASH_CACHE_DIR", nullptr), xdg("XDG_CACHE_HOME", "/x/cache"),
      home("HOME", "/home/someone");
  EXPECT_EQ(cache_folder(), "/x/cache/anyflash");
  const ScopedEnv no_xdg("XDG_CACHE_HOME", nullptr);
  EXPECT_EQ(cache_folder(), "/home/someone/.cache/anyflash");
  const ScopedEnv no_home("HOME", nullptr);
  EXPECT_EQ(cache_folder(), "");
  EXPECT_FALSE(cache_store(key, "bytes"));
}

} // namespace
} // namespace anyflash
