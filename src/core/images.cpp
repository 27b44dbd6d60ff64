#include "core/images.h"

#include <cstdlib>
#include <map>
#include <mutex>
#include <tuple>

#include "core/cache.h"
#include "core/error.h"

namespace anyflash {
namespace {

using Origin = ImageChoice::Origin;

std::string dotted(int compute_capability) {
  return std::to_string(compute_capability / 10) + "." + std::to_string(compute_capability % 10);
}

std::optional<ImageChoice> from_archive(const Row& row, const Target& target) {
  const std::shared_ptr<const Archive> archive = shipped_archive(target);
  const ArchivedImage* image = archive ? archive->find(row) : nullptr;
  if (!image) return std::nullopt;
  return ImageChoice{Origin::archive, target, std::string(image->bytes), nullptr, {}};
}

CacheKey key_of(const Row& row, const Target& target, int compiler_version) {
  return {row.name(), target.name(), row_hash(row), compiler_version};
}

/// A driver loads machine code of every compiler of its own major version, and only PTX that is not
/// newer than itself.
int newest_compiler(const Target& target, int driver) {
  return target.ptx ? driver : driver / 1000 * 1000 + 999;
}

std::string newer_ptx(int version, const Gpu& gpu) {
  return "its PTX (CUDA " + version_text(version) + ") needs a newer driver than this one (" +
         version_text(gpu.driver) + ")";
}

std::string compile_notice(const Row& row, const Target& target, const Gpu& gpu) {
  return "anyflash: compiling " + row.name() + " for " + gpu.name + " (" + target.name() +
         ", not in this package); takes seconds, kept in " +
         (cache_folder().empty() ? "memory only" : cache_folder().string());
}

std::optional<ImageChoice> from_compiler(const Row& row, const Target& target, const Gpu& gpu,
                                         CompilerSearch& search) {
  if (!search.compiler) {
    auto bytes =
        cache_load_any_compiler(key_of(row, target, 0), newest_compiler(target, gpu.driver));
    if (!bytes) return std::nullopt;
    return ImageChoice{Origin::cache, target, std::move(*bytes), nullptr, {}};
  }
  const int version = search.compiler->version();
  if (version > newest_compiler(target, gpu.driver)) {
    search.rejected.push_back({search.compiler->path(), newer_ptx(version, gpu)});
    return std::nullopt;
  }
  if (auto bytes = cache_load(key_of(row, target, version)))
    return ImageChoice{Origin::cache, target, std::move(*bytes), nullptr, {}};
  return ImageChoice{
      Origin::compile, target, {}, search.compiler, compile_notice(row, target, gpu)};
}

std::string why_no_compiler(const CompilerSearch& search) {
  std::string text;
  for (const RejectedCompiler& rejected : search.rejected)
    text += (text.empty() ? "" : "; ") + rejected.path + ": " + rejected.reason;
  return text;
}

/// Why there is no image of a target.
std::string what_is_missing(const Target& target, const CompilerSearch& search) {
  return "this package holds " + shipped_targets() + ", not " + target.name() +
         ", and no fitting libnvrtc was found to compile it (" + why_no_compiler(search) + ")";
}

[[noreturn]] void refuse(const Row& row, const Target& target, const Gpu& gpu,
                         const CompilerSearch& search) {
  throw RuntimeError("no image of kernel " + row.name() + " for " + gpu.name +
                     " (compute capability " + dotted(gpu.compute_capability) + ", driver " +
                     version_text(gpu.driver) + "): " + what_is_missing(target, search) +
                     "; remedy: pip install nvidia-cuda-nvrtc-cu12, or build anyflash with "
                     "FLASH_ATTN_CUDA_ARCHS=" +
                     target.arch);
}

CompilerSearch search_for(const Target& target, const Gpu& gpu) {
  return search_compiler(gpu.driver, std::atoi(target.arch.c_str()));
}

/// One target: shipped, kept on disk, or compiled now. Without it, `search` says why.
std::optional<ImageChoice> choose_target(const Row& row, const Target& target, const Gpu& gpu,
                                         CompilerSearch& search) {
  if (auto choice = from_archive(row, target)) return choice;
  search = search_for(target, gpu);
  return from_compiler(row, target, gpu, search);
}

/// The insurance: PTX, which the driver compiles for GPUs that nobody knew.
std::optional<ImageChoice> choose_ptx(const Row& row, const Target& native, const Gpu& gpu,
                                      CompilerSearch& native_search) {
  const Target ptx = ptx_target();
  if (!row.in_image(ptx.arch) || gpu.compute_capability < 80) return std::nullopt;
  const std::shared_ptr<const Archive> archive = shipped_archive(ptx);
  if (archive && archive->compiler_version() > gpu.driver) {
    native_search.rejected.push_back(
        {archive->path().string(), newer_ptx(archive->compiler_version(), gpu)});
    return std::nullopt;
  }
  if (auto choice = from_archive(row, ptx)) {
    choice->notice = "anyflash: this package has no machine code for " + gpu.name + " (" +
                     native.name() + "); the driver compiles its PTX for compute_80 instead";
    return choice;
  }
  CompilerSearch search = search_for(ptx, gpu);
  return from_compiler(row, ptx, gpu, search);
}

Availability look_up(const Row& row, const Gpu& gpu) {
  const Target native = native_target(row, gpu.compute_capability);
  CompilerSearch search;
  Availability result;
  result.machine_code = choose_target(row, native, gpu, search).has_value();
  if (result.machine_code) return result;
  result.missing = what_is_missing(native, search);
  result.ptx = choose_ptx(row, native, gpu, search).has_value();
  return result;
}

} // namespace

Target native_target(const Row& row, int compute_capability) {
  const std::string image(image_for(compute_capability, row.family));
  const bool same_major = std::atoi(image.c_str()) / 10 == compute_capability / 10;
  if (same_major && row.in_image(image)) return {image};
  return {std::to_string(compute_capability)};
}

std::optional<Target> forced_target() {
  const char* name = std::getenv("ANYFLASH_IMAGE");
  if (!name || !*name) return std::nullopt;
  return parse_target(name);
}

ImageChoice choose_image(const Row& row, const Gpu& gpu) {
  const std::optional<Target> forced = forced_target();
  const bool is_forced = forced && row.in_image(forced->arch);
  const Target target = is_forced ? *forced : native_target(row, gpu.compute_capability);
  CompilerSearch search;
  if (auto choice = choose_target(row, target, gpu, search)) return *choice;
  if (!is_forced)
    if (auto choice = choose_ptx(row, target, gpu, search)) return *choice;
  refuse(row, target, gpu, search);
}

const Availability& availability(const Row& row, int compute_capability, int driver) {
  static std::mutex mutex;
  static auto* const known = new std::map<std::tuple<int, int, int>, Availability>;
  const std::lock_guard lock(mutex);
  const std::tuple key(row.id, compute_capability, driver);
  const auto found = known->find(key);
  if (found != known->end()) return found->second;
  return known->emplace(key, look_up(row, {"", compute_capability, driver})).first->second;
}

std::string obtain(const ImageChoice& choice, const Row& row) {
  if (choice.origin != Origin::compile) return choice.bytes;
  const Image image = compile(row, choice.target, *choice.compiler);
  cache_store(key_of(row, choice.target, choice.compiler->version()), image.bytes);
  return image.bytes;
}

std::string shipped_targets() {
  std::string text;
  for (const Target& target : all_targets())
    if (shipped_archive(target)) text.append(text.empty() ? "" : " ").append(target.name());
  return text.empty() ? "no images" : text;
}

} // namespace anyflash
