// The CUDA driver, opened at run time. Our own declarations of the few functions of CUDA 12.0 that
// we call (the driver's stable interface), so that nothing of CUDA is needed to build.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace anyflash::cuda {

using Status = int; // CUresult; 0: success
using Device = int;
using Context = struct OpaqueContext*;
using Library = struct OpaqueLibrary*;
using Kernel = struct OpaqueKernel*;
using Function = struct OpaqueFunction*;
using Stream = void*;

/// CUlaunchConfig
struct LaunchConfig {
  unsigned grid[3];
  unsigned block[3];
  unsigned shared_bytes;
  Stream stream;
  void* attributes;
  unsigned attribute_count;
};
static_assert(sizeof(LaunchConfig) == 56 && offsetof(LaunchConfig, stream) == 32);

/// CUlaunchAttribute, whose value is a union of 64 bytes
struct LaunchAttribute {
  int id;
  int padding;
  union {
    int value;
    unsigned blocks[3]; // of a cluster
    char bytes[64];
  };
};
static_assert(sizeof(LaunchAttribute) == 72);

/// CUlaunchAttributeID
enum LaunchAttributeId { cluster_dimension = 4, programmatic_stream_serialization = 6 };

/// CUdevice_attribute
enum DeviceAttribute {
  multiprocessor_count = 16,
  compute_capability_major = 75,
  compute_capability_minor = 76,
  max_shared_memory_per_block_optin = 97,
};

/// CUfunction_attribute
enum FunctionAttribute { max_dynamic_shared_size_bytes = 8 };

/// What a tensor map is encoded from: CUtensorMapDataType, CUtensorMapInterleave,
/// CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill
enum TensorMapType { map_float16 = 6, map_bfloat16 = 9 };
enum TensorMapInterleave { map_not_interleaved = 0 };
enum TensorMapSwizzle { map_swizzle_64_bytes = 2, map_swizzle_128_bytes = 3 };
enum TensorMapPromotion { map_l2_256_bytes = 3 };
enum TensorMapFill { map_fill_zero = 0 };

/// CUstreamCaptureMode
enum CaptureMode { capture_global = 0, capture_thread_local = 1, capture_relaxed = 2 };

/// The functions of libcuda, and what the machine has. Names as in the driver's documentation,
/// without cu.
struct Driver {
  std::string path;
  int version = 0; // 12040
  int devices = 0;

  Status (*GetErrorName)(Status, const char**);
  Status (*GetErrorString)(Status, const char**);
  Status (*Init)(unsigned flags);
  Status (*DriverGetVersion)(int*);
  Status (*DeviceGetCount)(int*);
  Status (*DeviceGet)(Device*, int ordinal);
  Status (*DeviceGetName)(char*, int length, Device);
  Status (*DeviceGetAttribute)(int*, int attribute, Device);
  Status (*DeviceTotalMem)(size_t*, Device);
  Status (*DevicePrimaryCtxRetain)(Context*, Device);
  Status (*CtxGetCurrent)(Context*);
  Status (*CtxGetDevice)(Device*);
  Status (*CtxPushCurrent)(Context);
  Status (*CtxPopCurrent)(Context*);
  Status (*LibraryLoadData)(Library*, const void* code, int* jit_options, void** jit_values,
                            unsigned jit_count, int* library_options, void** library_values,
                            unsigned library_count);
  Status (*LibraryGetKernel)(Kernel*, Library, const char* name);
  Status (*KernelGetFunction)(Function*, Kernel);
  Status (*KernelSetAttribute)(int attribute, int value, Kernel, Device);
  Status (*LaunchKernelEx)(const LaunchConfig*, Kernel, void** params, void** extra);
  Status (*ThreadExchangeStreamCaptureMode)(int*);
  Status (*TensorMapEncodeTiled)(void* map, int type, uint32_t rank, void* address,
                                 const uint64_t* sizes, const uint64_t* strides,
                                 const uint32_t* box, const uint32_t* steps, int interleave,
                                 int swizzle, int promotion, int fill);

  /// Throws RuntimeError with the driver's name and text of the error when status is not 0.
  void check(Status status, const char* what) const {
    if (status != 0) fail(status, what);
  }
  [[noreturn]] void fail(Status status, const std::string& what) const;

  int attribute(Device device, DeviceAttribute attribute) const;
  int compute_capability(Device device) const;
  std::string name(Device device) const;
};

/// The driver, opened and initialised at the first call. Throws RuntimeError with the remedy: no
/// libcuda, too old, no GPU, or used before a fork.
const Driver& driver();

/// The driver, or null with the reason.
const Driver* try_driver(std::string* reason = nullptr);

/// Throws in a process that was forked after its parent had used CUDA. Cheap.
void check_fork();

} // namespace anyflash::cuda
