// Plans for a GPU of this machine, by what this package, the disk and a compiler have for it.
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "core/archive.h"
#include "core/cache.h"
#include "core/images.h"
#include "core/plan.h"
#include "core/plan_cache.h"
#include "core/row.h"
#include "problems.h"
#include "scoped_env.h"

namespace anyflash {
namespace {

namespace fs = std::filesystem;

/// Each test has archives, a cache and a driver of its own (what can be had is looked up once for
/// a driver), and no compiler.
class AvailabilityTest : public testing::Test {
protected:
  AvailabilityTest()
      : folder_(fs::temp_directory_path() / ("anyflash-availability-" + std::to_string(getpid()))),
        kernels_("ANYFLASH_KERNELS", (folder_ / "kernels" / test_name()).c_str()),
        cache_("ANYFLASH_CACHE_DIR", (folder_ / "cache" / test_name()).c_str()),
        no_compiler_("ANYFLASH_NVRTC", "/nowhere/libnvrtc.so.12") {
    static int version = 12040;
    driver_ = version++;
    fs::create_directories(archive_folder());
  }
  ~AvailabilityTest() override { fs::remove_all(folder_); }

  static std::string test_name() {
    return testing::UnitTest::GetInstance()->current_test_info()->name();
  }

  /// An archive of every row that a target has.
  static void ship(const Target& target) {
    std::vector<ArchiveEntry> entries;
    for (const Row& row : rows())
      if (row.in_image(target.arch)) entries.push_back({row.name(), row_hash(row), {"x", {}}, 0});
    write_archive(archive_folder() / (target.name() + ".bin"), 12000, entries);
  }

  /// A GPU as get_gpu describes it: with a driver.
  anyflash_device here(int compute_capability) const {
    anyflash_device device = describe_gpu(compute_capability);
    device.driver = driver_;
    return device;
  }

  const Row& row_on(const anyflash_device& device, anyflash_problem p) const {
    return rows()[static_cast<size_t>(make_plan(validate(p), device).launches[0].row)];
  }

  static anyflash_problem forward(int64_t d) {
    return dense({1, 300, 300, 2, 2, d, d}, ANYFLASH_BFLOAT16, ANYFLASH_CUDA);
  }

private:
  fs::path folder_;
  ScopedEnv kernels_, cache_, no_compiler_;
  int driver_ = 0;
};

TEST_F(AvailabilityTest, AWholePackageIsPlannedAsForAGpuElsewhere) {
  for (const Target& target : all_targets()) ship(target);
  for (const int capability : {80, 86, 87, 89, 90, 100, 103, 120, 121})
    for (const int64_t d : {32, 64, 96, 128, 192, 256})
      for (const anyflash_problem& p : {forward(d), backward_of(forward(d))})
        EXPECT_EQ(row_on(here(capability), p).name(), row_on(describe_gpu(capability), p).name())
            << capability;
}

TEST_F(AvailabilityTest, PtxAloneServesEveryGpuByItsRows) {
  ship(ptx_target());
  for (const int capability : {80, 90, 100})
    for (const int64_t d : {32, 64, 96, 128, 192, 256})
      for (const anyflash_problem& p : {forward(d), backward_of(forward(d))}) {
        const Row& row = row_on(here(capability), p);
        EXPECT_EQ(row.d, d) << "a wider one";
        EXPECT_TRUE(row.in_image("80")) << row.name() << " on " << capability;
        EXPECT_TRUE(availability(row, capability, here(capability).driver).ptx) << row.name();
      }
  const Problem problem = validate(forward(128));
  const std::string text = explain(problem, make_plan(problem, here(90)));
  EXPECT_NE(text.find("image compute_80, compiled by the driver"), std::string::npos) << text;
  EXPECT_NE(text.find("sm80 rather than a newer one: this package holds compute_80, not sm_90a, "
                      "and no fitting libnvrtc was found to compile it (/nowhere/libnvrtc.so.12"),
            std::string::npos)
      << text;
}

TEST_F(AvailabilityTest, AGpuElsewhereIsPlannedWithoutLooking) {
  ship(ptx_target());
  EXPECT_EQ(row_on(describe_gpu(90), forward(128)).family, "sm90");
}

TEST_F(AvailabilityTest, MachineCodeOfAnOlderFamilyGoesBeforePtx) {
  ship({"90"});
  ship(ptx_target());
  const Row& row = row_on(here(90), forward(256));
  EXPECT_TRUE(row.family == "sm80" && row.in_image("90")) << row.name();
}

TEST_F(AvailabilityTest, WhatIsKeptOnDiskIsThere) {
  ship(ptx_target());
  const Row& row = row_on(describe_gpu(90), forward(96));
  ASSERT_TRUE(cache_store({row.name(), "sm_90a", row_hash(row), 12000}, "kept"));
  EXPECT_EQ(row_on(here(90), forward(96)).name(), row.name());
  EXPECT_EQ(row_on(here(90), forward(128)).family, "sm80");
}

TEST_F(AvailabilityTest, WhereNothingCanBeHadTheBestRowIsNamed) {
  EXPECT_EQ(row_on(here(90), forward(128)).family, "sm90");
}

/// A plan may be made anew when it is run: it must come out the same.
TEST_F(AvailabilityTest, IsLookedUpOnce) {
  ship(ptx_target());
  EXPECT_EQ(row_on(here(90), forward(128)).family, "sm80");
  const Row& better = row_on(describe_gpu(90), forward(128));
  ASSERT_TRUE(cache_store({better.name(), "sm_90a", row_hash(better), 12000}, "kept since"));
  anyflash_problem shorter = forward(128);
  shorter.q.shape[1] = shorter.o.shape[1] = 200; // another plan
  EXPECT_EQ(row_on(here(90), shorter).family, "sm80");
}

TEST_F(AvailabilityTest, AForcedImageIsPlannedForWhateverCanBeHad) {
  ship(ptx_target());
  const ScopedEnv forced("ANYFLASH_IMAGE", "sm_90");
  const Problem problem = validate(forward(64));
  const anyflash_plan plan = make_plan(problem, here(90));
  EXPECT_TRUE(rows()[static_cast<size_t>(plan.launches[0].row)].in_image("90"));
  EXPECT_NE(explain(problem, plan).find("sm80 rather than a newer one: ANYFLASH_IMAGE asks"),
            std::string::npos);
}

} // namespace
} // namespace anyflash
