// A libcuda without a GPU: devices that record what is asked of them, and run kernels if somebody
// says how. It has the soname of the real one, so that the library's dlopen finds it in a process
// that links it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
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
  unsigned cluster = 1; // blocks
  unsigned shared_bytes = 0;
  void* stream = nullptr;
  std::vector<unsigned char> params;
};

struct AttributeSet {
  const Kernel* kernel = nullptr;
  int attribute = 0, value = 0, device = 0;
};

/// What this driver writes into a CUtensorMap: what it was made from.
struct TensorMap {
  char* data;
  uint64_t strides[4]; // bytes, of dimensions 1 to 4
  uint32_t sizes[5];
  uint16_t box[5];
  uint8_t rank, type, swizzle_bytes;
};
static_assert(sizeof(TensorMap) <= 128);

/// Runs a kernel: its place in `params`, its blocks. A text: it failed.
using Execute = std::function<std::string(const Launch&, const void* params)>;

struct State {
  std::mutex mutex;
  Execute execute;           // empty: launches are only recorded
  std::string failure;       // of the last launch that failed
  int multiprocessors = 132; // of every device; read once
  std::vector<Launch> launches;
  std::vector<AttributeSet> attributes;
  std::vector<int> capture_mode_at_load;
  size_t params_bytes = 0;       // how much of the first kernel argument to keep
  int fail_next_launch_with = 0; // a CUresult
};

State& state();
Context* primary_context(int device);
constexpr int capabilities[] = {90, 80, 86, 100, 120, 90}; // of the devices
constexpr int device_count = std::size(capabilities);

/// The context that is current on this thread; null if there is none.
Context* current_context();
void set_current_context(Context* context);
int capture_mode();

} // namespace fake_cuda
