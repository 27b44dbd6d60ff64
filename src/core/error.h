// Exceptions inside the library; api.cpp turns them into a status and a message.
#pragma once

#include <stdexcept>
#include <string>

#include "anyflash/anyflash.h"

namespace anyflash {

/// Base of all errors: a status for the C interface and one clear sentence with the offending
/// values.
class Error : public std::runtime_error {
public:
  Error(anyflash_status status, const std::string& message)
      : std::runtime_error(message), status_(status) {}
  anyflash_status status() const { return status_; }

private:
  anyflash_status status_;
};

/// A value or a shape that makes no sense.
struct InvalidValue : Error {
  explicit InvalidValue(const std::string& message) : Error(ANYFLASH_INVALID_VALUE, message) {}
};

/// dtypes or devices that do not go together.
struct InvalidType : Error {
  explicit InvalidType(const std::string& message) : Error(ANYFLASH_INVALID_TYPE, message) {}
};

/// Understood but not available: the message says what was asked, what is available and what is
/// missing.
struct NotSupported : Error {
  explicit NotSupported(const std::string& message) : Error(ANYFLASH_NOT_SUPPORTED, message) {}
};

/// The driver, the compiler or the operating system refused.
struct RuntimeError : Error {
  explicit RuntimeError(const std::string& message) : Error(ANYFLASH_RUNTIME_ERROR, message) {}
};

} // namespace anyflash
