#include "fake_cuda.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string_view>

namespace fake_cuda {
namespace {

thread_local std::vector<Context*> stack;
thread_local int mode = 0; // global

Context primary[device_count] = {{0}, {1}, {2}, {3}, {4}, {5}};

struct Attribute { // CUlaunchAttribute
  int id, padding;
  unsigned blocks[16];
};

struct Config { // CUlaunchConfig
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  const Attribute* attributes;
  unsigned attribute_count;
};

} // namespace

State& state() {
  static State all;
  return all;
}
Context* primary_context(int device) { return &primary[device]; }
Context* current_context() { return stack.empty() ? nullptr : stack.back(); }
void set_current_context(Context* context) {
  stack.clear();
  if (context) stack.push_back(context);
}
int capture_mode() { return mode; }

} // namespace fake_cuda

using namespace fake_cuda;

namespace {

constexpr int launch_failed = 719;

int get_error_name(int status, const char** text) {
  *text = status == 700             ? "CUDA_ERROR_ILLEGAL_ADDRESS"
          : status == launch_failed ? "CUDA_ERROR_LAUNCH_FAILED"
                                    : "CUDA_ERROR_OF_THE_FAKE";
  return 0;
}
int get_error_string(int status, const char** text) {
  *text = status == launch_failed ? state().failure.c_str() : "text of the fake";
  return 0;
}
int init(unsigned) { return 0; }
int driver_get_version(int* version) {
  *version = 12040;
  return 0;
}
int device_get_count(int* count) {
  *count = device_count;
  return 0;
}
int device_get(int* device, int ordinal) {
  *device = ordinal;
  return ordinal < device_count ? 0 : 101;
}
int device_get_name(char* name, int length, int device) {
  const int capability = capabilities[device];
  std::snprintf(name, static_cast<size_t>(length), "Fake %d.%d", capability / 10, capability % 10);
  return 0;
}
int shared_kilobytes(int capability) {
  return capability == 80 ? 163 : capability == 86 || capability == 120 ? 99 : 227;
}
int device_get_attribute(int* value, int attribute, int device) {
  switch (attribute) {
  case 16:
    *value = state().multiprocessors;
    return 0;
  case 75:
    *value = capabilities[device] / 10;
    return 0;
  case 76:
    *value = capabilities[device] % 10;
    return 0;
  case 97:
    *value = shared_kilobytes(capabilities[device]) * 1024;
    return 0;
  default:
    return 1;
  }
}
int device_total_mem(size_t* bytes, int) {
  *bytes = size_t{80} << 30;
  return 0;
}
int primary_ctx_retain(Context** context, int device) {
  *context = primary_context(device);
  return 0;
}
int ctx_get_current(Context** context) {
  *context = current_context();
  return 0;
}
int ctx_get_device(int* device) {
  if (!current_context()) return 201;
  *device = current_context()->device;
  return 0;
}
int ctx_push_current(Context* context) {
  stack.push_back(context);
  return 0;
}
int ctx_pop_current(Context** context) {
  *context = current_context();
  if (!stack.empty()) stack.pop_back();
  return 0;
}
int library_load_data(Library** library, const void* code, int*, void**, unsigned, int*, void**,
                      unsigned) {
  const std::lock_guard lock(state().mutex);
  state().capture_mode_at_load.push_back(capture_mode());
  *library = new Library{static_cast<const char*>(code), {}};
  return 0;
}
int library_get_kernel(Kernel** kernel, Library* library, const char* name) {
  const std::lock_guard lock(state().mutex);
  *kernel = &library->kernels.try_emplace(name, Kernel{library->image, name}).first->second;
  return std::string_view(name).starts_with("kernel") ? 0 : 500;
}
int kernel_get_function(void** function, Kernel* kernel) {
  *function = kernel;
  return current_context() ? 0 : 201;
}
int kernel_set_attribute(int attribute, int value, Kernel* kernel, int device) {
  const std::lock_guard lock(state().mutex);
  state().attributes.push_back({kernel, attribute, value, device});
  return 0;
}
constexpr int cluster_dimension = 4; // CUlaunchAttributeID
int launch_kernel_ex(const Config* config, Kernel* kernel, void** params, void**) {
  const std::lock_guard lock(state().mutex); // kernels run one after the other
  if (const int status = state().fail_next_launch_with) {
    state().fail_next_launch_with = 0;
    return status;
  }
  if (!current_context()) return 201;
  Launch launch;
  launch.kernel = kernel;
  launch.context = current_context();
  std::memcpy(launch.grid, config->grid, sizeof launch.grid);
  std::memcpy(launch.block, config->block, sizeof launch.block);
  launch.shared_bytes = config->shared_bytes;
  for (unsigned i = 0; i < config->attribute_count; ++i)
    if (config->attributes[i].id == cluster_dimension)
      launch.cluster = config->attributes[i].blocks[0];
  launch.stream = config->stream;
  if (state().execute) {
    state().failure = state().execute(launch, params[0]);
    return state().failure.empty() ? 0 : launch_failed;
  }
  const auto* bytes = static_cast<const unsigned char*>(params[0]);
  launch.params.assign(bytes, bytes + state().params_bytes);
  state().launches.push_back(std::move(launch));
  return 0;
}
int exchange_capture_mode(int* other) {
  std::swap(mode, *other);
  return 0;
}
int tensor_map_encode_tiled(void* encoded, int type, uint32_t rank, void* address,
                            const uint64_t* sizes, const uint64_t* strides, const uint32_t* box,
                            const uint32_t*, int, int swizzle, int, int) {
  if (rank < 3 || rank > 5 || !address || reinterpret_cast<uintptr_t>(address) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(encoded) % 64 != 0)
    return 1;
  TensorMap map{};
  map.data = static_cast<char*>(address);
  map.rank = static_cast<uint8_t>(rank);
  map.type = static_cast<uint8_t>(type);
  map.swizzle_bytes = static_cast<uint8_t>(16 << swizzle); // 1: 32, 2: 64, 3: 128
  for (uint32_t i = 0; i < rank; ++i) {
    if (sizes[i] == 0 || sizes[i] > uint64_t{1} << 32 || box[i] == 0 || box[i] > 256) return 1;
    map.sizes[i] = static_cast<uint32_t>(std::min<uint64_t>(sizes[i], UINT32_MAX));
    map.box[i] = static_cast<uint16_t>(box[i]);
  }
  for (uint32_t i = 0; i + 1 < rank; ++i) {
    if (strides[i] == 0 || strides[i] % 16 != 0 || strides[i] >= uint64_t{1} << 40) return 1;
    map.strides[i] = strides[i];
  }
  if (box[0] * 2 % 16 != 0 || (swizzle && box[0] * 2 > map.swizzle_bytes)) return 1;
  std::memcpy(encoded, &map, sizeof map);
  return 0;
}

struct Symbol {
  std::string_view name;
  void* address;
};

template <class Function>
void* address_of(Function* function) {
  return reinterpret_cast<void*>(function);
}

} // namespace

extern "C" {

int cuInit(unsigned) { return 0; } // so that the library finds this file

/// NVRTC asks for it and lives without an answer.
int cuGetExportTable(const void** table, const void*) {
  *table = nullptr;
  return 500;
}

int cuGetProcAddress_v2(const char* name, void** address, int version, uint64_t, int*) {
  static const Symbol symbols[] = {
      {"cuGetErrorName", address_of(get_error_name)},
      {"cuGetErrorString", address_of(get_error_string)},
      {"cuInit", address_of(init)},
      {"cuDriverGetVersion", address_of(driver_get_version)},
      {"cuDeviceGetCount", address_of(device_get_count)},
      {"cuDeviceGet", address_of(device_get)},
      {"cuDeviceGetName", address_of(device_get_name)},
      {"cuDeviceGetAttribute", address_of(device_get_attribute)},
      {"cuDeviceTotalMem", address_of(device_total_mem)},
      {"cuDevicePrimaryCtxRetain", address_of(primary_ctx_retain)},
      {"cuCtxGetCurrent", address_of(ctx_get_current)},
      {"cuCtxGetDevice", address_of(ctx_get_device)},
      {"cuCtxPushCurrent", address_of(ctx_push_current)},
      {"cuCtxPopCurrent", address_of(ctx_pop_current)},
      {"cuLibraryLoadData", address_of(library_load_data)},
      {"cuLibraryGetKernel", address_of(library_get_kernel)},
      {"cuKernelGetFunction", address_of(kernel_get_function)},
      {"cuKernelSetAttribute", address_of(kernel_set_attribute)},
      {"cuLaunchKernelEx", address_of(launch_kernel_ex)},
      {"cuThreadExchangeStreamCaptureMode", address_of(exchange_capture_mode)},
      {"cuTensorMapEncodeTiled", address_of(tensor_map_encode_tiled)},
  };
  if (version > 12000) return 1; // nothing newer than CUDA 12.0 may be asked for
  for (const Symbol& symbol : symbols)
    if (symbol.name == name) {
      *address = symbol.address;
      return 0;
    }
  return 500;
}

} // extern "C"
