#include "jobs.h"

#include <sched.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <map>
#include <sstream>

#include "core/driver.h"
#include "core/error.h"

namespace anyflash::build {
namespace {

namespace fs = std::filesystem;

constexpr double mb_a_process = 400; // more than any kernel takes, so that a full machine survives

/// The first number of a file, in MB when it counts bytes; infinity if there is none ("max").
double number_in(const fs::path& path, double unit) {
  std::ifstream file(path);
  double number = 0;
  return file >> number ? number / unit : 1e18;
}

double available_mb() {
  std::ifstream meminfo("/proc/meminfo");
  std::string name;
  double kilobytes = 0, available = 1e18;
  while (meminfo >> name >> kilobytes) {
    if (name == "MemAvailable:") available = kilobytes / 1024;
    meminfo.ignore(256, '\n');
  }
  const double megabyte = 1024 * 1024;
  const double limit = number_in("/sys/fs/cgroup/memory.max", megabyte);
  const double used = number_in("/sys/fs/cgroup/memory.current", megabyte);
  return limit < 1e18 && used < limit ? std::min(available, limit - used) : available;
}

int cores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  return CPU_COUNT(&set);
}

/// Where the process of a job leaves its image, or what went wrong.
struct JobFiles {
  fs::path image, warnings, error;

  JobFiles(const fs::path& folder, size_t index) {
    const std::string stem = std::to_string(index);
    image = folder / (stem + ".bin");
    warnings = folder / (stem + ".warnings");
    error = folder / (stem + ".error");
  }
  void remove() const {
    std::error_code ignored;
    for (const fs::path& path : {image, warnings, error}) fs::remove(path, ignored);
  }
};

[[noreturn]] void compile_in_child(const Job& job, const Compiler& compiler,
                                   const JobFiles& files) {
  try {
    Image image = compile(*job.row, job.target, compiler);
    std::ofstream warnings(files.warnings);
    for (const std::string& line : image.resources.warnings) warnings << line << '\n';
    write_archive(files.image, compiler.version(),
                  {{job.row->name(), row_hash(*job.row), std::move(image), 0}});
    warnings.close();
    _exit(0);
  } catch (const std::exception& error) {
    std::ofstream(files.error) << error.what();
    _exit(1);
  }
}

std::string text_of(const fs::path& path) {
  std::ifstream file(path);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

std::string why_it_died(const Job& job, int status, const JobFiles& files) {
  if (std::string text = text_of(files.error); !text.empty()) return text;
  std::string text = "compiling kernel " + job.row->name() + " for " + job.target.name();
  if (WIFSIGNALED(status))
    return text + " was killed by signal " + std::to_string(WTERMSIG(status)) +
           (WTERMSIG(status) == SIGKILL ? " (out of memory? set MAX_JOBS=1)" : "");
  return text + " ended with status " + std::to_string(WEXITSTATUS(status));
}

double seconds_of(const timeval& time) {
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) / 1e6;
}

Result collect(const Job& job, int status, const rusage& usage, const JobFiles& files) {
  Result result;
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) {
    result.error = why_it_died(job, status, files);
  } else {
    const std::shared_ptr<const Archive> archive = Archive::open(files.image);
    const ArchivedImage& image = archive->images().at(0);
    result.entry = {std::string(image.row),
                    std::string(image.hash),
                    {std::string(image.bytes), image.resources},
                    static_cast<double>(usage.ru_maxrss) / 1024};
    // Processor time, which other programs on the machine do not change.
    result.entry.image.resources.seconds = seconds_of(usage.ru_utime) + seconds_of(usage.ru_stime);
    std::istringstream lines(text_of(files.warnings));
    for (std::string line; std::getline(lines, line);)
      result.entry.image.resources.warnings.push_back(line);
  }
  files.remove();
  return result;
}

std::vector<int> capabilities_of_driver() {
  std::vector<int> capabilities;
  const cuda::Driver* driver = cuda::try_driver();
  for (int i = 0; driver && i < driver->devices; ++i) {
    cuda::Device device = 0;
    driver->check(driver->DeviceGet(&device, i), "cuDeviceGet");
    capabilities.push_back(driver->compute_capability(device));
  }
  return capabilities;
}

} // namespace

std::vector<int> gpus_present() {
  int ends[2];
  if (pipe(ends) != 0) throw RuntimeError("cannot make a pipe");
  const pid_t child = fork();
  if (child == 0) {
    try {
      for (const int capability : capabilities_of_driver())
        if (write(ends[1], &capability, sizeof capability) != sizeof capability) _exit(1);
    } catch (const std::exception&) { // as if there were none
    }
    _exit(0);
  }
  close(ends[1]);
  std::vector<int> gpus;
  for (int capability; read(ends[0], &capability, sizeof capability) == sizeof capability;)
    gpus.push_back(capability);
  close(ends[0]);
  if (child > 0) waitpid(child, nullptr, 0);
  return gpus;
}

int parallelism() {
  int processes = cores();
  if (const char* text = std::getenv("MAX_JOBS"); text && std::atoi(text) > 0)
    processes = std::atoi(text);
  const double by_memory = std::min(available_mb() / mb_a_process, 1024.0);
  return std::max(1, std::min(processes, static_cast<int>(by_memory)));
}

std::vector<Result> run(const std::vector<Job>& jobs, const Compiler& compiler, int processes,
                        const fs::path& folder, const Progress& progress) {
  std::vector<Result> results(jobs.size());
  std::map<pid_t, size_t> running;
  size_t next = 0, done = 0;
  bool failed = false;
  while (true) {
    const bool start = next < jobs.size() && !failed;
    if (start && static_cast<int>(running.size()) < processes) {
      const pid_t child = fork();
      if (child == 0) compile_in_child(jobs[next], compiler, {folder, next});
      if (child < 0) throw RuntimeError("cannot start a process to compile in");
      running[child] = next++;
      continue;
    }
    if (running.empty()) return results;
    int status = 0;
    rusage usage{};
    const pid_t child = wait4(-1, &status, 0, &usage);
    const auto found = running.find(child);
    if (found == running.end()) continue;
    const size_t index = found->second;
    running.erase(found);
    results[index] = collect(jobs[index], status, usage, {folder, index});
    failed |= !results[index].error.empty();
    progress(++done, jobs[index], results[index]);
  }
}

} // namespace anyflash::build
