// Tensors of other libraries as the short way reads and makes them.
#pragma once

#include "anyflash/anyflash.h"
#include "python.h"

namespace fast {

/// Interns the names that are looked up in every call. Before anything else here.
void init_tensors();

/// Reads a tensor. keep: what must live until the call is over. False, without an exception, for
/// what the short way does not know.
bool read_tensor(PyObject* object, anyflash_tensor& tensor, Ref& keep);

/// True if a gradient may be asked for through this tensor.
bool requires_grad(PyObject* object);

/// A new contiguous tensor of the library and on the device of q (`like`), of its dtype or float32.
/// Null, without an exception, if it could not be made.
Ref make_tensor(PyObject* q, const anyflash_tensor& like, bool as_float32, int ndim,
                const int64_t* shape);

/// The current stream of q's library on a tensor's device; null on the CPU. False, without an
/// exception, if it cannot be known.
bool current_stream(PyObject* q, const anyflash_tensor& tensor, void*& stream);

} // namespace fast
