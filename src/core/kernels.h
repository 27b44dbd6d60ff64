// Kernels loaded on GPUs: each (row, entry, GPU) once a process; afterwards a look-up takes no
// lock.
#pragma once

#include "core/driver.h"
#include "core/images.h"

namespace anyflash {

/// A loaded kernel of a row on a GPU; loads (and compiles) the row at the first call. A context of
/// the GPU must be current. Throws RuntimeError.
cuda::Kernel kernel_of(const Row& row, anyflash_entry entry, int device);

/// A GPU of this machine as it really is. Throws RuntimeError for an index that does not exist.
const Gpu& gpu_at(int device);

/// Makes a context of the GPU current for the length of a scope: the one that is current already if
/// it belongs to the GPU, its primary context otherwise. A thread that has none keeps the first
/// GPU's, as after any call of the CUDA runtime, which takes a thread without a context to be on
/// that GPU: asked for its device it would otherwise fail inside, and spend microseconds on it.
class ScopedContext {
public:
  explicit ScopedContext(int device);
  ~ScopedContext();
  ScopedContext(const ScopedContext&) = delete;
  ScopedContext& operator=(const ScopedContext&) = delete;

private:
  const cuda::Driver& driver_;
  bool pop_ = false;
};

} // namespace anyflash
