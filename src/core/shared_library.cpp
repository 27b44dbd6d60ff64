#include "core/shared_library.h"

#include <dlfcn.h>

namespace anyflash {

SharedLibrary SharedLibrary::open(const std::string& name, std::string* error) {
  SharedLibrary library;
  library.handle_ = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library.handle_ && error) {
    const char* reason = dlerror();
    *error = reason ? reason : "cannot open";
    if (error->starts_with(name + ": ")) error->erase(0, name.size() + 2);
  }
  return library;
}

void* SharedLibrary::symbol(const char* name) const { return dlsym(handle_, name); }

std::filesystem::path SharedLibrary::file_of(const void* address) {
  Dl_info info{};
  if (!dladdr(address, &info) || !info.dli_fname) return {};
  std::error_code ignored;
  const std::filesystem::path path = std::filesystem::absolute(info.dli_fname, ignored);
  return ignored ? std::filesystem::path(info.dli_fname) : path.lexically_normal();
}

} // namespace anyflash
