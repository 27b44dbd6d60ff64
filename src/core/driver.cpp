#include "core/driver.h"

#include <pthread.h>

#include <atomic>
#include <memory>
#include <mutex>

#include "core/error.h"
#include "core/shared_library.h"

namespace anyflash::cuda {
namespace {

constexpr int oldest_version = 12000; // driver 525
constexpr Status not_initialized = 3;
constexpr Status no_device = 100;

// CUDA's state does not survive fork(): the child learns that its parent had used it.
std::atomic<bool> used{false};
std::atomic<bool> forked_after_use{false};

void in_child() {
  if (used.load(std::memory_order_relaxed)) forked_after_use.store(true, std::memory_order_relaxed);
}

constexpr const char* fork_message =
    "this process was forked after its parent had used CUDA, and CUDA does not survive a fork: "
    "start "
    "worker processes with 'spawn' or 'forkserver' (multiprocessing.set_start_method), or fork "
    "before the first use of the GPU";

using GetProcAddress = Status (*)(const char* symbol, void** function, int version, uint64_t flags,
                                  int* found);

struct Loader {
  GetProcAddress get_proc_address;
  std::string missing;

  template <class Function>
  void load(const char* name, Function& function) {
    void* address = nullptr;
    if (get_proc_address(name, &address, oldest_version, 0, nullptr) != 0 || !address)
      missing = name;
    function = reinterpret_cast<Function>(address);
  }
};

void load_functions(Loader& loader, Driver& d) {
  loader.load("cuGetErrorName", d.GetErrorName);
  loader.load("cuGetErrorString", d.GetErrorString);
  loader.load("cuInit", d.Init);
  loader.load("cuDriverGetVersion", d.DriverGetVersion);
  loader.load("cuDeviceGetCount", d.DeviceGetCount);
  loader.load("cuDeviceGet", d.DeviceGet);
  loader.load("cuDeviceGetName", d.DeviceGetName);
  loader.load("cuDeviceGetAttribute", d.DeviceGetAttribute);
  loader.load("cuDeviceTotalMem", d.DeviceTotalMem);
  loader.load("cuDevicePrimaryCtxRetain", d.DevicePrimaryCtxRetain);
  loader.load("cuCtxGetCurrent", d.CtxGetCurrent);
  loader.load("cuCtxGetDevice", d.CtxGetDevice);
  loader.load("cuCtxPushCurrent", d.CtxPushCurrent);
  loader.load("cuCtxPopCurrent", d.CtxPopCurrent);
  loader.load("cuLibraryLoadData", d.LibraryLoadData);
  loader.load("cuLibraryGetKernel", d.LibraryGetKernel);
  loader.load("cuKernelGetFunction", d.KernelGetFunction);
  loader.load("cuKernelSetAttribute", d.KernelSetAttribute);
  loader.load("cuLaunchKernelEx", d.LaunchKernelEx);
  loader.load("cuThreadExchangeStreamCaptureMode", d.ThreadExchangeStreamCaptureMode);
  loader.load("cuTensorMapEncodeTiled", d.TensorMapEncodeTiled);
}

constexpr const char* library_name = "libcuda.so.1";
constexpr const char* old_driver_message =
    ": anyflash needs an NVIDIA driver of version 525 (CUDA 12.0) or later; update the driver";

std::unique_ptr<Driver> open_driver() {
  std::string error;
  const SharedLibrary library = SharedLibrary::open(library_name, &error);
  if (!library)
    throw RuntimeError(std::string("no NVIDIA driver on this machine (") + library_name + ": " +
                       error +
                       "): install it, or in a container start it with access to the GPUs (docker "
                       "run --gpus all)");
  auto driver = std::make_unique<Driver>();
  Loader loader{reinterpret_cast<GetProcAddress>(library.symbol("cuGetProcAddress_v2")), {}};
  driver->path = SharedLibrary::file_of(library.symbol("cuInit")).string();
  if (!loader.get_proc_address)
    throw RuntimeError("the NVIDIA driver " + driver->path + " is too old" + old_driver_message);
  load_functions(loader, *driver);
  if (!loader.missing.empty())
    throw RuntimeError("the NVIDIA driver " + driver->path + " has no " + loader.missing +
                       old_driver_message);
  return driver;
}

void initialise(Driver& driver) {
  const Status status = driver.Init(0);
  if (status == not_initialized) throw RuntimeError(fork_message);
  if (status == no_device)
    throw RuntimeError("the NVIDIA driver sees no GPU (" + driver.path +
                       "): check nvidia-smi and CUDA_VISIBLE_DEVICES");
  driver.check(status, "cuInit");
  used = true;
  driver.check(driver.DriverGetVersion(&driver.version), "cuDriverGetVersion");
  if (driver.version < oldest_version)
    throw RuntimeError("the NVIDIA driver " + driver.path + " is too old" + old_driver_message);
  driver.check(driver.DeviceGetCount(&driver.devices), "cuDeviceGetCount");
}

/// What the first attempt found; kept for the life of the process, as the driver is.
struct Found {
  std::unique_ptr<Driver> driver;
  std::string reason; // why there is none

  Found() {
    pthread_atfork(nullptr, nullptr, in_child);
    try {
      driver = open_driver();
      initialise(*driver);
    } catch (const RuntimeError& error) {
      reason = error.what();
      driver.reset();
    }
  }
};

const Found& found() {
  static const Found* once = new Found; // never destroyed: other threads may launch until the end
  return *once;
}

} // namespace

void Driver::fail(Status status, const std::string& what) const {
  const char *name = nullptr, *text = nullptr;
  GetErrorName(status, &name);
  GetErrorString(status, &text);
  throw RuntimeError(what + " failed: " + (name ? name : "CUDA error " + std::to_string(status)) +
                     (text ? std::string(" (") + text + ")" : std::string()));
}

int Driver::attribute(Device device, DeviceAttribute attribute) const {
  int value = 0;
  check(DeviceGetAttribute(&value, attribute, device), "cuDeviceGetAttribute");
  return value;
}

int Driver::compute_capability(Device device) const {
  return 10 * attribute(device, compute_capability_major) +
         attribute(device, compute_capability_minor);
}

std::string Driver::name(Device device) const {
  char text[128] = {};
  check(DeviceGetName(text, sizeof text, device), "cuDeviceGetName");
  return text;
}

void check_fork() {
  if (forked_after_use.load(std::memory_order_relaxed)) throw RuntimeError(fork_message);
}

const Driver* try_driver(std::string* reason) {
  if (forked_after_use.load(std::memory_order_relaxed)) {
    if (reason) *reason = fork_message;
    return nullptr;
  }
  if (!found().driver && reason) *reason = found().reason;
  return found().driver.get();
}

const Driver& driver() {
  std::string reason;
  if (const Driver* driver = try_driver(&reason)) return *driver;
  throw RuntimeError(reason);
}

} // namespace anyflash::cuda
