// What users write in TORCH_CUDA_ARCH_LIST, and what is built for it.
#include "core/arch_list.h"

#include <gtest/gtest.h>

#include "core/error.h"
#include "scoped_env.h"

namespace anyflash {
namespace {

const BuildMachine nothing_here{};

std::string targets(std::string_view list, const BuildMachine& machine = nothing_here) {
  std::string text;
  for (const Target& target : select_targets(list, machine).targets)
    text += (text.empty() ? "" : " ") + target.name();
  return text;
}

/// Every image of the table.
std::string all_images() {
  std::string text;
  for (std::string_view arch : image_archs()) text += "sm_" + std::string(arch) + " ";
  return text + "compute_80";
}

TEST(ArchList, TakesEveryWayOfWriting) {
  EXPECT_EQ(targets("8.0"), "sm_80");
  EXPECT_EQ(targets("80;90"), "sm_80 sm_90 sm_90a") << "one image for each family of kernels";
  EXPECT_EQ(targets("9.0, 8.0"), "sm_80 sm_90 sm_90a");
  EXPECT_EQ(targets("8.0 9.0"), "sm_80 sm_90 sm_90a");
  EXPECT_EQ(targets("8.0;9.0+PTX"), "sm_80 sm_90 sm_90a compute_80");
  EXPECT_EQ(targets("90a"), "sm_90 sm_90a");
  EXPECT_EQ(targets("Hopper"), "sm_90 sm_90a compute_80");
  EXPECT_EQ(targets("80;80;8.0"), "sm_80");
  EXPECT_EQ(targets("all"), all_images());
}

TEST(ArchList, AGenerationBringsTheImageThatServesIt) {
  const std::string expected = "sm_" + std::string(image_for(89, "sm80"));
  EXPECT_EQ(targets("8.9"), expected);
  EXPECT_EQ(targets("8.7"), "sm_" + std::string(image_for(87, "sm80")));
  EXPECT_EQ(targets("11.0"), "compute_80") << "no image of this major: the insurance serves it";
}

TEST(ArchList, DefaultsToTheGpusPresentOrAll) {
  EXPECT_EQ(targets(""), all_images());
  EXPECT_EQ(targets(" ; "), all_images());
  EXPECT_EQ(targets("", {{90, 90}, {}}), "sm_90 sm_90a compute_80");
  EXPECT_EQ(targets("native", {{90}, {}}), "sm_90 sm_90a");
}

TEST(ArchList, SkipsWhatNobodyServesWithOneLine) {
  const ArchSelection selection = select_targets("7.0;7.0;9.0", nothing_here);
  EXPECT_EQ(selection.targets, (std::vector<Target>{{"90"}, {"90a"}}));
  ASSERT_EQ(selection.skipped.size(), 1u);
  EXPECT_NE(selection.skipped[0].find("7.0"), std::string::npos);
  const ArchSelection old_compiler = select_targets("9.0;10.0", {{}, {80, 86, 89, 90}});
  EXPECT_EQ(old_compiler.targets, (std::vector<Target>{{"90"}, {"90a"}}));
  ASSERT_EQ(old_compiler.skipped.size(), 1u);
  EXPECT_NE(old_compiler.skipped[0].find("sm_100"), std::string::npos);
}

TEST(ArchList, IsFatalOnlyWhenNothingIsLeft) {
  EXPECT_THROW(targets("7.0"), InvalidValue);
  EXPECT_THROW(targets("native"), InvalidValue);
  for (const char* nonsense : {"hello", "8", "8.00", "9.", ".9", "1234", "-80", "sm_90"})
    EXPECT_THROW(targets(nonsense), InvalidValue) << nonsense;
}

TEST(ArchList, ReadsTheVariablesThatPeopleKnow) {
  const ScopedEnv torch("TORCH_CUDA_ARCH_LIST", "8.0");
  {
    const ScopedEnv flash("FLASH_ATTN_CUDA_ARCHS", "90");
    EXPECT_EQ(requested_archs(), "90");
  }
  const ScopedEnv empty("FLASH_ATTN_CUDA_ARCHS", "");
  EXPECT_EQ(requested_archs(), "8.0");
  const ScopedEnv no_torch("TORCH_CUDA_ARCH_LIST", nullptr);
  EXPECT_EQ(requested_archs(), "");
}

} // namespace
} // namespace anyflash
