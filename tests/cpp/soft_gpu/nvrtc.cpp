// libnvrtc for the GPU in software: its machine code is the path of a shared library that the
// compiler of the host has made, with the headers of this folder in front of the library's own.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <sstream>
#include <string>

namespace fs = std::filesystem;

namespace {

struct Program {
  std::string source, name, log, code;
};

constexpr int architectures[] = {80, 86, 90, 100, 120};

std::string read(const fs::path& path) {
  std::stringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

/// Ways in for the driver, which does not know the parameters' type.
std::string entries_of(const std::string& source) {
  static const std::regex kernel(
      R"(extern "C" __global__ void __launch_bounds__\([^)]*\) (\w+)\()");
  std::string text = "template <class P> void enter(void (*f)(P), const void* p) "
                     "{ f(*static_cast<const P*>(p)); }\n";
  for (std::sregex_iterator at(source.begin(), source.end(), kernel), end; at != end; ++at)
    text += "extern \"C\" __attribute__((visibility(\"default\"))) void enter_" + at->str(1) +
            "(const void* p) { enter(" + at->str(1) + ", p); }\n";
  return text;
}

/// What a kernel declares extern, in each family's namespace; as large as any block's.
constexpr char windows[] =
    "namespace anyflash::sm80 { alignas(1024) thread_local char shared_memory[227 << 10]; }\n"
    "namespace anyflash::sm90 { alignas(1024) thread_local char shared_memory[227 << 10]; }\n";

int major_minor(int count, const char* const* options) {
  for (int i = 0; i < count; ++i)
    if (const char* at = std::strstr(options[i], "--gpu-architecture=sm_"))
      return std::atoi(at + std::strlen("--gpu-architecture=sm_"));
  return 0;
}

/// Those options that the host's compiler knows too.
std::string definitions(int count, const char* const* options) {
  std::string text;
  for (int i = 0; i < count; ++i)
    if (std::strncmp(options[i], "-D", 2) == 0) text += std::string(" ") + options[i];
  return text;
}

} // namespace

extern "C" {

const char* nvrtcGetErrorString(int result) { return result ? "failed in software" : "success"; }
int nvrtcVersion(int* major, int* minor) {
  *major = 12;
  *minor = 4;
  return 0;
}
int nvrtcGetNumSupportedArchs(int* count) {
  *count = std::size(architectures);
  return 0;
}
int nvrtcGetSupportedArchs(int* archs) {
  std::copy(std::begin(architectures), std::end(architectures), archs);
  return 0;
}

/// The headers are those of the source tree: nobody builds tests elsewhere.
int nvrtcCreateProgram(Program** program, const char* source, const char* name, int,
                       const char* const*, const char* const*) {
  *program = new Program{source, name, {}, {}};
  return 0;
}
int nvrtcDestroyProgram(Program** program) {
  delete *program;
  *program = nullptr;
  return 0;
}

int nvrtcCompileProgram(Program* program, int count, const char* const* options) {
  const int arch = major_minor(count, options);
  if (arch == 0) return 1; // no PTX here
  const fs::path folder = std::getenv("ANYFLASH_CACHE_DIR");
  const std::string stem = (folder / fs::path(program->name).stem()).string() + "_sm_" +
                           std::to_string(arch) + "_" + std::to_string(getpid());
  fs::create_directories(folder);
  std::ofstream(stem + ".cpp") << program->source << entries_of(program->source) << windows;
  const std::string command = std::string(SOFT_GPU_COMPILER) +
                              " -std=c++20 -O2 -fPIC -shared -fvisibility=hidden -fno-gnu-unique "
                              "-fno-extern-tls-init -fno-strict-aliasing -w"
                              " -D__CUDA_ARCH__=" +
                              std::to_string(arch * 10) + definitions(count, options) +
                              " -I" SOFT_GPU_FOLDER " -I" SOFT_GPU_SOURCES " " + stem + ".cpp -o " +
                              stem + ".so 2> " + stem + ".log";
  const int status = std::system(command.c_str());
  program->log = read(stem + ".log");
  if (status != 0) return 6;
  for (const char* ending : {".cpp", ".log"}) fs::remove(stem + ending);
  program->code = stem + ".so";
  return 0;
}

int nvrtcGetProgramLogSize(Program* program, size_t* size) {
  *size = program->log.size() + 1;
  return 0;
}
int nvrtcGetProgramLog(Program* program, char* log) {
  std::strcpy(log, program->log.c_str());
  return 0;
}
int nvrtcGetCUBINSize(Program* program, size_t* size) {
  *size = program->code.size() + 1;
  return 0;
}
int nvrtcGetCUBIN(Program* program, char* code) {
  std::strcpy(code, program->code.c_str());
  return 0;
}
int nvrtcGetPTXSize(Program*, size_t*) { return 1; }
int nvrtcGetPTX(Program*, char*) { return 1; }

} // extern "C"
