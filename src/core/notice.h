// Notices to the user: one line before something slow and unexpected. The library never prints.
#pragma once

#include <string>

#include "anyflash/anyflash.h"

namespace anyflash {

/// Who receives notices; null: nobody.
void set_notice_handler(anyflash_notice_handler handler, void* context);

/// Tells the handler, on this thread. Call it without holding a lock: the handler may wait for a
/// lock of its own (Python's).
void notice(const std::string& message);

} // namespace anyflash
