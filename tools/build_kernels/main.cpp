// anyflash-build: compiles the rows of variants.def for the wanted GPU generations into archives
// beside the library, and writes the ledger. Part of every build; `anyflash-build --help`.
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <map>

#include "core/arch_list.h"
#include "core/error.h"
#include "jobs.h"
#include "ledger.h"

namespace anyflash::build {
namespace {

namespace fs = std::filesystem;

constexpr const char* help = R"(anyflash-build --output DIR [options]
  --output DIR         where <target>.bin and ledger.json go; kernels that are up to date stay
  --archs LIST         "8.0;9.0+PTX", "80;90", "native", "all"; default: FLASH_ATTN_CUDA_ARCHS,
                       TORCH_CUDA_ARCH_LIST, the GPUs present, or all when there is none
  --site-packages DIR  where to look for the pip packages of libnvrtc; may be repeated
  --rows TEXT          only rows whose name holds TEXT: to try one kernel; the archives then hold
                       only these
  --check              exit 1 when a kernel spills above its allowance, keeps arrays in
                       local memory, or draws a ptxas warning that slows
MAX_JOBS limits the number of processes; free memory does too.
)";

struct Options {
  fs::path output;
  std::string archs = requested_archs();
  std::string rows; // part of the names wanted; empty: all
  bool check = false;
  bool help = false;
};

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const auto argument = [&]() -> std::string {
      if (i + 1 >= argc) throw InvalidValue(name + " needs a value\n" + help);
      return argv[++i];
    };
    if (name == "--output")
      options.output = argument();
    else if (name == "--archs")
      options.archs = argument();
    else if (name == "--rows")
      options.rows = argument();
    else if (name == "--site-packages")
      add_compiler_path(argument());
    else if (name == "--check")
      options.check = true;
    else if (name == "--help")
      options.help = true;
    else
      throw InvalidValue("unknown option " + name + "\n" + help);
  }
  if (options.output.empty() && !options.help)
    throw InvalidValue(std::string("--output is missing\n") + help);
  return options;
}

std::vector<Job> jobs_for(const std::vector<Target>& targets, const std::string& names) {
  std::vector<Job> jobs;
  for (const Target& target : targets)
    for (const Row& row : rows())
      if (row.in_image(target.arch) && row.name().find(names) != std::string::npos)
        jobs.push_back({&row, target});
  return jobs;
}

fs::path archive_path(const fs::path& folder, const Target& target) {
  return folder / (target.name() + ".bin");
}

std::shared_ptr<const Archive> existing_archive(const fs::path& path) {
  try {
    return Archive::open(path);
  } catch (const RuntimeError&) {
    return nullptr; // damaged: built anew
  }
}

/// What an earlier run of the same compiler left of this job. Kernels over their allowance are
/// compiled again, because archives do not hold the compiler's words.
std::optional<ArchiveEntry> up_to_date(const Job& job, const fs::path& folder, int version) {
  const auto archive = existing_archive(archive_path(folder, job.target));
  if (!archive || archive->compiler_version() != version) return std::nullopt;
  const ArchivedImage* image = archive->find(*job.row);
  if (!image) return std::nullopt;
  return ArchiveEntry{std::string(image->row),
                      std::string(image->hash),
                      {std::string(image->bytes), image->resources},
                      image->peak_mb};
}

void print_progress(size_t done, size_t count, const Job& job, const Result& result) {
  const Resources& resources = result.entry.image.resources;
  std::printf("[%3zu/%zu] %-10s %-52s", done, count, job.target.name().c_str(),
              job.row->name().c_str());
  if (result.error.empty()) {
    std::printf(" %4.1f s, %3.0f MB", resources.seconds, result.entry.peak_mb);
    if (!job.target.ptx)
      std::printf(", %3d registers, %d spills", resources.registers, resources.spill_bytes);
  } else {
    std::printf(" FAILED");
  }
  std::printf("\n");
  std::fflush(stdout);
}

/// Folder for the jobs' files, gone at the end of the scope.
struct ScopedFolder {
  fs::path path;
  explicit ScopedFolder(fs::path folder) : path(std::move(folder)) { fs::create_directories(path); }
  ~ScopedFolder() {
    std::error_code ignored;
    fs::remove_all(path, ignored);
  }
};

/// Compiles what is not up to date; every job's kernel, in the order of the jobs.
std::vector<Built> build_all(const std::vector<Job>& jobs, const Compiler& compiler,
                             const fs::path& folder, Summary& summary) {
  std::vector<Built> kernels;
  std::vector<Job> missing;
  std::vector<size_t> place; // of a missing job in kernels
  for (const Job& job : jobs) {
    std::optional<ArchiveEntry> kept = up_to_date(job, folder, compiler.version());
    if (!kept) {
      missing.push_back(job);
      place.push_back(kernels.size());
    }
    kernels.push_back({job, kept ? std::move(*kept) : ArchiveEntry{}});
  }
  summary.processes =
      std::min(parallelism(), static_cast<int>(std::max<size_t>(1, missing.size())));
  summary.compiled = missing.size();
  std::printf("%zu kernels to compile, %zu up to date, %d at a time\n", missing.size(),
              jobs.size() - missing.size(), summary.processes);
  std::fflush(stdout);
  const ScopedFolder temporary(folder / (".jobs" + std::to_string(getpid())));
  const std::vector<Result> results = run(missing, compiler, summary.processes, temporary.path,
                                          [&](size_t done, const Job& job, const Result& result) {
                                            print_progress(done, missing.size(), job, result);
                                          });
  for (size_t i = 0; i < results.size(); ++i) {
    if (!results[i].error.empty()) throw RuntimeError(results[i].error);
    kernels[place[i]].entry = results[i].entry;
  }
  return kernels;
}

/// Writes one archive a target and removes those of targets that are not wanted any more.
size_t write_archives(const fs::path& folder, const std::vector<Target>& targets,
                      const std::vector<Built>& kernels, int version) {
  size_t bytes = 0;
  std::vector<fs::path> written;
  for (const Target& target : targets) {
    std::vector<ArchiveEntry> entries;
    for (const Built& kernel : kernels)
      if (kernel.job.target == target) entries.push_back(kernel.entry);
    written.push_back(archive_path(folder, target));
    write_archive(written.back(), version, entries);
    bytes += fs::file_size(written.back());
  }
  for (const fs::directory_entry& file : fs::directory_iterator(folder))
    if (file.path().extension() == ".bin" &&
        std::find(written.begin(), written.end(), file.path()) == written.end())
      fs::remove(file.path());
  return bytes;
}

std::string names_of(const std::vector<Target>& targets) {
  std::string text;
  for (const Target& target : targets) text += (text.empty() ? "" : ", ") + target.name();
  return text;
}

void build_without_compiler(const Options& options, const CompilerSearch& search) {
  std::printf(
      "anyflash: no libnvrtc found, so no kernel is built now; kernels are compiled on first "
      "use where one is found (pip install nvidia-cuda-nvrtc-cu12)\n");
  for (const RejectedCompiler& rejected : search.rejected)
    std::printf("  tried %s: %s\n", rejected.path.c_str(), rejected.reason.c_str());
  write_archives(options.output, {}, {}, 0);
  write_ledger(options.output / "ledger.json", {}, {});
}

int build(const Options& options) {
  if (options.help) {
    std::fputs(help, stdout);
    return 0;
  }
  const auto start = std::chrono::steady_clock::now();
  fs::create_directories(options.output);
  const CompilerSearch search = search_compiler(0);
  if (!search.compiler) {
    build_without_compiler(options, search);
    return options.check ? 1 : 0;
  }
  const Compiler& compiler = *search.compiler;
  const ArchSelection selection =
      select_targets(options.archs, {gpus_present(), compiler.capabilities()});
  for (const std::string& line : selection.skipped) std::printf("anyflash: %s\n", line.c_str());
  std::printf("anyflash: kernels for %s with NVRTC %d.%d (%s)\n",
              names_of(selection.targets).c_str(), compiler.version() / 1000,
              compiler.version() % 1000 / 10, compiler.path().c_str());

  Summary summary;
  summary.compiler_version = compiler.version();
  const std::vector<Built> kernels =
      build_all(jobs_for(selection.targets, options.rows), compiler, options.output, summary);
  const size_t bytes =
      write_archives(options.output, selection.targets, kernels, compiler.version());
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  summary.seconds = elapsed.count();
  write_ledger(options.output / "ledger.json", summary, kernels);

  std::printf("anyflash: %zu kernels for %s in %.1f s (%zu compiled now, %d at a time); largest "
              "process %.0f MB; %.1f MB of images\n",
              kernels.size(), names_of(selection.targets).c_str(), summary.seconds,
              summary.compiled, summary.processes, largest_mb(kernels),
              static_cast<double>(bytes) / 1e6);
  const std::vector<std::string> lines = complaints(kernels);
  for (const std::string& line : lines) std::printf("anyflash: %s\n", line.c_str());
  return options.check && !lines.empty() ? 1 : 0;
}

} // namespace
} // namespace anyflash::build

int main(int argc, char** argv) {
  try {
    return anyflash::build::build(anyflash::build::parse(argc, argv));
  } catch (const std::exception& error) {
    std::fflush(stdout);
    std::fprintf(stderr, "anyflash-build: %s\n", error.what());
    return 1;
  }
}
