// Which image of a row runs on a GPU, and where it comes from.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "core/archive.h"
#include "core/compile.h"

namespace anyflash {

/// A GPU as it really is (ANYFLASH_PLAN_FOR aside).
struct Gpu {
  std::string name;
  int compute_capability = 0; // 90
  int driver = 0;             // 12040
  int multiprocessors = 0;
  int shared_bytes = 0; // dynamic shared memory that one block may ask for
};

/// The machine code that serves a row on a GPU: the table's image, or one of the GPU's own when the
/// table has none for this row (a newer GPU, or a row of another generation).
Target native_target(const Row& row, int compute_capability);

/// ANYFLASH_IMAGE: the target to use for the rows that it has, for verification.
std::optional<Target> forced_target();

/// Where an image comes from; look-ups are done, compiling is not.
struct ImageChoice {
  enum class Origin { archive, cache, compile };
  Origin origin = Origin::archive;
  Target target;
  std::string bytes;                        // archive, cache
  std::shared_ptr<const Compiler> compiler; // compile
  std::string notice;                       // what the user should know before; may be empty
};

/// The image of a row for a GPU, in this order: shipped machine code; kept on disk or compiled now;
/// shipped PTX, which the driver compiles. Throws RuntimeError with the remedy.
ImageChoice choose_image(const Row& row, const Gpu& gpu);

/// How choose_image would bring a row to a GPU, ANYFLASH_IMAGE aside.
struct Availability {
  bool machine_code = false; // shipped, kept on disk, or a compiler is there
  bool ptx = false;          // only as PTX, which the driver compiles
  std::string missing;       // why there is no machine code, in words
};

/// Looked up once a process, so that plans stay the same: what is installed later counts in the
/// next one.
const Availability& availability(const Row& row, int compute_capability, int driver);

/// The bytes of a choice: compiles, and keeps the result on disk, if that is what it takes.
std::string obtain(const ImageChoice& choice, const Row& row);

/// Names of the targets that this library has archives of: "sm_80 sm_90 compute_80".
std::string shipped_targets();

} // namespace anyflash
