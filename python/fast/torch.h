// What torch's state asks of a call on its tensors.
#pragma once

#include "python.h"

namespace fast {

/// True if somebody transforms, traces or watches calls now (torch.func, modes, forward
/// differentiation, torch.jit.trace), or if it cannot be known.
bool torch_is_watched();

/// False under torch.no_grad() and torch.inference_mode().
bool torch_grad_enabled();

/// True if autocast is on for the device of q (cuda or not) and would cast one of three tensors.
bool torch_autocast_casts(PyObject* const* qkv, bool on_cuda);

/// torch.use_deterministic_algorithms, as Py_True or Py_False (borrowed).
PyObject* torch_deterministic();

/// (q, k, v, results, options) -> what the user gets, with a gradient function: the function
/// `attach` of anyflash/torch/_autograd.py.
PyObject* torch_attach(PyObject* const* qkv, PyObject* results, PyObject* options);

} // namespace fast
