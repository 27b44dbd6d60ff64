// Row -> image through NVRTC: one path for the build and for the run time.
#pragma once

#include <memory>
#include <string>
#include <string_view>
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

/// PTX of the oldest image, which drivers compile for every newer GPU.
inline Target ptx_target() { return {"80", true}; }

/// "sm_90a" or "compute_80"; throws InvalidValue for anything else.
Target parse_target(std::string_view name);

/// Every target that a full build makes: the images of the table, and the PTX.
std::vector<Target> all_targets();

/// What ptxas reported. All zero for PTX, which ptxas has not seen yet. A row of several entries:
/// the registers and
/// static shared memory of the main one, the sums of what should be 0.
struct Resources {
  int registers = 0;
  int spill_bytes = 0; // stores + loads
  int stack_bytes = 0; // local-memory arrays: the stack frame less the spilled registers
  int static_shared_bytes = 0;
  double seconds = 0;
  std::vector<std::string> warnings; // ptxas lines such as C7510
};

/// Reads the report that ptxas -v wrote for the entries of one row.
Resources parse_resources(std::string_view log);

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
  /// Compute capabilities that it compiles for, ascending: 75, 80, ...
  virtual const std::vector<int>& capabilities() const = 0;
  /// Compiles one translation unit that may include every embedded source. Throws RuntimeError with
  /// the compiler's log.
  virtual Image compile(const std::string& source, const std::string& name,
                        const Target& target) const = 0;
};

/// A place where libnvrtc was looked for, and why it was not taken.
struct RejectedCompiler {
  std::string path;
  std::string reason;
};

struct CompilerSearch {
  std::shared_ptr<const Compiler> compiler; // null if there is none that fits
  std::vector<RejectedCompiler> rejected;
};

/// Finds libnvrtc: ANYFLASH_NVRTC, the pip packages of the known site-packages folders
/// (nvidia/cuda_nvrtc/lib, nvidia/cu13/lib), the toolkit (CUDA_HOME, CUDA_PATH, /usr/local/cuda),
/// the system path. driver: the CUDA version of the driver that must load the result (12040), 0 if
/// it does not matter: a driver loads no machine code of a compiler of a later major version.
/// capability: the GPU that it must compile for (90), 0 if it does not matter.
CompilerSearch search_compiler(int driver, int capability = 0);

/// "12.9" of 12090, the way CUDA writes its versions and those of drivers.
std::string version_text(int version);

/// The compiler of search_compiler.
std::shared_ptr<const Compiler> find_compiler(int driver);

/// Adds a site-packages folder to those that search_compiler looks through; the first added comes
/// first.
void add_compiler_path(const std::string& site_packages);

/// Compiles one row for one target. Pure: same inputs, same bytes. Throws RuntimeError with the
/// row, the target and the compiler's log.
Image compile(const Row& row, const Target& target, const Compiler& compiler);

/// What is handed to NVRTC for a row: the family's header, the row as constants, the entry points.
std::string source_of(const Row& row);

/// Hash of everything a row of this op and family is compiled from (headers and their names,
/// comments aside): the key of the record of device tests.
std::string source_hash(std::string_view op, std::string_view family);

/// Hash of everything one row is compiled from: the headers, its constants, the compiler's options.
/// The key of archives and of the cache on disk.
std::string row_hash(const Row& row);

} // namespace anyflash
