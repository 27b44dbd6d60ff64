// Row -> image through NVRTC: one path for the build and for the run time.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/row.h"

namespace anyflash {

/// What a kernel is compiled to: the machine code of one GPU generation, or PTX that the driver
/// compiles.
struct Target {
  std::string arch; // "80", "90a"
  bool ptx = false;

  std::string name() const {
    return (ptx ? "compute_" : "sm_") + arch;
  } // also the archive's file name
  bool operator==(const Target&) const = default;
};

/// What ptxas reported.
struct Resources {
  int registers = 0;
  int spill_bytes = 0; // stores + loads
  int stack_bytes = 0; // local-memory arrays
  int static_shared_bytes = 0;
  double seconds = 0;
  std::vector<std::string> warnings; // ptxas lines such as C7510
};

struct Image {
  std::string bytes; // ELF cubin, or PTX text
  Resources resources;
};

/// A loaded libnvrtc.
class Compiler {
public:
  virtual ~Compiler() = default;
  virtual std::string path() const = 0;
  virtual int version() const = 0; // 12090
};

/// Finds libnvrtc: ANYFLASH_NVRTC, the pip packages of the given site-packages folders
/// (nvidia/cuda_nvrtc/lib, nvidia/cu13/lib), the toolkit (CUDA_HOME, /usr/local/cuda), the system
/// path. driver: the CUDA version of the driver that must load the result (12040), 0 if it does not
/// matter. Null if there is none that fits.
std::shared_ptr<const Compiler> find_compiler(int driver);

/// Compiles one row for one target. Pure: same inputs, same bytes. Throws RuntimeError with the
/// row, the target and the compiler's log.
Image compile(const Row& row, const Target& target, const Compiler& compiler);

/// The three lines handed to NVRTC for a row: the row as constants, the family's header, the entry
/// point "kernel".
std::string source_of(const Row& row);

/// Hash of everything a row of this op and family is compiled from (headers and their names): the
/// key of archives and of the cache on disk.
std::string source_hash(std::string_view op, std::string_view family);

} // namespace anyflash
