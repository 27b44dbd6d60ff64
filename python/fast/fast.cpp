// anyflash._fast: the short way from a Python call to the library. It reads exact Python types and
// the tensors of libraries that offer DLPack's C functions (torch) or are NumPy's; whatever else it
// meets, an error in the arguments too, it hands to the complete way (anyflash/_call.py), which
// takes the same arguments and has all the words.
#include "python.h"

#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif

#include <algorithm>
#include <array>
#include <cmath>

#include "anyflash/anyflash.h"
#include "tensors.h"

namespace fast {
namespace {

// The library

struct Library {
  decltype(&anyflash_make_plan) make_plan = nullptr;
  decltype(&anyflash_run) run = nullptr;
  decltype(&anyflash_last_error) last_error = nullptr;
  decltype(&anyflash_set_notice_handler) set_notice_handler = nullptr;
};
Library library;
PyObject* complete_forward = nullptr; // _call.forward
PyObject* show_notice = nullptr;      // _library.show_notice

void* open_library(const char* path) {
#if defined(_WIN32)
  return reinterpret_cast<void*>(LoadLibraryA(path));
#else
  return dlopen(path, RTLD_NOW | RTLD_LOCAL);
#endif
}

template <class Function>
bool find(void* handle, const char* name, Function& function) {
#if defined(_WIN32)
  void* symbol = reinterpret_cast<void*>(GetProcAddress(reinterpret_cast<HMODULE>(handle), name));
#else
  void* symbol = dlsym(handle, name);
#endif
  function = reinterpret_cast<Function>(symbol);
  return symbol != nullptr;
}

void on_notice(const char* message, void*) {
  const PyGILState_STATE state = PyGILState_Ensure();
  Ref text(PyUnicode_FromString(message));
  Ref result(text ? PyObject_CallFunctionObjArgs(show_notice, text.get(), nullptr) : nullptr);
  if (!result) PyErr_Clear(); // a notice must not break the call that it is about
  PyGILState_Release(state);
}

PyObject* exception_of(anyflash_status status) {
  switch (status) {
  case ANYFLASH_INVALID_VALUE:
    return PyExc_ValueError;
  case ANYFLASH_INVALID_TYPE:
    return PyExc_TypeError;
  case ANYFLASH_NOT_SUPPORTED:
    return PyExc_NotImplementedError;
  case ANYFLASH_OUT_OF_MEMORY:
    return PyExc_MemoryError;
  default:
    return PyExc_RuntimeError;
  }
}

PyObject* raise(anyflash_status status) {
  PyErr_SetString(exception_of(status), library.last_error());
  return nullptr;
}

// Arguments, in the order of anyflash._call.Arguments

enum Position {
  at_q,
  at_k,
  at_v,
  at_cu_seqlens_q,
  at_cu_seqlens_k,
  at_max_seqlen_q,
  at_max_seqlen_k,
  at_seqused_q,
  at_seqused_k,
  at_causal,
  at_window,
  at_scale,
  at_softcap,
  at_alibi_slopes,
  at_deterministic,
  at_out,
  at_return_lse,
  argument_count,
};

// Each reader is true only for the exact types that it knows.

bool read_flag(PyObject* object, int32_t& flag) {
  flag = object == Py_True;
  return object == Py_True || object == Py_False;
}

bool read_whole(PyObject* object, int64_t& number) {
  if (Py_TYPE(object) != &PyLong_Type) return false; // not bool
  int overflow = 0;
  number = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0 && number >= 0;
}

bool read_real(PyObject* object, float& number) {
  if (Py_TYPE(object) == &PyFloat_Type) {
    number = static_cast<float>(PyFloat_AsDouble(object));
    return true;
  }
  int64_t integer = 0;
  if (!read_whole(object, integer)) return false;
  number = static_cast<float>(integer);
  return true;
}

bool read_side(PyObject* object, int64_t& side) {
  if (object != Py_None) return read_whole(object, side);
  side = -1;
  return true;
}

bool read_window(PyObject* object, anyflash_problem& problem) {
  return Py_TYPE(object) == &PyTuple_Type && PyTuple_Size(object) == 2 &&
         read_side(PyTuple_GetItem(object, 0), problem.window_left) &&
         read_side(PyTuple_GetItem(object, 1), problem.window_right);
}

bool read_scale(PyObject* object, anyflash_problem& problem) {
  if (object != Py_None) return read_real(object, problem.scale);
  const int64_t d = problem.q.shape[problem.q.ndim - 1];
  problem.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(d > 1 ? d : 1)));
  return true;
}

/// One call: the problem, and what keeps its memory alive.
struct Call {
  anyflash_problem problem{};
  std::array<Ref, 10> kept;
  size_t kept_count = 0;
  int32_t return_lse = 0;

  bool read(PyObject* object, anyflash_tensor& tensor) {
    return read_tensor(object, tensor, kept[kept_count++]);
  }
  bool read_optional(PyObject* object, anyflash_tensor& tensor) {
    return object == Py_None || read(object, tensor);
  }

  bool read_arguments(PyObject* const* arguments);
  bool make_outputs(PyObject* const* arguments, Ref& o, Ref& lse);
};

bool Call::read_arguments(PyObject* const* arguments) {
  anyflash_problem& p = problem;
  p.struct_size = sizeof p;
  p.op = ANYFLASH_FORWARD;
  PyObject* deterministic = arguments[at_deterministic];
  for (const Position at : {at_q, at_k, at_v})
    if (requires_grad(arguments[at])) return false;
  for (const Position at : {at_alibi_slopes, at_out})
    if (arguments[at] != Py_None && requires_grad(arguments[at])) return false;
  return read(arguments[at_q], p.q) && read(arguments[at_k], p.k) && read(arguments[at_v], p.v) &&
         read_optional(arguments[at_cu_seqlens_q], p.cu_seqlens_q) &&
         read_optional(arguments[at_cu_seqlens_k], p.cu_seqlens_k) &&
         read_optional(arguments[at_seqused_q], p.seqused_q) &&
         read_optional(arguments[at_seqused_k], p.seqused_k) &&
         read_optional(arguments[at_alibi_slopes], p.alibi_slopes) &&
         read_optional(arguments[at_out], p.o) &&
         read_whole(arguments[at_max_seqlen_q], p.max_seqlen_q) &&
         read_whole(arguments[at_max_seqlen_k], p.max_seqlen_k) &&
         read_flag(arguments[at_causal], p.causal) && read_window(arguments[at_window], p) &&
         read_scale(arguments[at_scale], p) && read_real(arguments[at_softcap], p.softcap) &&
         (deterministic == Py_None || read_flag(deterministic, p.deterministic)) &&
         read_flag(arguments[at_return_lse], return_lse);
}

/// o and, where wanted, L. The shapes follow q and v; if those do not fit together the library says
/// so before anything is written.
bool Call::make_outputs(PyObject* const* arguments, Ref& o, Ref& lse) {
  const anyflash_tensor& q = problem.q;
  if (q.ndim < 3 || problem.v.ndim != q.ndim || q.dtype > ANYFLASH_FLOAT32) return false;
  if (arguments[at_out] == Py_None) {
    std::array<int64_t, 4> shape;
    std::copy(q.shape, q.shape + q.ndim, shape.begin());
    shape[q.ndim - 1] = problem.v.shape[q.ndim - 1];
    o = make_tensor(arguments[at_q], q, false, q.ndim, shape.data());
    if (!o || !read(o.get(), problem.o)) return false;
  } else {
    o = Ref(Py_NewRef(arguments[at_out]));
  }
  if (!return_lse) return true;
  // [B, H, N], or [H, total_q]
  std::array<int64_t, 3> shape = {q.shape[0], q.shape[2], q.shape[1]};
  if (q.ndim == 3) shape = {q.shape[1], q.shape[0], 0};
  lse = make_tensor(arguments[at_q], q, true, q.ndim - 1, shape.data());
  return lse && read(lse.get(), problem.lse);
}

PyObject* complete(PyObject* const* arguments) {
  Ref all(PyTuple_New(argument_count));
  if (!all) return nullptr;
  for (int i = 0; i < argument_count; ++i) PyTuple_SetItem(all.get(), i, Py_NewRef(arguments[i]));
  return PyObject_CallObject(complete_forward, all.get());
}

PyObject* forward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != argument_count) {
    PyErr_Format(PyExc_TypeError, "forward takes %d arguments, %zd were given", argument_count,
                 count);
    return nullptr;
  }
  if (!complete_forward) {
    PyErr_SetString(PyExc_RuntimeError, "anyflash._fast is not bound to the library");
    return nullptr;
  }
  Call call;
  Ref o, lse;
  void* stream = nullptr;
  if (!call.read_arguments(arguments) || !call.make_outputs(arguments, o, lse) ||
      !current_stream(arguments[at_q], call.problem.q, stream))
    return complete(arguments);

  anyflash_plan plan;
  plan.struct_size = sizeof plan;
  anyflash_status status = library.make_plan(&call.problem, nullptr, &plan);
  if (status != ANYFLASH_OK) return raise(status);
  if (plan.workspace_bytes > 0) return complete(arguments);

  PyThreadState* thread = PyEval_SaveThread();
  status = library.run(&plan, &call.problem, nullptr, stream);
  PyEval_RestoreThread(thread);
  if (status != ANYFLASH_OK) return raise(status);
  return lse ? PyTuple_Pack(2, o.get(), lse.get()) : o.release();
}

PyObject* bind(PyObject*, PyObject* arguments) {
  const char* path = nullptr;
  PyObject *fallback = nullptr, *notice = nullptr;
  if (!PyArg_ParseTuple(arguments, "sOO", &path, &fallback, &notice)) return nullptr;
  void* handle = open_library(path);
  Library found;
  if (!handle || !find(handle, "anyflash_make_plan", found.make_plan) ||
      !find(handle, "anyflash_run", found.run) ||
      !find(handle, "anyflash_last_error", found.last_error) ||
      !find(handle, "anyflash_set_notice_handler", found.set_notice_handler)) {
    PyErr_Format(PyExc_RuntimeError, "%s does not load as libanyflash", path);
    return nullptr;
  }
  library = found;
  complete_forward = Py_NewRef(fallback);
  show_notice = Py_NewRef(notice);
  library.set_notice_handler(on_notice, nullptr);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"forward", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(forward)), METH_FASTCALL,
     "O, or (O, L); the arguments of anyflash._call.Arguments by position."},
    {"bind", bind, METH_VARARGS,
     "bind(path, forward, show_notice): loads libanyflash; forward computes what this module does "
     "not know."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "anyflash._fast",
    "The short way from a Python call to libanyflash.",
    -1,
    methods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

} // namespace
} // namespace fast

PyMODINIT_FUNC PyInit__fast() {
  fast::init_tensors();
  return PyModule_Create(&fast::module);
}
