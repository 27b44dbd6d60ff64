// Shared libraries opened at run time: the CUDA driver and NVRTC.
#pragma once

#include <filesystem>
#include <string>

namespace anyflash {

/// A shared library that stays open for the life of the process.
class SharedLibrary {
public:
  /// Opens by file name or by full path; `error` says why it cannot, without the name.
  static SharedLibrary open(const std::string& name, std::string* error = nullptr);

  explicit operator bool() const { return handle_ != nullptr; }
  /// The address of a symbol; null if there is none.
  void* symbol(const char* name) const;
  /// The file that holds this address (a function of the library); empty if unknown.
  static std::filesystem::path file_of(const void* address);

private:
  void* handle_ = nullptr;
};

} // namespace anyflash
