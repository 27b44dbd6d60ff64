// Tensors of other libraries as the short way reads and makes them.
#pragma once

#include "anyflash/anyflash.h"
#include "dlpack.h"
#include "python.h"

namespace fast {

/// Interns the names that are looked up in every call. Before anything else here.
void init_tensors();

/// Reads a tensor. keep: what must live until the call is over. False, without an exception, for
/// what the short way does not know.
bool read_tensor(PyObject* object, anyflash_tensor& tensor, Ref& keep);

/// True if this is exactly torch's tensor type; its subclasses are none of the short way's.
bool is_torch_tensor(PyObject* object);

/// True if the tensor's library says that a gradient is wanted by it, or does not say.
bool requires_grad(PyObject* object);

/// A new contiguous tensor of the library and on the device of q (`like`), of its dtype or float32.
/// Null, without an exception, if it could not be made.
Ref make_tensor(PyObject* q, const anyflash_tensor& like, bool as_float32, int ndim,
                const int64_t* shape);

/// The same for a tensor that no user sees: made from its library's own memory by a shorter way.
Ref make_hidden_tensor(PyObject* q, const anyflash_tensor& like, bool as_float32, int ndim,
                       const int64_t* shape);

/// Memory for one call, on a tensor's device and from its library's own allocator: what the library
/// does on its current stream comes before any other use of it.
class Workspace {
public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  ~Workspace();

  /// At least `bytes` bytes on the device of `like`. False, without an exception, if the library of
  /// this object offers no allocator.
  bool allocate(PyObject* object, const anyflash_tensor& like, uint64_t bytes);
  /// Aligned as anyflash_run wants it.
  void* data() const;

private:
  dlpack::ManagedTensorVersioned* managed_ = nullptr;
};

/// The current stream of q's library on a tensor's device; null on the CPU. False, without an
/// exception, if it cannot be known.
bool current_stream(PyObject* q, const anyflash_tensor& tensor, void*& stream);

} // namespace fast
