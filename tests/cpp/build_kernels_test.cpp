// anyflash-build: kernels in processes of their own, archives, ledger, and what it says.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "../../tools/build_kernels/jobs.h"
#include "../../tools/build_kernels/ledger.h"
#include "core/error.h"
#include "scoped_env.h"

namespace anyflash::build {
namespace {

namespace fs = std::filesystem;

/// A compiler that does what a test asks instead of compiling.
class PretendedCompiler : public Compiler {
public:
  std::function<Image(const Target&)> act;
  std::string path() const override { return "/pretended"; }
  int version() const override { return 12090; }
  const std::vector<int>& capabilities() const override {
    static const std::vector<int> all = {80, 90};
    return all;
  }
  Image compile(const std::string&, const std::string&, const Target& target) const override {
    return act(target);
  }
};

class BuildKernelsTest : public testing::Test {
protected:
  BuildKernelsTest()
      : folder_(fs::temp_directory_path() / ("anyflash-build-test-" + std::to_string(getpid()))) {
    fs::create_directories(folder_);
  }
  ~BuildKernelsTest() override { fs::remove_all(folder_); }

  std::vector<Result> run_pretended(const std::vector<Job>& jobs, int processes) {
    return run(jobs, compiler_, processes, folder_,
               [&](size_t done, const Job&, const Result&) { done_ = done; });
  }

  struct Output {
    int status;
    std::string text;
  };
  /// Runs the program itself.
  Output anyflash_build(const std::string& arguments) const {
    const std::string command = std::string(ANYFLASH_BUILD) + " " + arguments + " 2>&1";
    FILE* pipe = popen(command.c_str(), "r");
    std::string text;
    for (int c; (c = std::fgetc(pipe)) != EOF;) text.push_back(static_cast<char>(c));
    return {WEXITSTATUS(pclose(pipe)), text};
  }
  nlohmann::json ledger() const {
    return nlohmann::json::parse(std::ifstream(folder_ / "ledger.json"));
  }

  fs::path folder_;
  PretendedCompiler compiler_;
  size_t done_ = 0;
};

TEST_F(BuildKernelsTest, EachJobGetsItsOwnImage) {
  compiler_.act = [](const Target& target) {
    Resources resources;
    resources.registers = 100;
    resources.warnings = {"(C7510) slow", "(C7511) slower"};
    return Image{"image for " + target.name(), resources};
  };
  const std::vector<Job> jobs = {{&rows()[0], {"80"}}, {&rows()[1], {"90"}}, {&rows()[0], {"90"}}};
  const std::vector<Result> results = run_pretended(jobs, 2);
  ASSERT_EQ(results.size(), 3u);
  EXPECT_EQ(done_, 3u);
  for (size_t i = 0; i < jobs.size(); ++i) {
    EXPECT_EQ(results[i].error, "");
    EXPECT_EQ(results[i].entry.row, jobs[i].row->name());
    EXPECT_EQ(results[i].entry.hash, row_hash(*jobs[i].row));
    EXPECT_EQ(results[i].entry.image.bytes, "image for " + jobs[i].target.name());
    EXPECT_EQ(results[i].entry.image.resources.registers, 100);
    EXPECT_EQ(results[i].entry.image.resources.warnings.size(), 2u);
    EXPECT_GT(results[i].entry.peak_mb, 0);
  }
  EXPECT_TRUE(fs::is_empty(folder_)) << "temporary files were left";
}

TEST_F(BuildKernelsTest, AFailureNamesRowGenerationAndTheCompilersWords) {
  compiler_.act = [](const Target&) -> Image {
    throw RuntimeError("x.cu(3): error: no such thing");
  };
  const std::vector<Job> jobs(5, Job{&rows()[0], {"90"}});
  const std::vector<Result> results = run_pretended(jobs, 1);
  for (const std::string& part :
       {rows()[0].name(), std::string("sm_90"), std::string("x.cu(3): error: no such thing")})
    EXPECT_NE(results[0].error.find(part), std::string::npos) << results[0].error;
  EXPECT_EQ(done_, 1u) << "went on after a failure";
}

TEST_F(BuildKernelsTest, AKilledProcessIsExplained) {
  compiler_.act = [](const Target&) -> Image { std::raise(SIGKILL), std::abort(); };
  const std::vector<Result> results = run_pretended({{&rows()[0], {"90"}}}, 1);
  EXPECT_NE(results[0].error.find("MAX_JOBS"), std::string::npos) << results[0].error;
}

TEST_F(BuildKernelsTest, MaxJobsLimitsTheProcesses) {
  const ScopedEnv one("MAX_JOBS", "1");
  EXPECT_EQ(parallelism(), 1);
  const ScopedEnv nonsense("MAX_JOBS", "many");
  EXPECT_GE(parallelism(), 1);
}

TEST_F(BuildKernelsTest, ComplainsOfSpillsArraysWarningsAndMemory) {
  const Row& row = rows()[0];
  Built good{{&row, {"90"}}, {row.name(), "", {"x", {}}, 100}};
  EXPECT_TRUE(complaints({good}).empty());
  Built spilling = good;
  spilling.entry.image.resources.spill_bytes = row.constant("spill_allowance", 0) + 4;
  Built arrays = good;
  arrays.entry.image.resources.stack_bytes = 16;
  Built slow = good;
  slow.entry.image.resources.warnings = {"ptxas info : (C7510) wgmma serialized"};
  Built large = good;
  large.entry.peak_mb = 601;
  const std::vector<std::string> lines = complaints({spilling, arrays, slow, large});
  ASSERT_EQ(lines.size(), 4u);
  EXPECT_NE(lines[0].find("spills"), std::string::npos);
  EXPECT_NE(lines[1].find("local memory"), std::string::npos);
  EXPECT_NE(lines[2].find("C7510"), std::string::npos);
  EXPECT_NE(lines[3].find("601 MB"), std::string::npos);
}

TEST_F(BuildKernelsTest, TheProgramRefusesNonsenseInWords) {
  for (const char* arguments : {"", "--output", "--output /tmp --sideways"}) {
    const Output output = anyflash_build(arguments);
    EXPECT_EQ(output.status, 1) << arguments;
    EXPECT_NE(output.text.find("--output DIR"), std::string::npos) << output.text;
  }
}

TEST_F(BuildKernelsTest, WithoutACompilerTheBuildSucceedsAndSaysSo) {
  const ScopedEnv none("ANYFLASH_NVRTC", "/nowhere/libnvrtc.so.12");
  const Output output = anyflash_build("--output " + folder_.string());
  EXPECT_EQ(output.status, 0);
  EXPECT_NE(output.text.find("compiled on first use"), std::string::npos) << output.text;
  EXPECT_TRUE(ledger()["compiler"].is_null());
  EXPECT_TRUE(ledger()["kernels"].empty());
  EXPECT_EQ(anyflash_build("--check --output " + folder_.string()).status, 1);
}

TEST_F(BuildKernelsTest, BuildsArchivesAndLedgerAndDoesNothingTwice) {
  if (!find_compiler(0)) GTEST_SKIP() << "no libnvrtc found (set ANYFLASH_NVRTC or CUDA_HOME)";
  const Row& row = rows()[0];
  const std::string arch(image_for(80, row.family));
  const std::string arguments =
      "--output " + folder_.string() + " --archs " + arch + " --rows " + row.name();
  const Output first = anyflash_build(arguments);
  ASSERT_EQ(first.status, 0) << first.text;
  EXPECT_NE(first.text.find("[  1/"), std::string::npos) << first.text;
  EXPECT_NE(first.text.find("largest process"), std::string::npos) << first.text;
  const nlohmann::json kernel = ledger()["kernels"].at(0);
  EXPECT_EQ(kernel["row"], row.name());
  EXPECT_EQ(kernel["arch"], "sm_" + arch);
  EXPECT_GT(kernel["registers"], 0);
  EXPECT_GT(kernel["image_bytes"], 1000);
  EXPECT_LT(kernel["peak_mb"], 600);
  const auto archive = Archive::open(folder_ / ("sm_" + arch + ".bin"));
  ASSERT_NE(archive, nullptr);
  ASSERT_NE(archive->find(row), nullptr);
  EXPECT_EQ(archive->find(row)->bytes.substr(1, 3), "ELF");

  EXPECT_NE(anyflash_build(arguments).text.find("0 kernels to compile"), std::string::npos);
  fs::resize_file(folder_ / ("sm_" + arch + ".bin"), 500);
  EXPECT_NE(anyflash_build(arguments).text.find("0 up to date"), std::string::npos);
}

} // namespace
} // namespace anyflash::build
