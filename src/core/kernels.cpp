#include "core/kernels.h"

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "core/error.h"
#include "core/notice.h"

namespace anyflash {
namespace {

constexpr size_t most_entries = 3; // of a row

size_t index_of(const Row& row, anyflash_entry entry) {
  return static_cast<size_t>(row.id) * most_entries + static_cast<size_t>(entry);
}

/// One GPU: what it is, its primary context once retained, and its loaded kernels by index_of.
struct DeviceState {
  Gpu gpu;
  cuda::Device device = 0;
  std::atomic<cuda::Context> primary{nullptr};
  std::vector<std::atomic<cuda::Kernel>> kernels;

  DeviceState() : kernels(rows().size() * most_entries) {}
};

/// All GPUs of the process; made once, never destroyed.
struct Devices {
  std::vector<DeviceState> states;

  explicit Devices(const cuda::Driver& driver) : states(static_cast<size_t>(driver.devices)) {
    for (int i = 0; i < driver.devices; ++i) {
      DeviceState& state = states[static_cast<size_t>(i)];
      driver.check(driver.DeviceGet(&state.device, i), "cuDeviceGet");
      state.gpu = {driver.name(state.device), driver.compute_capability(state.device),
                   driver.version, driver.attribute(state.device, cuda::multiprocessor_count),
                   driver.attribute(state.device, cuda::max_shared_memory_per_block_optin)};
    }
  }
};

DeviceState& state_of(int device) {
  static Devices* const devices = new Devices(cuda::driver());
  cuda::check_fork();
  const auto count = static_cast<int>(devices->states.size());
  if (device < 0 || device >= count)
    throw RuntimeError("no GPU with index " + std::to_string(device) + ": this machine has " +
                       std::to_string(count));
  return devices->states[static_cast<size_t>(device)];
}

cuda::Context primary_context(DeviceState& state) {
  if (cuda::Context context = state.primary.load(std::memory_order_acquire)) return context;
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  if (cuda::Context context = state.primary.load(std::memory_order_relaxed)) return context;
  const cuda::Driver& driver = cuda::driver();
  cuda::Context context = nullptr;
  driver.check(driver.DevicePrimaryCtxRetain(&context, state.device), "cuDevicePrimaryCtxRetain");
  state.primary.store(context, std::memory_order_release);
  return context;
}

/// Loading is allowed while a stream of this thread is being captured, in relaxed mode.
class RelaxedCapture {
public:
  explicit RelaxedCapture(const cuda::Driver& driver) : driver_(driver) {
    driver_.ThreadExchangeStreamCaptureMode(&mode_);
  }
  ~RelaxedCapture() { driver_.ThreadExchangeStreamCaptureMode(&mode_); }

private:
  const cuda::Driver& driver_;
  int mode_ = cuda::capture_relaxed;
};

/// One image in the driver, shared by the GPUs that it serves.
struct LoadedImage {
  std::mutex mutex; // held while it is made, so that it is made once
  bool announced = false;
  cuda::Library library = nullptr;
};

LoadedImage& loaded_image(int row, const std::string& target) {
  static std::mutex mutex;
  static auto* const all = new std::map<std::pair<int, std::string>, std::unique_ptr<LoadedImage>>;
  const std::lock_guard lock(mutex);
  std::unique_ptr<LoadedImage>& image = (*all)[{row, target}];
  if (!image) image = std::make_unique<LoadedImage>();
  return *image;
}

/// Says what the choice costs, once an image and without holding its lock.
void announce(LoadedImage& image, const std::string& text) {
  if (text.empty()) return;
  {
    const std::lock_guard lock(image.mutex);
    if (image.announced) return;
    image.announced = true;
  }
  notice(text);
}

cuda::Library load_into_driver(const std::string& bytes, const Row& row, const Target& target) {
  const cuda::Driver& driver = cuda::driver();
  const std::string what = row.name() + " (" + target.name() + ")";
  cuda::Library library = nullptr;
  driver.check(
      driver.LibraryLoadData(&library, bytes.c_str(), nullptr, nullptr, 0, nullptr, nullptr, 0),
      ("loading kernel " + what).c_str());
  return library;
}

cuda::Library library_of(const Row& row, const Gpu& gpu) {
  const ImageChoice choice = choose_image(row, gpu);
  LoadedImage& image = loaded_image(row.id, choice.target.name());
  announce(image, choice.notice);
  const std::lock_guard lock(image.mutex);
  if (!image.library) image.library = load_into_driver(obtain(choice, row), row, choice.target);
  return image.library;
}

/// Loads every entry of a row on a GPU. Two threads may do it at the same time; both find the same
/// kernels.
void load(const Row& row, DeviceState& state) {
  const cuda::Driver& driver = cuda::driver();
  const RelaxedCapture relaxed(driver);
  const cuda::Library library = library_of(row, state.gpu);
  for (const EntryPoint& entry : entries_of(row.op)) {
    cuda::Kernel kernel = nullptr;
    driver.check(driver.LibraryGetKernel(&kernel, library, entry.symbol), "cuLibraryGetKernel");
    if (entry.id == ANYFLASH_KERNEL)
      driver.check(driver.KernelSetAttribute(cuda::max_dynamic_shared_size_bytes,
                                             row.shared_bytes(), kernel, state.device),
                   "cuKernelSetAttribute");
    cuda::Function loaded_now = nullptr; // the driver loads lazily otherwise, at the first launch
    driver.check(driver.KernelGetFunction(&loaded_now, kernel), "cuKernelGetFunction");
    state.kernels[index_of(row, entry.id)].store(kernel, std::memory_order_release);
  }
}

} // namespace

cuda::Kernel kernel_of(const Row& row, anyflash_entry entry, int device) {
  DeviceState& state = state_of(device);
  const std::atomic<cuda::Kernel>& slot = state.kernels[index_of(row, entry)];
  if (cuda::Kernel kernel = slot.load(std::memory_order_acquire)) return kernel;
  load(row, state);
  return slot.load(std::memory_order_acquire);
}

const Gpu& gpu_at(int device) { return state_of(device).gpu; }

ScopedContext::ScopedContext(int device) : driver_(cuda::driver()) {
  DeviceState& state = state_of(device);
  cuda::Context current = nullptr;
  driver_.check(driver_.CtxGetCurrent(&current), "cuCtxGetCurrent");
  cuda::Device current_device = -1;
  if (current) driver_.check(driver_.CtxGetDevice(&current_device), "cuCtxGetDevice");
  if (current_device == state.device && current) return;
  driver_.check(driver_.CtxPushCurrent(primary_context(state)), "cuCtxPushCurrent");
  pop_ = current || device != 0;
}

ScopedContext::~ScopedContext() {
  cuda::Context popped = nullptr;
  if (pop_) driver_.CtxPopCurrent(&popped);
}

} // namespace anyflash
