// A libcuda without a GPU: two devices that record what is asked of them. It has the soname of the
// real one, so that the library's dlopen finds it in a process that links it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace fake_cuda {

struct Context {
  int device = 0;
};

struct Kernel {
  std::string image; // the bytes that it was loaded from
  std::string name;  // of the entry
};

struct Library {
  std::string image;
  std::map<std::string, Kernel> kernels; // by name: who asks again gets the same one
};

struct Launch {
  const Kernel* kernel = nullptr;
  const Context* context = nullptr;
  unsigned grid[3] = {}, block[3] = {};
  unsigned shared_bytes = 0;
  void* stream = nullptr;
  std::vector<unsigned char> params;
};

struct AttributeSet {
  const Kernel* kernel = nullptr;
  int attribute = 0, value = 0, device = 0;
};

struct State {
  std::mutex mutex;
  std::vector<Launch> launches;
  std::vector<AttributeSet> attributes;
  std::vector<int> capture_mode_at_load;
  size_t params_bytes = 0;       // how much of the first kernel argument to keep
  int fail_next_launch_with = 0; // a CUresult
};

State& state();
Context* primary_context(int device);
constexpr int device_count = 2;
constexpr int capabilities[device_count] = {90, 80};

/// The context that is current on this thread; null if there is none.
Context* current_context();
void set_current_context(Context* context);
int capture_mode();

} // namespace fake_cuda
