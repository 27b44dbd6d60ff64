// A function with a stack of its own that can stop in the middle and go on later.
#pragma once

#include <csetjmp>
#include <cstddef>

namespace soft_gpu {

class Fiber {
public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  /// `run` begins at the next resume(); what ran here before is forgotten where it stands.
  void start(void (*run)());
  /// Runs until it stops or ends. Not from inside of a fiber.
  void resume();
  /// Goes back to who resumed the fiber that runs.
  static void stop();

private:
  static void enter();

  static constexpr size_t stack_bytes = 256 << 10;
  char* stack_ = nullptr;
  void (*run_)() = nullptr;
  bool entered_ = false;
  jmp_buf here_;
};

} // namespace soft_gpu
