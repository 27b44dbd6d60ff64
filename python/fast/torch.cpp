#include "torch.h"

namespace fast {
namespace {

/// Functions of torch, each without arguments unless it says so; found once.
struct Torch {
  bool searched = false, complete = false;
  PyObject *functorch, *dispatch_modes, *function_modes, *tracing_state;
  PyObject *grad_enabled, *deterministic;
  PyObject *autocast_enabled, *autocast_dtype; // (device)
  PyObject *cuda, *cpu;                        // names of devices
  PyObject *forward_ad, *current_level;        // a module, and the name of its variable
  PyObject* dtype;
  PyObject* attach;
};
Torch torch;

PyObject* attribute(const char* module, const char* name) {
  Ref found(PyImport_ImportModule(module));
  PyObject* value = found ? PyObject_GetAttrString(found.get(), name) : nullptr;
  torch.complete = torch.complete && value;
  return value;
}

/// False if this torch lacks something: then every call takes the complete way.
bool find_torch() {
  if (torch.searched) return torch.complete;
  torch.searched = torch.complete = true;
  torch.functorch = attribute("torch._C", "_are_functorch_transforms_active");
  torch.dispatch_modes = attribute("torch._C", "_len_torch_dispatch_stack");
  torch.function_modes = attribute("torch._C", "_len_torch_function_stack");
  torch.tracing_state = attribute("torch._C", "_get_tracing_state");
  torch.grad_enabled = attribute("torch._C", "is_grad_enabled");
  torch.deterministic = attribute("torch._C", "_get_deterministic_algorithms");
  torch.autocast_enabled = attribute("torch", "is_autocast_enabled");
  torch.autocast_dtype = attribute("torch", "get_autocast_dtype");
  torch.cuda = PyUnicode_InternFromString("cuda");
  torch.cpu = PyUnicode_InternFromString("cpu");
  torch.forward_ad = PyImport_ImportModule("torch.autograd.forward_ad");
  torch.current_level = PyUnicode_InternFromString("_current_level");
  torch.dtype = PyUnicode_InternFromString("dtype");
  torch.attach = attribute("anyflash.torch._autograd", "attach");
  torch.complete = torch.complete && torch.cuda && torch.cpu && torch.forward_ad &&
                   torch.current_level && torch.dtype;
  PyErr_Clear();
  return torch.complete;
}

/// True if the function returned anything but False, 0 and None.
bool says_yes(PyObject* function) {
  Ref answer(PyObject_CallNoArgs(function));
  if (answer.get() == Py_False || answer.get() == Py_None) return false;
  const bool is_zero =
      answer && Py_TYPE(answer.get()) == &PyLong_Type && PyLong_AsLong(answer.get()) == 0;
  PyErr_Clear();
  return !is_zero;
}

bool inside_forward_ad() {
  Ref level(PyObject_GetAttr(torch.forward_ad, torch.current_level));
  const bool outside = level && PyLong_AsLong(level.get()) < 0;
  PyErr_Clear();
  return !outside;
}

} // namespace

bool torch_is_watched() {
  return !find_torch() || says_yes(torch.functorch) || says_yes(torch.dispatch_modes) ||
         says_yes(torch.function_modes) || says_yes(torch.tracing_state) || inside_forward_ad();
}

bool torch_grad_enabled() { return !find_torch() || says_yes(torch.grad_enabled); }

bool torch_autocast_casts(PyObject* const* qkv, bool on_cuda) {
  if (!find_torch()) return true;
  PyObject* device = on_cuda ? torch.cuda : torch.cpu;
  // Without an argument it is CUDA's, and three times as fast.
  Ref enabled(on_cuda ? PyObject_CallNoArgs(torch.autocast_enabled)
                      : PyObject_CallFunctionObjArgs(torch.autocast_enabled, device, nullptr));
  if (enabled.get() == Py_False) return false;
  Ref wanted(PyObject_CallFunctionObjArgs(torch.autocast_dtype, device, nullptr));
  bool all_have_it = static_cast<bool>(wanted);
  for (int i = 0; i < 3 && all_have_it; ++i) {
    Ref dtype(PyObject_GetAttr(qkv[i], torch.dtype));
    all_have_it = dtype.get() == wanted.get();
  }
  PyErr_Clear();
  return !all_have_it;
}

PyObject* torch_deterministic() {
  return find_torch() && says_yes(torch.deterministic) ? Py_True : Py_False;
}

PyObject* torch_attach(PyObject* const* qkv, PyObject* results, PyObject* options) {
  return PyObject_CallFunctionObjArgs(torch.attach, qkv[0], qkv[1], qkv[2], results, options,
                                      nullptr);
}

} // namespace fast
