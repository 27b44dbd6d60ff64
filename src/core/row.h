// The table of kernels (variants.def) as data.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/problem.h"

namespace anyflash {

/// One kernel in the image of a row: anyflash_entry, its name there, and the device function.
struct EntryPoint {
  anyflash_entry id;
  const char* symbol;
  const char* function;
};

/// The entries of every row of an operation, in the order in which they run.
std::span<const EntryPoint> entries_of(std::string_view op);

/// A number that a row states: "warps = 4".
struct Constant {
  std::string_view name;
  int value;
};

/// One compiled image: a line of variants.def for one dtype.
struct Row {
  int id;                       // index into rows()
  std::string_view op;          // "forward"
  std::string_view family;      // "sm80"
  std::string_view variant;     // "plain", "general"
  std::string_view archs;       // "80 90 100": the images it is compiled into
  DType dtype;                  // fp16 or bf16
  int d, dv;                    // largest head dims
  int Br, Bc;                   // query rows and keys a block
  std::string_view constants;   // "warps = 4, k_stages = 2, ..."
  std::vector<Constant> values; // the same, read once: every launch asks for some

  /// A named constant of the row; `missing` when the row does not state it.
  int constant(std::string_view name, int missing) const;
  /// Thread blocks that share the work of `cluster` blocks of keys.
  int cluster() const { return constant("cluster", 1); }
  int threads() const { return 32 * constant("warps", 0); }
  /// Threads of an entry: those around the main kernel may have another number.
  int threads(anyflash_entry entry) const {
    return entry == ANYFLASH_KERNEL ? threads() : constant("end_threads", threads());
  }
  /// Dynamic shared memory of one block, from the family's own layout.
  int shared_bytes() const;
  /// Unique within one image: "forward_sm80_plain_bf16_d128_dv128_128x64".
  std::string name() const;
  /// True if the row is compiled into this image, e.g. "90" or "90a".
  bool in_image(std::string_view arch) const;
};

/// Every row, in the order of variants.def.
std::span<const Row> rows();

/// All image architectures that the table names, ascending: "80", "86", "90", ...
std::span<const std::string_view> image_archs();

/// The image that serves a GPU: same major, the highest minor not above the GPU's; "80" (through
/// PTX) for a newer GPU that no image serves; empty for a GPU older than every row.
std::string_view image_for(int compute_capability, std::string_view family);

} // namespace anyflash
