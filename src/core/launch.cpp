// No GPU launch yet: every request is refused.
#include "core/launch.h"

#include "core/error.h"

namespace anyflash {

void launch(const anyflash_plan&, const Problem&, void*, void*) {
  throw RuntimeError("this build cannot launch on a GPU");
}
void warm_up(const anyflash_plan&) { throw RuntimeError("this build cannot launch on a GPU"); }
anyflash_device get_gpu(int) { throw RuntimeError("this build cannot open the CUDA driver"); }

} // namespace anyflash
