// Sources, hashes and NVRTC: from a row to an image.
#include "core/compile.h"

#include <gtest/gtest.h>

#include "core/error.h"
#include "core/sources.h"
#include "scoped_env.h"

namespace anyflash {
namespace {

std::shared_ptr<const Compiler> compiler_or_skip() {
  static const std::shared_ptr<const Compiler> compiler = find_compiler(0);
  return compiler;
}

#define NEED_COMPILER()                                                                            \
  const std::shared_ptr<const Compiler> compiler = compiler_or_skip();                             \
  if (!compiler) GTEST_SKIP() << "no libnvrtc found (set ANYFLASH_NVRTC or CUDA_HOME)"

TEST(Sources, CarryTheDeviceCode) {
  const Source* params = find_source("cuda/params.h");
  ASSERT_NE(params, nullptr);
  EXPECT_NE(params->text.find("struct ForwardParams"), std::string_view::npos);
  EXPECT_EQ(find_source("cuda/no_such_file.h"), nullptr);
}

TEST(Sources, HashesSeeCodeAndNotComments) {
  EXPECT_EQ(without_comments("int a; // one\n\n  /* two\n lines */ int b;\n"), "int a;\nint b;\n");
  EXPECT_EQ(without_comments("s = \"// no comment\"; c = '\"'; n = 1'000; // x"),
            "s = \"// no comment\"; c = '\"'; n = 1'000;\n");
  EXPECT_NE(Hash().add("ab").end().add("c").value(), Hash().add("a").end().add("bc").value());
  EXPECT_EQ(Hash().hex(), "cbf29ce484222325");
}

TEST(Compile, NamesTargets) {
  EXPECT_EQ(Target{"90a"}.name(), "sm_90a");
  EXPECT_EQ(parse_target("compute_80"), (Target{"80", true}));
  EXPECT_EQ(parse_target("sm_90a"), Target{"90a"});
  EXPECT_THROW(parse_target("90"), InvalidValue);
}

TEST(Compile, WritesTheRowAsConstants) {
  ASSERT_FALSE(rows().empty());
  const Row& row = rows()[0];
  const std::string source = source_of(row);
  EXPECT_NE(source.find("#include \"cuda/sm80/forward.cuh\""), std::string::npos);
  EXPECT_NE(source.find("static constexpr int d = " + std::to_string(row.d)), std::string::npos);
  EXPECT_NE(source.find("anyflash::sm80::forward<Row>(p)"), std::string::npos);
  EXPECT_NE(source.find("const __grid_constant__ anyflash::ForwardParams p"), std::string::npos);
  EXPECT_NE(source.find(std::string(row.variant) + " = true"), std::string::npos);
}

TEST(Compile, HashesDifferBetweenRows) {
  for (const Row& a : rows())
    for (const Row& b : rows())
      if (source_of(a) != source_of(b)) EXPECT_NE(row_hash(a), row_hash(b));
}

TEST(Compile, ReadsTheResourceReport) {
  const Resources resources = parse_resources(
      "ptxas info    : 0 bytes gmem\n"
      "ptxas info    : Compiling entry function 'kernel' for 'sm_90a'\n"
      "ptxas info    : (C7510) Potential Performance Loss: wgmma serialized\n"
      "ptxas info    : Function properties for kernel\n"
      "    40 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
      "ptxas info    : Used 168 registers, used 1 barriers, 40 bytes cumulative stack size, 1024 "
      "bytes smem\n");
  EXPECT_EQ(resources.registers, 168);
  EXPECT_EQ(resources.spill_bytes, 20);
  EXPECT_EQ(resources.stack_bytes, 32);
  EXPECT_EQ(resources.static_shared_bytes, 1024);
  ASSERT_EQ(resources.warnings.size(), 1u);
  EXPECT_NE(resources.warnings[0].find("C7510"), std::string::npos);
}

TEST(Compile, AReportOfSeveralEntriesIsTheMainOnesRegistersAndTheSumOfSpills) {
  const auto entry = [](const std::string& name, int spills, int registers, int shared) {
    return "ptxas info    : Compiling entry function '" + name +
           "' for 'sm_90'\n    0 bytes stack " + "frame, " + std::to_string(spills) +
           " bytes spill stores, 0 bytes spill loads\n" + "ptxas info    : Used " +
           std::to_string(registers) + " registers, " + std::to_string(shared) + " bytes smem\n";
  };
  const Resources resources =
      parse_resources(entry("kernel_post", 4, 40, 512) + entry("kernel", 8, 250, 16) +
                      entry("kernel_pre", 0, 30, 0));
  EXPECT_EQ(resources.registers, 250);
  EXPECT_EQ(resources.spill_bytes, 12);
  EXPECT_EQ(resources.static_shared_bytes, 16);
}

constexpr const char* tiny_kernel = R"(
#include "cuda/params.h"
extern "C" __global__ void __launch_bounds__(128, 1)
kernel(const __grid_constant__ anyflash::ForwardParams p) {
  __shared__ float s[32];
  s[threadIdx.x % 32] = p.d;
  __syncthreads();
  if (p.lse) p.lse[threadIdx.x] = s[0] * anyflash::divide(threadIdx.x, p.heads);
})";

TEST(Nvrtc, CompilesMachineCode) {
  NEED_COMPILER();
  EXPECT_GE(compiler->version(), 12000);
  const Image image = compiler->compile(tiny_kernel, "tiny.cu", {"80"});
  EXPECT_EQ(image.bytes.substr(1, 3), "ELF");
  EXPECT_GT(image.resources.registers, 0);
  EXPECT_EQ(image.resources.static_shared_bytes, 128);
  EXPECT_EQ(image.resources.spill_bytes, 0);
  EXPECT_EQ(compiler->compile(tiny_kernel, "tiny.cu", {"80"}).bytes, image.bytes) << "not pure";
}

TEST(Nvrtc, CompilesPtx) {
  NEED_COMPILER();
  const Image image = compiler->compile(tiny_kernel, "tiny.cu", {"80", true});
  EXPECT_NE(image.bytes.find(".target sm_80"), std::string::npos);
  EXPECT_EQ(image.bytes.find('\0'), std::string::npos);
}

TEST(Nvrtc, ReportsTheCompilersMessage) {
  NEED_COMPILER();
  try {
    compiler->compile("this is not C++", "broken.cu", {"80"});
    FAIL() << "compiled";
  } catch (const RuntimeError& error) {
    EXPECT_NE(std::string(error.what()).find("broken.cu(1): error"), std::string::npos)
        << error.what();
  }
}

TEST(Nvrtc, AWrongPathIsReportedWithItsReason) {
  const ScopedEnv env("ANYFLASH_NVRTC", "/nowhere/libnvrtc.so.12");
  const CompilerSearch search = search_compiler(0);
  EXPECT_EQ(search.compiler, nullptr);
  ASSERT_EQ(search.rejected.size(), 1u);
  EXPECT_EQ(search.rejected[0].path, "/nowhere/libnvrtc.so.12");
  EXPECT_NE(search.rejected[0].reason.find("No such file"), std::string::npos);
}

TEST(Nvrtc, AGpuThatItDoesNotKnowRejectsIt) {
  NEED_COMPILER();
  EXPECT_EQ(search_compiler(0, 20).compiler, nullptr);
  EXPECT_NE(search_compiler(0, 90).compiler, nullptr);
}

TEST(Nvrtc, ADriverOfAnOlderMajorRejectsIt) {
  NEED_COMPILER();
  const CompilerSearch search = search_compiler(11080);
  EXPECT_EQ(search.compiler, nullptr);
  ASSERT_FALSE(search.rejected.empty());
}

} // namespace
} // namespace anyflash
