// anyflash-build: kernels in processes of their own, archives, ledger, and what it says.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "../../tools/build_kernels/jobs.h"
#include "../../tools/build_kernels/ledger.h"
#include "../../tools/build_kernels/machine_code.h"
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

/// An instruction of compute capability 9.0, as machine_code.cpp knows it.
struct Code {
  uint32_t operation;
  uint32_t scoreboard = 7;
  uint32_t waits_for = 0;
};

/// An ELF file with one kernel.
std::string cubin_of(const std::vector<Code>& code) {
  constexpr size_t header_bytes = 64, name_at = 1;
  const std::string names("\0.text.kernel\0.shstrtab\0", 25);
  std::string file(header_bytes, '\0');
  const auto put = [&](size_t at, auto value) { std::memcpy(&file[at], &value, sizeof value); };
  const auto section = [&](uint32_t name, uint64_t offset, uint64_t size) {
    const size_t at = file.size();
    file.resize(at + 64);
    put(at, name), put(at + 0x18, offset), put(at + 0x20, size);
  };
  const uint64_t text = file.size();
  for (const Code& one : code) {
    const uint64_t words[] = {one.operation | 7u << 12,
                              uint64_t{one.scoreboard} << 46 | uint64_t{one.waits_for} << 52};
    file.append(reinterpret_cast<const char*>(words), sizeof words);
  }
  const uint64_t strings = file.size();
  file += names;
  put(0x28, uint64_t{file.size()}), put(0x3a, uint16_t{64});
  put(0x3c, uint16_t{2}), put(0x3e, uint16_t{1});
  section(name_at, text, code.size() * 16);
  section(name_at + 13, strings, names.size());
  return file;
}

TEST_F(BuildKernelsTest, SeesLoadsThatAnArrivalMayOvertake) {
  constexpr uint32_t load = 0x984, load_matrix = 0x83b, arrive = 0x9a7, shuffle = 0x589,
                     add = 0x210;
  const auto count = [](const std::vector<Code>& code, bool matrices_only = false) {
    return overtaken_loads(cubin_of(code), matrices_only).size();
  };
  EXPECT_EQ(count({{load, 2}, {arrive}}), 1u);
  EXPECT_EQ(count({{load, 2}, {arrive, 7, 1 << 2}}), 0u) << "waits for it";
  EXPECT_EQ(count({{load, 2}, {add, 7, 1 << 2}, {arrive}}), 0u) << "its result is used";
  EXPECT_EQ(count({{load, 2}, {add, 7, 1 << 3}, {arrive}}), 1u) << "something else is waited for";
  EXPECT_EQ(count({{load, 7}, {load, 2}, {add, 7, 1 << 2}, {arrive}}), 0u) << "in their order";
  EXPECT_EQ(count({{load, 7}, {shuffle, 2}, {add, 7, 1 << 2}, {arrive}}), 0u) << "shuffles too";
  EXPECT_EQ(count({{load, 2}, {load_matrix, 3}, {add, 7, 1 << 2}, {arrive}}), 1u);
  EXPECT_EQ(count({{load, 2}, {load_matrix, 3}, {arrive}}, true), 1u);
  EXPECT_EQ(overtaken_loads(cubin_of({{add}, {load, 2}, {arrive}}), false).front(),
            "the arrival at 0x20 may overtake the load at 0x10");
  EXPECT_TRUE(overtaken_loads("not an ELF file", false).empty());
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
