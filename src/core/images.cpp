#include "core/images.h"

#include <cstdlib>

#include "core/cache.h"
#include "core/error.h"

namespace anyflash {
namespace {

using Origin = ImageChoice::Origin;

std::string dotted(int compute_capability) {
  return std::to_string(compute_capability / 10) + "." + std::to_string(compute_capability % 10);
}

/// ANYFLASH_IMAGE: the target to use for the rows that it has, for verification.
std::optional<Target> forced_target() {
  const char* name = std::getenv("ANYFLASH_IMAGE");
  if (!name || !*name) return std::nullopt;
  return parse_target(name);
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

[[noreturn]] void refuse(const Row& row, const Target& target, const Gpu& gpu,
                         const CompilerSearch& search) {
  throw RuntimeError(
      "no image of kernel " + row.name() + " for " + gpu.name + " (compute capability " +
      dotted(gpu.compute_capability) + ", driver " + version_text(gpu.driver) +
      "): this package holds " + shipped_targets() + ", not " + target.name() +
      ", and no fitting libnvrtc was found to compile it (" + why_no_compiler(search) +
      "); remedy: pip install nvidia-cuda-nvrtc-cu12, or build anyflash with "
      "FLASH_ATTN_CUDA_ARCHS=" +
      target.arch);
}

CompilerSearch search_for(const Target& target, const Gpu& gpu) {
  return search_compiler(gpu.driver, std::atoi(target.arch.c_str()));
}

/// The insurance: PTX of the oldest image, which the driver compiles for GPUs that nobody knew.
std::optional<ImageChoice> choose_ptx(const Row& row, const Target& native, const Gpu& gpu,
                                      CompilerSearch& native_search) {
  const Target ptx{"80", true};
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

ImageChoice choose_forced(const Row& row, const Target& target, const Gpu& gpu) {
  if (auto choice = from_archive(row, target)) return *choice;
  CompilerSearch search = search_for(target, gpu);
  if (auto choice = from_compiler(row, target, gpu, search)) return *choice;
  refuse(row, target, gpu, search);
}

} // namespace

Target native_target(const Row& row, int compute_capability) {
  const std::string image(image_for(compute_capability, row.family));
  const bool same_major = std::atoi(image.c_str()) / 10 == compute_capability / 10;
  if (same_major && row.in_image(image)) return {image};
  return {std::to_string(compute_capability)};
}

ImageChoice choose_image(const Row& row, const Gpu& gpu) {
  const std::optional<Target> forced = forced_target();
  if (forced && row.in_image(forced->arch)) return choose_forced(row, *forced, gpu);
  const Target native = native_target(row, gpu.compute_capability);
  if (auto choice = from_archive(row, native)) return *choice;

  CompilerSearch search = search_for(native, gpu);
  if (auto choice = from_compiler(row, native, gpu, search)) return *choice;
  if (auto choice = choose_ptx(row, native, gpu, search)) return *choice;
  refuse(row, native, gpu, search);
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
