#include "core/nvrtc.h"

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <sstream>

#include "core/error.h"
#include "core/shared_library.h"
#include "core/sources.h"

namespace anyflash {
namespace {

namespace fs = std::filesystem;

using Program = struct OpaqueProgram*;
using Result = int; // 0: success

/// The functions of libnvrtc that we call; names as in its documentation.
struct Functions {
  const char* (*get_error_string)(Result);
  Result (*version)(int* major, int* minor);
  Result (*get_num_supported_archs)(int* count);
  Result (*get_supported_archs)(int* archs);
  Result (*create_program)(Program*, const char* source, const char* name, int headers,
                           const char* const* header_texts, const char* const* header_names);
  Result (*compile_program)(Program, int options, const char* const* option_texts);
  Result (*destroy_program)(Program*);
  Result (*get_program_log_size)(Program, size_t*);
  Result (*get_program_log)(Program, char*);
  Result (*get_cubin_size)(Program, size_t*);
  Result (*get_cubin)(Program, char*);
  Result (*get_ptx_size)(Program, size_t*);
  Result (*get_ptx)(Program, char*);
};

template <class Function>
void find(const SharedLibrary& library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(library.symbol(name));
  if (!function) throw RuntimeError(std::string("it has no ") + name + " (older than CUDA 12.0?)");
}

Functions load_functions(const SharedLibrary& library) {
  Functions f{};
  find(library, "nvrtcGetErrorString", f.get_error_string);
  find(library, "nvrtcVersion", f.version);
  find(library, "nvrtcGetNumSupportedArchs", f.get_num_supported_archs);
  find(library, "nvrtcGetSupportedArchs", f.get_supported_archs);
  find(library, "nvrtcCreateProgram", f.create_program);
  find(library, "nvrtcCompileProgram", f.compile_program);
  find(library, "nvrtcDestroyProgram", f.destroy_program);
  find(library, "nvrtcGetProgramLogSize", f.get_program_log_size);
  find(library, "nvrtcGetProgramLog", f.get_program_log);
  find(library, "nvrtcGetCUBINSize", f.get_cubin_size);
  find(library, "nvrtcGetCUBIN", f.get_cubin);
  find(library, "nvrtcGetPTXSize", f.get_ptx_size);
  find(library, "nvrtcGetPTX", f.get_ptx);
  return f;
}

/// libnvrtc opens its builtins by bare name; opened before by full path, they are found.
void preload_builtins(const fs::path& nvrtc) {
  std::error_code ignored;
  for (const fs::directory_entry& entry : fs::directory_iterator(nvrtc.parent_path(), ignored)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("libnvrtc-builtins.so")) SharedLibrary::open(entry.path().string());
  }
}

/// A program that is destroyed at the end of its scope.
struct ScopedProgram {
  const Functions& f;
  Program program = nullptr;
  ~ScopedProgram() {
    if (program) f.destroy_program(&program);
  }
};

class Nvrtc final : public Compiler {
public:
  Nvrtc(std::string path, const SharedLibrary& library)
      : path_(std::move(path)), f_(load_functions(library)) {
    int major = 0, minor = 0;
    check(f_.version(&major, &minor), "nvrtcVersion");
    version_ = 1000 * major + 10 * minor;
    if (version_ < 12000) throw RuntimeError("it is older than CUDA 12.0");
    int count = 0;
    check(f_.get_num_supported_archs(&count), "nvrtcGetNumSupportedArchs");
    capabilities_.resize(static_cast<size_t>(count));
    check(f_.get_supported_archs(capabilities_.data()), "nvrtcGetSupportedArchs");
  }

  std::string path() const override { return path_; }
  int version() const override { return version_; }
  const std::vector<int>& capabilities() const override { return capabilities_; }

  Image compile(const std::string& source, const std::string& name,
                const Target& target) const override {
    const auto start = std::chrono::steady_clock::now();
    ScopedProgram scoped{f_};
    create(&scoped.program, source, name);
    const std::vector<std::string> options = nvrtc_options(target);
    std::vector<const char*> option_texts;
    for (const std::string& option : options) option_texts.push_back(option.c_str());
    const Result result = f_.compile_program(scoped.program, static_cast<int>(option_texts.size()),
                                             option_texts.data());
    const std::string log = log_of(scoped.program);
    if (result != 0) throw RuntimeError(error_text(result) + "\n" + log);
    Image image{bytes_of(scoped.program, target.ptx), parse_resources(log)};
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    image.resources.seconds = elapsed.count();
    return image;
  }

private:
  void create(Program* program, const std::string& source, const std::string& name) const {
    std::vector<std::string> texts, names; // with the final 0 that string_views may lack
    for (const Source& header : sources()) {
      texts.emplace_back(header.text);
      names.emplace_back(header.name);
    }
    std::vector<const char*> text_pointers, name_pointers;
    for (const std::string& text : texts) text_pointers.push_back(text.c_str());
    for (const std::string& header : names) name_pointers.push_back(header.c_str());
    check(f_.create_program(program, source.c_str(), name.c_str(), static_cast<int>(texts.size()),
                            text_pointers.data(), name_pointers.data()),
          "nvrtcCreateProgram");
  }

  std::string log_of(Program program) const {
    size_t size = 0;
    if (f_.get_program_log_size(program, &size) != 0 || size <= 1) return {};
    std::string log(size, '\0');
    if (f_.get_program_log(program, log.data()) != 0) return {};
    log.resize(size - 1);
    return log;
  }

  std::string bytes_of(Program program, bool ptx) const {
    size_t size = 0;
    check((ptx ? f_.get_ptx_size : f_.get_cubin_size)(program, &size), "size of the result");
    std::string bytes(size, '\0');
    check((ptx ? f_.get_ptx : f_.get_cubin)(program, bytes.data()), "result");
    if (ptx) bytes.resize(bytes.find('\0') == bytes.npos ? size : bytes.find('\0'));
    return bytes;
  }

  std::string error_text(Result result) const { return f_.get_error_string(result); }

  void check(Result result, const char* what) const {
    if (result != 0) throw RuntimeError(std::string(what) + ": " + error_text(result));
  }

  std::string path_;
  Functions f_;
  int version_ = 0;
  std::vector<int> capabilities_;
};

} // namespace

std::vector<std::string> nvrtc_options(const Target& target) {
  std::vector<std::string> options = {"--std=c++20", "-default-device", "--ptxas-options=-v"};
  if (!target.arch.empty()) options.push_back("--gpu-architecture=" + target.name());
  if (const char* more = std::getenv("ANYFLASH_COMPILE_OPTIONS")) {
    std::istringstream words(more);
    for (std::string word; words >> word;) options.push_back(word);
  }
  return options;
}

std::shared_ptr<const Compiler> open_nvrtc(const std::string& path) {
  if (path.find('/') != path.npos) preload_builtins(path);
  std::string error;
  const SharedLibrary library = SharedLibrary::open(path, &error);
  if (!library) throw RuntimeError(error);
  const fs::path file = SharedLibrary::file_of(library.symbol("nvrtcVersion"));
  if (path.find('/') == path.npos) preload_builtins(file);
  return std::make_shared<Nvrtc>(file.empty() ? path : file.string(), library);
}

} // namespace anyflash
