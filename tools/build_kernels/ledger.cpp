#include "ledger.h"

#include <algorithm>
#include <fstream>

#include "core/error.h"
#include "core/json.h"
#include "machine_code.h"

namespace anyflash::build {
namespace {

constexpr double process_limit_mb = 600;

void write_kernel(JsonWriter& json, const Built& kernel) {
  const Row& row = *kernel.job.row;
  const Resources& resources = kernel.entry.image.resources;
  json.begin_object();
  json.member("row", row.name()).member("arch", kernel.job.target.name());
  json.member("op", row.op).member("family", row.family).member("variant", row.variant);
  json.member("dtype", row.dtype == DType::bfloat16 ? "bf16" : "fp16");
  json.member("d", row.d).member("dv", row.dv).member("Br", row.Br).member("Bc", row.Bc);
  json.member("threads", row.threads());
  json.member("registers", resources.registers);
  json.member("spill_bytes", resources.spill_bytes);
  json.member("spill_allowance", row.constant("spill_allowance", 0));
  json.member("stack_bytes", resources.stack_bytes);
  json.member("static_shared_bytes", resources.static_shared_bytes);
  json.member("shared_bytes", resources.static_shared_bytes + row.shared_bytes());
  json.member("image_bytes", kernel.entry.image.bytes.size());
  json.member("seconds", resources.seconds).member("peak_mb", kernel.entry.peak_mb);
  json.member("hash", kernel.entry.hash);
  json.key("warnings").begin_array();
  for (const std::string& line : resources.warnings) json.value(line);
  json.end_array().end_object();
}

} // namespace

double largest_mb(const std::vector<Built>& kernels) {
  double largest = 0;
  for (const Built& kernel : kernels) largest = std::max(largest, kernel.entry.peak_mb);
  return largest;
}

void write_ledger(const std::filesystem::path& path, const Summary& summary,
                  const std::vector<Built>& kernels) {
  std::ofstream file(path);
  file << "{\"compiler\": "
       << (summary.compiler_version ? "\"NVRTC " + version_text(summary.compiler_version) + "\""
                                    : "null")
       << ", \"processes\": " << summary.processes << ", \"seconds\": " << summary.seconds
       << ", \"compiled\": " << summary.compiled << ", \"peak_mb\": " << largest_mb(kernels)
       << ",\n \"kernels\": [";
  for (size_t i = 0; i < kernels.size(); ++i) { // a line a kernel, for readers and for diff
    JsonWriter json;
    write_kernel(json, kernels[i]);
    file << (i ? ",\n  " : "\n  ") << json.text();
  }
  file << "\n]}\n";
  file.close();
  if (!file) throw RuntimeError("cannot write " + path.string());
}

std::vector<std::string> complaints(const std::vector<Built>& kernels) {
  std::vector<std::string> lines;
  for (const Built& kernel : kernels) {
    const Resources& resources = kernel.entry.image.resources;
    const int allowance = kernel.job.row->constant("spill_allowance", 0);
    const auto complain = [&](const std::string& what) {
      lines.push_back(kernel.job.row->name() + " for " + kernel.job.target.name() + ": " + what);
    };
    if (resources.spill_bytes > allowance)
      complain("spills " + std::to_string(resources.spill_bytes) + " bytes, its row allows " +
               std::to_string(allowance));
    if (resources.stack_bytes > 0)
      complain("keeps " + std::to_string(resources.stack_bytes) +
               " bytes of arrays in local memory");
    for (const std::string& warning : resources.warnings) complain(warning);
    // What the backward has under way there, but for matrices, is of no use to anybody: where to go
    // on after the last block of queries, and what it only reads.
    if (kernel.job.target.name() == "sm_90a")
      for (const std::string& line :
           overtaken_loads(kernel.entry.image.bytes, kernel.job.row->op == "backward"))
        complain(line);
    if (kernel.entry.peak_mb > process_limit_mb)
      complain("took " + std::to_string(static_cast<int>(kernel.entry.peak_mb)) +
               " MB to compile; the limit is " +
               std::to_string(static_cast<int>(process_limit_mb)));
  }
  return lines;
}

} // namespace anyflash::build
