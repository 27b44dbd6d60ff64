// The library's threads: one pool for the process, shared by concurrent callers.
#pragma once

#include <cstdint>
#include <functional>

namespace anyflash::cpu {

/// Memory that a task may use while it runs; grows, is kept, and is handed out again.
class Scratch {
public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch();

  /// At least `count` floats on a 64-byte boundary, uninitialised. Throws std::bad_alloc.
  float* floats(int64_t count);

private:
  float* data_ = nullptr;
  int64_t capacity_ = 0;
};

using Task = std::function<void(int64_t index, Scratch& scratch)>;

/// Calls task(index, scratch) once for each index in [0, count), on at most `threads` threads of
/// which the caller is one; returns when all are done. Indices start in order. The first exception
/// of a task is thrown here, and tasks not yet started are dropped.
void run_tasks(int64_t count, int threads, const Task& task);

/// The number of threads to use: ANYFLASH_NUM_THREADS, or as many as the process may run on.
/// Throws InvalidValue if the variable is not a positive number.
int thread_count();

} // namespace anyflash::cpu
