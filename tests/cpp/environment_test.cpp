// The JSON texts: they parse, and say what the table and the machine are.
#include "core/environment.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "core/json.h"
#include "core/row.h"
#include "cpu/cpu.h"
#include "scoped_env.h"

namespace anyflash {
namespace {

using nlohmann::json;

TEST(JsonWriter, EscapesAndNests) {
  JsonWriter writer;
  writer.begin_object().member("a \"b\"\n\\", true).key("list").begin_array();
  writer.value(1).value(-2.5).value("x").null().value(1e300 * 1e300).begin_object().end_object();
  writer.end_array().member("last", uint64_t{1} << 63).end_object();
  const json parsed = json::parse(writer.text());
  EXPECT_EQ(parsed["a \"b\"\n\\"], true);
  EXPECT_EQ(parsed["list"], json::parse("[1, -2.5, \"x\", null, null, {}]"));
  EXPECT_EQ(parsed["last"], uint64_t{1} << 63);
}

TEST(Environment, ListsTheTable) {
  const json parsed = json::parse(rows_json());
  ASSERT_EQ(parsed.size(), rows().size());
  for (size_t i = 0; i < rows().size(); ++i) {
    EXPECT_EQ(parsed[i]["name"], rows()[i].name());
    EXPECT_EQ(parsed[i]["d"], rows()[i].d);
    EXPECT_FALSE(parsed[i]["images"].empty());
  }
}

TEST(Environment, DescribesThisMachine) {
  const json parsed = json::parse(environment_json());
  EXPECT_EQ(parsed["cpu"]["isa"], cpu::instruction_set());
  EXPECT_EQ(parsed["cpu"]["threads"], cpu::threads());
  EXPECT_TRUE(parsed["driver"]["version"].is_number() || parsed["driver"]["error"].is_string());
  EXPECT_TRUE(parsed["gpus"].is_array());
  EXPECT_TRUE(parsed["compiler"].is_object() || !parsed["compilers_rejected"].empty());
  EXPECT_TRUE(parsed["archives"].is_array());
}

TEST(Environment, FailsForNothingThatIsMissing) {
  const ScopedEnv home("HOME", nullptr), xdg("XDG_CACHE_HOME", nullptr),
      cache("ANYFLASH_CACHE_DIR", nullptr), nvrtc("ANYFLASH_NVRTC", "/nowhere/libnvrtc.so.12"),
      kernels("ANYFLASH_KERNELS", "/nowhere"), isa("ANYFLASH_CPU", "abacus");
  const json parsed = json::parse(environment_json());
  EXPECT_TRUE(parsed["cache"]["path"].is_null());
  EXPECT_EQ(parsed["cache"]["writable"], false);
  EXPECT_TRUE(parsed["compiler"].is_null());
  EXPECT_EQ(parsed["compilers_rejected"].size(), 1u);
  EXPECT_TRUE(parsed["archives"].empty());
}

} // namespace
} // namespace anyflash
