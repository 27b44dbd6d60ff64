#include "core/environment.h"

#include <algorithm>

#include "core/archive.h"
#include "core/cache.h"
#include "core/compile.h"
#include "core/driver.h"
#include "core/error.h"
#include "core/json.h"
#include "core/row.h"
#include "cpu/cpu.h"

namespace anyflash {
namespace {

std::vector<std::string_view> families() {
  std::vector<std::string_view> names;
  for (const Row& row : rows())
    if (std::ranges::find(names, row.family) == names.end()) names.push_back(row.family);
  return names;
}

void write_driver(JsonWriter& json, const cuda::Driver* driver, const std::string& reason) {
  json.key("driver").begin_object();
  if (driver)
    json.member("path", driver->path).member("version", driver->version);
  else
    json.key("path").null().key("version").null().member("error", reason);
  json.end_object();
}

/// The image that serves a GPU, by family, and how many rows it has.
void write_images(JsonWriter& json, int compute_capability) {
  json.key("images").begin_array();
  for (std::string_view family : families()) {
    const std::string_view image = image_for(compute_capability, family);
    if (image.empty()) continue;
    const auto count = std::ranges::count_if(
        rows(), [&](const Row& row) { return row.family == family && row.in_image(image); });
    const bool ptx = std::atoi(std::string(image).c_str()) / 10 != compute_capability / 10;
    json.begin_object().member("family", family);
    json.member("image", Target{std::string(image), ptx}.name()).member("rows", count);
    json.end_object();
  }
  json.end_array();
}

void write_gpu(JsonWriter& json, const cuda::Driver& driver, int index) {
  cuda::Device device = 0;
  driver.check(driver.DeviceGet(&device, index), "cuDeviceGet");
  size_t memory = 0;
  driver.check(driver.DeviceTotalMem(&memory, device), "cuDeviceTotalMem");
  const int compute_capability = driver.compute_capability(device);
  json.begin_object().member("index", index).member("name", driver.name(device));
  json.member("compute_capability", compute_capability);
  json.member("multiprocessors", driver.attribute(device, cuda::multiprocessor_count));
  json.member("shared_bytes", driver.attribute(device, cuda::max_shared_memory_per_block_optin));
  json.member("memory_bytes", memory);
  write_images(json, compute_capability);
  json.end_object();
}

void write_gpus(JsonWriter& json, const cuda::Driver* driver) {
  json.key("gpus").begin_array();
  for (int i = 0; driver && i < driver->devices; ++i) {
    // A GPU that cannot be asked (lost, in exclusive use) is an entry with the reason.
    JsonWriter gpu;
    try {
      write_gpu(gpu, *driver, i);
    } catch (const RuntimeError& error) {
      gpu = JsonWriter();
      gpu.begin_object().member("index", i).member("error", error.what()).end_object();
    }
    json.raw(gpu.text());
  }
  json.end_array();
}

void write_cpu(JsonWriter& json) {
  json.key("cpu").begin_object();
  try {
    json.member("isa", cpu::instruction_set());
  } catch (const Error& error) { // ANYFLASH_CPU asks for what this machine lacks
    json.key("isa").null().member("error", error.what());
  }
  json.key("isas").begin_array();
  for (const std::string& name : cpu::instruction_sets()) json.value(name);
  json.end_array();
  json.member("threads", cpu::threads()).end_object();
}

void write_compiler(JsonWriter& json, int driver_version) {
  const CompilerSearch search = search_compiler(driver_version);
  json.key("compiler");
  if (search.compiler) {
    json.begin_object().member("path", search.compiler->path());
    json.member("version", search.compiler->version()).key("capabilities").begin_array();
    for (const int capability : search.compiler->capabilities()) json.value(capability);
    json.end_array().end_object();
  } else {
    json.null();
  }
  json.key("compilers_rejected").begin_array();
  for (const RejectedCompiler& rejected : search.rejected)
    json.begin_object()
        .member("path", rejected.path)
        .member("reason", rejected.reason)
        .end_object();
  json.end_array();
}

void write_cache(JsonWriter& json) {
  const std::string folder = cache_folder().string();
  json.key("cache").begin_object();
  if (folder.empty())
    json.key("path").null();
  else
    json.member("path", folder);
  json.member("writable", cache_writable()).end_object();
}

void write_archive_facts(JsonWriter& json, const Target& target, const Archive& archive) {
  size_t fresh = 0, expected = 0;
  for (const Row& row : rows())
    if (row.in_image(target.arch)) {
      ++expected;
      fresh += archive.find(row) != nullptr;
    }
  json.begin_object().member("image", target.name()).member("path", archive.path().string());
  json.member("compiler_version", archive.compiler_version());
  json.member("kernels", archive.images().size());
  json.member("fresh", fresh).member("rows", expected).end_object();
}

void write_archives(JsonWriter& json) {
  json.member("kernels_folder", archive_folder().string()).key("archives").begin_array();
  for (const Target& target : all_targets()) {
    const auto path = archive_folder() / (target.name() + ".bin");
    try {
      if (const auto archive = Archive::open(path)) write_archive_facts(json, target, *archive);
    } catch (const RuntimeError& error) {
      json.begin_object().member("image", target.name()).member("path", path.string());
      json.member("error", error.what()).end_object();
    }
  }
  json.end_array();
}

} // namespace

std::string environment_json() {
  std::string reason;
  const cuda::Driver* driver = cuda::try_driver(&reason);
  JsonWriter json;
  json.begin_object();
  json.member("version", anyflash_version());
  write_driver(json, driver, reason);
  write_gpus(json, driver);
  write_cpu(json);
  write_compiler(json, driver ? driver->version : 0);
  write_cache(json);
  write_archives(json);
  return json.end_object().text();
}

std::string rows_json() {
  JsonWriter json;
  json.begin_array();
  for (const Row& row : rows()) {
    json.begin_object().member("id", row.id).member("name", row.name());
    json.member("op", row.op).member("family", row.family).member("variant", row.variant);
    json.member("dtype", row.dtype == DType::bfloat16 ? "bf16" : "fp16");
    json.member("d", row.d).member("dv", row.dv).member("Br", row.Br).member("Bc", row.Bc);
    json.member("threads", row.threads()).member("shared_bytes", row.shared_bytes());
    json.member("spill_allowance", row.constant("spill_allowance", 0));
    json.member("constants", row.constants).key("images").begin_array();
    for (std::string_view arch : image_archs())
      if (row.in_image(arch)) json.value(Target{std::string(arch)}.name());
    if (row.in_image("80")) json.value("compute_80");
    json.end_array();
    json.member("hash", row_hash(row)).member("source_hash", source_hash(row.op, row.family));
    json.end_object();
  }
  return json.end_array().text();
}

} // namespace anyflash
