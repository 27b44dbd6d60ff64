#include "fiber.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <new>

namespace soft_gpu {
namespace {

thread_local Fiber* running = nullptr;
thread_local jmp_buf resumer;

} // namespace

Fiber::~Fiber() {
  if (stack_) munmap(stack_, stack_bytes);
}

void Fiber::start(void (*run)()) {
  if (!stack_) {
    void* const memory = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, 4096, PROT_NONE); // an overflow is a crash, not another fiber's data
    stack_ = static_cast<char*>(memory);
  }
  run_ = run;
  entered_ = false;
}

void Fiber::enter() {
  running->run_();
  _longjmp(resumer, 1);
}

// makecontext gives the stack; afterwards jumps do, which cost no system call.
void Fiber::resume() {
  running = this;
  if (_setjmp(resumer) != 0) return;
  if (entered_) _longjmp(here_, 1);
  entered_ = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack_;
  context.uc_stack.ss_size = stack_bytes;
  context.uc_link = nullptr;
  makecontext(&context, enter, 0);
  setcontext(&context);
}

void Fiber::stop() {
  Fiber* const self = running;
  if (_setjmp(self->here_) == 0) _longjmp(resumer, 1);
}

} // namespace soft_gpu
