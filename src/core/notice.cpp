#include "core/notice.h"

#include <mutex>

namespace anyflash {
namespace {

struct Handler {
  anyflash_notice_handler function = nullptr;
  void* context = nullptr;
};

std::mutex mutex;
Handler current;

} // namespace

void set_notice_handler(anyflash_notice_handler handler, void* context) {
  const std::lock_guard lock(mutex);
  current = {handler, context};
}

void notice(const std::string& message) {
  Handler handler;
  {
    const std::lock_guard lock(mutex);
    handler = current;
  }
  if (handler.function) handler.function(message.c_str(), handler.context);
}

} // namespace anyflash
