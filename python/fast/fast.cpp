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
#include "torch.h"

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
PyObject* show_notice = nullptr; // _library.show_notice

/// The complete ways, in anyflash._call.
struct Complete {
  PyObject *forward = nullptr, *compute = nullptr, *backward = nullptr, *compute_backward = nullptr;
};
Complete complete;

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
  { // objects end before the lock is given back
    Ref text(PyUnicode_FromString(message));
    Ref result(text ? PyObject_CallFunctionObjArgs(show_notice, text.get(), nullptr) : nullptr);
    if (!result) PyErr_Clear(); // a notice must not break the call that it is about
  }
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

// Arguments. The options stand in the order of anyflash._call.Options.

enum Option {
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
  option_count,
};

/// anyflash._call.Arguments
namespace forward_at {
constexpr int q = 0, options = 3, out = options + option_count, return_lse = out + 1,
              count = return_lse + 1; // q, k, v come first
}

/// anyflash._call.BackwardArguments
namespace backward_at {
constexpr int dout = 0, q = 1, out = 4, lse = 5, dlse = 6, options = 7, dq = options + option_count,
              count = dq + 3; // q, k, v; dq, dk, dv
}

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
  std::array<Ref, 18> kept;
  size_t kept_count = 0;

  explicit Call(anyflash_op op) {
    problem.struct_size = sizeof problem;
    problem.op = op;
  }
  bool read(PyObject* object, anyflash_tensor& tensor) {
    return read_tensor(object, tensor, kept[kept_count++]);
  }
  bool read_optional(PyObject* object, anyflash_tensor& tensor) {
    return object == Py_None || read(object, tensor);
  }
  bool read_inputs(PyObject* const* qkv, PyObject* const* options);
  Ref make(PyObject* like_object, const anyflash_tensor& like, anyflash_tensor& tensor);
  bool make_o(PyObject* q, Ref& o);
  bool make_lse(PyObject* q, bool hidden, Ref& lse);
};

bool Call::read_inputs(PyObject* const* qkv, PyObject* const* options) {
  anyflash_problem& p = problem;
  PyObject* deterministic = options[at_deterministic];
  return read(qkv[0], p.q) && read(qkv[1], p.k) && read(qkv[2], p.v) &&
         read_optional(options[at_cu_seqlens_q], p.cu_seqlens_q) &&
         read_optional(options[at_cu_seqlens_k], p.cu_seqlens_k) &&
         read_optional(options[at_seqused_q], p.seqused_q) &&
         read_optional(options[at_seqused_k], p.seqused_k) &&
         read_optional(options[at_alibi_slopes], p.alibi_slopes) &&
         read_whole(options[at_max_seqlen_q], p.max_seqlen_q) &&
         read_whole(options[at_max_seqlen_k], p.max_seqlen_k) &&
         read_flag(options[at_causal], p.causal) && read_window(options[at_window], p) &&
         read_scale(options[at_scale], p) && read_real(options[at_softcap], p.softcap) &&
         (deterministic == Py_None || read_flag(deterministic, p.deterministic)) && p.q.ndim >= 3 &&
         p.v.ndim == p.q.ndim && p.q.dtype <= ANYFLASH_FLOAT32;
}

/// O: q's shape with v's head dim. If q and v do not fit together the library says so before
/// anything is written.
bool Call::make_o(PyObject* q, Ref& o) {
  std::array<int64_t, 4> shape;
  std::copy(problem.q.shape, problem.q.shape + problem.q.ndim, shape.begin());
  shape[problem.q.ndim - 1] = problem.v.shape[problem.q.ndim - 1];
  o = make_tensor(q, problem.q, false, problem.q.ndim, shape.data());
  return o && read(o.get(), problem.o);
}

/// L: [B, H, N], or [H, total_q]. hidden: only the backward will read it.
bool Call::make_lse(PyObject* q, bool hidden, Ref& lse) {
  const int64_t* size = problem.q.shape;
  std::array<int64_t, 3> shape = {size[0], size[2], size[1]};
  if (problem.q.ndim == 3) shape = {size[1], size[0], 0};
  const auto make = hidden ? make_hidden_tensor : make_tensor;
  lse = make(q, problem.q, true, problem.q.ndim - 1, shape.data());
  return lse && read(lse.get(), problem.lse);
}

/// A gradient, shaped like its primal.
Ref Call::make(PyObject* like_object, const anyflash_tensor& like, anyflash_tensor& tensor) {
  Ref made = make_tensor(like_object, like, false, like.ndim, like.shape);
  return made && read(made.get(), tensor) ? static_cast<Ref&&>(made) : Ref();
}

enum class Outcome { done, raised, unknown }; // unknown: the complete way has to take this call

/// Plans and runs on the current stream of q's library.
Outcome run(const anyflash_problem& problem, PyObject* q) {
  anyflash_plan plan;
  plan.struct_size = sizeof plan;
  anyflash_status status = library.make_plan(&problem, nullptr, &plan);
  if (status != ANYFLASH_OK) return raise(status), Outcome::raised;
  Workspace workspace;
  void* stream = nullptr;
  if (plan.workspace_bytes > 0 && !workspace.allocate(q, problem.q, plan.workspace_bytes))
    return Outcome::unknown;
  if (!current_stream(q, problem.q, stream)) return Outcome::unknown;

  PyThreadState* thread = PyEval_SaveThread();
  status = library.run(&plan, &problem, workspace.data(), stream);
  PyEval_RestoreThread(thread);
  if (status != ANYFLASH_OK) return raise(status), Outcome::raised;
  return Outcome::done;
}

PyObject* hand_over(PyObject* function, PyObject* const* arguments, Py_ssize_t count) {
  Ref all(PyTuple_New(count));
  if (!all) return nullptr;
  for (Py_ssize_t i = 0; i < count; ++i) PyTuple_SetItem(all.get(), i, Py_NewRef(arguments[i]));
  return PyObject_CallObject(function, all.get());
}

bool check_call(const char* name, Py_ssize_t count, Py_ssize_t wanted) {
  if (count != wanted)
    PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, %zd were given", name, wanted, count);
  else if (!complete.forward)
    PyErr_SetString(PyExc_RuntimeError, "anyflash._fast is not bound to the library");
  else
    return true;
  return false;
}

// The forward

/// What `forward` looks at, and `compute` does not.
struct Watch {
  bool gradient = false; // L is needed in any case
  bool autocast = false;
};

/// Computes O and, where wanted, L.
Outcome compute_forward(PyObject* const* arguments, Watch watch, Ref& o, Ref& lse) {
  Call call(ANYFLASH_FORWARD);
  PyObject *q = arguments[forward_at::q], *out = arguments[forward_at::out];
  int32_t return_lse = 0;
  if (!call.read_inputs(arguments, arguments + forward_at::options) ||
      !read_flag(arguments[forward_at::return_lse], return_lse))
    return Outcome::unknown;
  const bool on_cuda = call.problem.q.device_type == ANYFLASH_CUDA;
  if (watch.autocast && is_torch_tensor(q) && torch_autocast_casts(arguments, on_cuda))
    return Outcome::unknown;
  if (out == Py_None) {
    if (!call.make_o(q, o)) return Outcome::unknown;
  } else {
    if (!call.read(out, call.problem.o)) return Outcome::unknown;
    o = Ref(Py_NewRef(out));
  }
  if ((return_lse || watch.gradient) && !call.make_lse(q, !return_lse, lse))
    return Outcome::unknown;
  return run(call.problem, q);
}

PyObject* compute(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!check_call("compute", count, forward_at::count)) return nullptr;
  Ref o, lse;
  const Outcome outcome = compute_forward(arguments, {}, o, lse);
  if (outcome == Outcome::unknown) return hand_over(complete.compute, arguments, count);
  if (outcome == Outcome::raised) return nullptr;
  return lse ? PyTuple_Pack(2, o.get(), lse.get()) : o.release();
}

/// Computes, and gives the result a gradient function.
PyObject* with_gradient(PyObject* const* arguments, Ref& o, Ref& lse) {
  const bool return_lse = arguments[forward_at::return_lse] == Py_True;
  Ref results(PyTuple_Pack(3, o.get(), lse.get(), return_lse ? Py_True : Py_False));
  Ref options(PyTuple_New(option_count));
  if (!results || !options) return nullptr;
  for (int i = 0; i < option_count; ++i) {
    PyObject* option = arguments[forward_at::options + i];
    if (i == at_deterministic && option == Py_None) option = torch_deterministic();
    PyTuple_SetItem(options.get(), i, Py_NewRef(option));
  }
  return torch_attach(arguments, results.get(), options.get());
}

bool any_requires_grad(PyObject* const* tensors, int count) {
  for (int i = 0; i < count; ++i)
    if (tensors[i] != Py_None && requires_grad(tensors[i])) return true;
  return false;
}

enum class Way { direct, gradient, complete };

Way way_of_forward(PyObject* const* arguments) {
  PyObject* const* qkv = arguments;
  PyObject* other[] = {arguments[forward_at::options + at_alibi_slopes],
                       arguments[forward_at::out]};
  if (!is_torch_tensor(qkv[0]))
    return any_requires_grad(qkv, 3) || any_requires_grad(other, 2) ? Way::complete : Way::direct;
  if (torch_is_watched()) return Way::complete;
  if (!torch_grad_enabled()) return Way::direct;
  if (any_requires_grad(other, 2)) return Way::complete; // which refuses
  if (!any_requires_grad(qkv, 3)) return Way::direct;
  return other[1] == Py_None ? Way::gradient : Way::complete;
}

PyObject* forward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!check_call("forward", count, forward_at::count)) return nullptr;
  const Way way = way_of_forward(arguments);
  Outcome outcome = Outcome::unknown;
  Ref o, lse;
  if (way != Way::complete)
    outcome = compute_forward(arguments, {way == Way::gradient, true}, o, lse);
  if (outcome == Outcome::unknown) return hand_over(complete.forward, arguments, count);
  if (outcome == Outcome::raised) return nullptr;
  if (way == Way::gradient) return with_gradient(arguments, o, lse);
  return lse ? PyTuple_Pack(2, o.get(), lse.get()) : o.release();
}

// The backward

Outcome compute_gradients(PyObject* const* arguments, std::array<Ref, 3>& gradients) {
  Call call(ANYFLASH_BACKWARD);
  anyflash_problem& p = call.problem;
  PyObject* const* qkv = arguments + backward_at::q;
  PyObject* const* options = arguments + backward_at::options;
  if (!call.read_inputs(qkv, options) || !call.read(arguments[backward_at::dout], p.dout) ||
      !call.read(arguments[backward_at::out], p.o) ||
      !call.read(arguments[backward_at::lse], p.lse) ||
      !call.read_optional(arguments[backward_at::dlse], p.dlse))
    return Outcome::unknown;
  if (options[at_deterministic] == Py_None && is_torch_tensor(qkv[0]))
    p.deterministic = torch_deterministic() == Py_True;
  const std::array<const anyflash_tensor*, 3> like = {&p.q, &p.k, &p.v};
  const std::array<anyflash_tensor*, 3> wanted = {&p.dq, &p.dk, &p.dv};
  for (size_t i = 0; i < 3; ++i) {
    PyObject* given = arguments[backward_at::dq + static_cast<int>(i)];
    if (given == Py_None)
      gradients[i] = call.make(qkv[i], *like[i], *wanted[i]);
    else if (call.read(given, *wanted[i]))
      gradients[i] = Ref(Py_NewRef(given));
    if (!gradients[i]) return Outcome::unknown;
  }
  return run(p, qkv[0]);
}

PyObject* finish_backward(PyObject* const* arguments, PyObject* complete_way) {
  std::array<Ref, 3> gradients;
  const Outcome outcome = compute_gradients(arguments, gradients);
  if (outcome == Outcome::unknown) return hand_over(complete_way, arguments, backward_at::count);
  if (outcome == Outcome::raised) return nullptr;
  return PyTuple_Pack(3, gradients[0].get(), gradients[1].get(), gradients[2].get());
}

PyObject* compute_backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!check_call("compute_backward", count, backward_at::count)) return nullptr;
  return finish_backward(arguments, complete.compute_backward);
}

/// True if only the complete way can take this backward, or refuse it.
bool needs_complete_backward(PyObject* const* arguments) {
  const bool torch = is_torch_tensor(arguments[backward_at::q]);
  if (torch && torch_is_watched()) return true;
  if (torch && !torch_grad_enabled()) return false;
  return any_requires_grad(arguments + backward_at::dout, 7) ||
         any_requires_grad(arguments + backward_at::options + at_alibi_slopes, 1);
}

PyObject* backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (!check_call("backward", count, backward_at::count)) return nullptr;
  if (needs_complete_backward(arguments)) return hand_over(complete.backward, arguments, count);
  return finish_backward(arguments, complete.backward);
}

PyObject* bind(PyObject*, PyObject* arguments) {
  const char* path = nullptr;
  PyObject* notice = nullptr;
  Complete ways;
  if (!PyArg_ParseTuple(arguments, "sOOOOO", &path, &ways.forward, &ways.compute, &ways.backward,
                        &ways.compute_backward, &notice))
    return nullptr;
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
  for (PyObject* way : {ways.forward, ways.compute, ways.backward, ways.compute_backward})
    Py_INCREF(way);
  complete = ways;
  show_notice = Py_NewRef(notice);
  library.set_notice_handler(on_notice, nullptr);
  Py_RETURN_NONE;
}

PyCFunction fastcall(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"forward", fastcall(forward), METH_FASTCALL,
     "O, or (O, L), with gradients; arguments by position, as anyflash._call says."},
    {"compute", fastcall(compute), METH_FASTCALL, "The same of plain memory, without gradients."},
    {"backward", fastcall(backward), METH_FASTCALL,
     "(dQ, dK, dV); arguments by position, as anyflash._call says."},
    {"compute_backward", fastcall(compute_backward), METH_FASTCALL, "The same of plain memory."},
    {"bind", bind, METH_VARARGS,
     "bind(path, forward, compute, backward, compute_backward, show_notice): loads libanyflash; "
     "the functions compute what this module does not know."},
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
