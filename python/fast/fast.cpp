// anyflash._fast: the short way from a Python call to the library. It reads exact Python types and
// the tensors of libraries that offer DLPack's C functions (torch) or are NumPy's; whatever else it
// meets, an error in the arguments too, it hands to the complete way (anyflash/_call.py), which
// takes the same arguments and has all the words.
//
// Limited API of Python 3.10: one binary for every later version.
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif

#include <array>
#include <cmath>
#include <cstring>
#include <optional>

#include "anyflash/anyflash.h"
#include "dlpack.h"

namespace {

// Python objects

/// An owned reference.
class Ref {
public:
  Ref() = default;
  explicit Ref(PyObject* owned) : object_(owned) {}
  Ref(Ref&& other) noexcept : object_(other.release()) {}
  Ref& operator=(Ref&& other) noexcept {
    PyObject* old = object_;
    object_ = other.release();
    Py_XDECREF(old);
    return *this;
  }
  ~Ref() { Py_XDECREF(object_); }

  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* object = object_;
    object_ = nullptr;
    return object;
  }
  explicit operator bool() const { return object_ != nullptr; }

private:
  PyObject* object_ = nullptr;
};

/// Names and objects that live as long as the process.
struct Constants {
  PyObject *dlpack, *dtype, *requires_grad, *new_empty, *exchange_api, *dict, *module, *name;
};
Constants constants;

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

// Tensors

/// How the tensors of one Python type are read and made.
struct TensorType {
  PyTypeObject* type = nullptr; // owned, for ever
  const dlpack::ExchangeApi* api = nullptr;
  PyObject* numpy_empty = nullptr; // for NumPy's arrays
  PyObject* float32 = nullptr;     // the library's name of that dtype; torch's as {"dtype": ...}
  PyObject* empty_like = nullptr;  // torch's own ways, beside tensor.new_empty(shape)
  bool has_grad = false;

  bool known() const { return api || numpy_empty; }
};

/// NumPy's own array type: read through __dlpack__, made by numpy.empty.
bool is_numpy_array(PyObject* type) {
  Ref module(PyObject_GetAttr(type, constants.module));
  Ref name(PyObject_GetAttr(type, constants.name));
  return module && name && PyUnicode_Check(module.get()) && PyUnicode_Check(name.get()) &&
         PyUnicode_CompareWithASCIIString(module.get(), "numpy") == 0 &&
         PyUnicode_CompareWithASCIIString(name.get(), "ndarray") == 0;
}

/// The C functions that the type itself offers. Those of a base class do not count: what a subclass
/// changes (a tensor that is only traced, say) they would not see.
const dlpack::ExchangeApi* exchange_api_of(PyObject* type) {
  Ref dict(PyObject_GetAttr(type, constants.dict));
  if (!dict) return nullptr;
  Ref own(PyObject_GetItem(dict.get(), constants.exchange_api));
  if (!own) return nullptr;
  Ref capsule(PyObject_GetAttr(type, constants.exchange_api));
  if (!capsule || !PyCapsule_IsValid(capsule.get(), "dlpack_exchange_api")) return nullptr;
  auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.get(), "dlpack_exchange_api"));
  while (api && api->version.major > 1) api = api->older;
  return api && api->version.major == 1 && api->tensor_from_object ? api : nullptr;
}

/// torch makes its tensors itself: what DLPack's allocator makes is memory that torch does not know
/// as its own (record_stream, for one, would do nothing).
void find_new_empty(PyObject* type, TensorType& result) {
  Ref name(PyObject_GetAttr(type, constants.module));
  Ref module(name ? PyImport_Import(name.get()) : nullptr);
  Ref float32(module ? PyObject_GetAttrString(module.get(), "float32") : nullptr);
  if (!float32) return;
  result.float32 = Py_BuildValue("{s:O}", "dtype", float32.get());
  if (result.float32) result.empty_like = PyObject_GetAttrString(module.get(), "empty_like");
}

TensorType inspect(PyTypeObject* type) {
  auto* object = reinterpret_cast<PyObject*>(type);
  TensorType result;
  Py_INCREF(object);
  result.type = type;
  if (is_numpy_array(object)) {
    Ref numpy(PyImport_ImportModule("numpy"));
    if (numpy) {
      result.float32 = PyObject_GetAttrString(numpy.get(), "float32");
      result.numpy_empty = PyObject_GetAttrString(numpy.get(), "empty");
    }
  } else {
    result.api = exchange_api_of(object);
    result.has_grad = PyObject_HasAttr(object, constants.requires_grad);
    if (result.api && PyObject_HasAttr(object, constants.new_empty)) find_new_empty(object, result);
  }
  PyErr_Clear();
  return result;
}

/// What is known about the type of this object; the GIL guards the list.
const TensorType& tensor_type_of(PyObject* object) {
  static std::array<TensorType, 8> types;
  static size_t next = 0;
  PyTypeObject* type = Py_TYPE(object);
  for (const TensorType& known : types)
    if (known.type == type) return known;
  TensorType& slot = types[next++ % types.size()]; // programs use one or two types
  Py_XDECREF(reinterpret_cast<PyObject*>(slot.type));
  slot = inspect(type);
  return slot;
}

int32_t dtype_of(dlpack::DataType dtype) {
  if (dtype.lanes != 1) return 0;
  if (dtype.code == dlpack::code_bfloat && dtype.bits == 16) return ANYFLASH_BFLOAT16;
  if (dtype.code == dlpack::code_int && dtype.bits == 32) return ANYFLASH_INT32;
  if (dtype.code != dlpack::code_float) return 0;
  return dtype.bits == 16   ? ANYFLASH_FLOAT16
         : dtype.bits == 32 ? ANYFLASH_FLOAT32
         : dtype.bits == 64 ? ANYFLASH_FLOAT64
                            : 0;
}

/// False for what the short way does not know.
bool convert(const dlpack::Tensor& from, anyflash_tensor& to) {
  to.dtype = dtype_of(from.dtype);
  if (to.dtype == 0 || from.ndim < 1 || from.ndim > 4) return false;
  if (from.device.type != dlpack::cpu && from.device.type != dlpack::cuda) return false;
  to.data = static_cast<char*>(from.data) + from.byte_offset;
  to.device_type = from.device.type;
  to.device_index = from.device.id;
  to.ndim = from.ndim;
  int64_t stride = 1;
  for (int dim = from.ndim - 1; dim >= 0; --dim) {
    to.shape[dim] = from.shape[dim];
    to.strides[dim] = from.strides ? from.strides[dim] : stride;
    stride *= from.shape[dim];
  }
  return true;
}

/// Reads a tensor. keep: what must live until the call is over. False, without an exception, for
/// what the short way does not know.
bool read(PyObject* object, anyflash_tensor& tensor, Ref& keep) {
  const TensorType& type = tensor_type_of(object);
  if (type.api) {
    dlpack::Tensor view;
    if (type.api->tensor_from_object(object, &view) == 0) return convert(view, tensor);
  } else if (type.numpy_empty) {
    // Refuses read-only arrays and dtypes of others (bfloat16): the complete way takes those.
    keep = Ref(PyObject_CallMethodObjArgs(object, constants.dlpack, nullptr));
    if (keep) {
      void* managed = PyCapsule_GetPointer(keep.get(), "dltensor");
      if (managed) return convert(static_cast<dlpack::ManagedTensor*>(managed)->tensor, tensor);
    }
  }
  PyErr_Clear();
  return false;
}

/// True if a gradient may be asked for through this tensor.
bool requires_grad(PyObject* object) {
  if (!tensor_type_of(object).has_grad) return false;
  Ref value(PyObject_GetAttr(object, constants.requires_grad));
  if (value.get() == Py_False) return false;
  PyErr_Clear();
  return true;
}

Ref tuple_of(int ndim, const int64_t* values) {
  Ref tuple(PyTuple_New(ndim));
  for (int i = 0; tuple && i < ndim; ++i)
    PyTuple_SetItem(tuple.get(), i, PyLong_FromLongLong(values[i]));
  return tuple;
}

void ignore_error(void*, const char*, const char*) {}

Ref make_by_dlpack(const TensorType& type, const anyflash_tensor& like, bool as_float32, int ndim,
                   const int64_t* shape) {
  dlpack::Tensor prototype{};
  std::array<int64_t, 4> sizes{};
  std::copy(shape, shape + ndim, sizes.begin());
  prototype.device = {like.device_type, like.device_index};
  prototype.ndim = ndim;
  prototype.shape = sizes.data();
  const bool is_bfloat = like.dtype == ANYFLASH_BFLOAT16 && !as_float32;
  const bool is_wide = like.dtype == ANYFLASH_FLOAT32 || as_float32;
  prototype.dtype = {is_bfloat ? dlpack::code_bfloat : dlpack::code_float,
                     static_cast<uint8_t>(is_wide ? 32 : 16), 1};
  dlpack::ManagedTensorVersioned* managed = nullptr;
  void* object = nullptr;
  if (type.api->allocate(&prototype, &managed, nullptr, ignore_error) != 0 ||
      type.api->object_from_managed(managed, &object) != 0)
    return Ref();
  return Ref(static_cast<PyObject*>(object));
}

bool is_contiguous_of_shape(const anyflash_tensor& tensor, int ndim, const int64_t* shape) {
  int64_t stride = 1;
  for (int dim = ndim - 1; dim >= 0; --dim) {
    if (tensor.shape[dim] != shape[dim] || tensor.strides[dim] != stride) return false;
    stride *= shape[dim];
  }
  return tensor.ndim == ndim;
}

Ref make_by_torch(const TensorType& type, PyObject* q, const anyflash_tensor& like, bool as_float32,
                  int ndim, const int64_t* shape) {
  // Half the time of new_empty: a large part of a short call.
  if (!as_float32 && is_contiguous_of_shape(like, ndim, shape))
    return Ref(PyObject_CallFunctionObjArgs(type.empty_like, q, nullptr));
  Ref method(PyObject_GetAttr(q, constants.new_empty));
  Ref sizes = tuple_of(ndim, shape);
  Ref positional(sizes ? PyTuple_Pack(1, sizes.get()) : nullptr);
  if (!method || !positional) return Ref();
  return Ref(PyObject_Call(method.get(), positional.get(), as_float32 ? type.float32 : nullptr));
}

Ref make_by_numpy(const TensorType& type, PyObject* q, bool as_float32, int ndim,
                  const int64_t* shape) {
  Ref sizes = tuple_of(ndim, shape);
  Ref dtype(as_float32 ? Py_NewRef(type.float32) : PyObject_GetAttr(q, constants.dtype));
  if (!sizes || !dtype) return Ref();
  return Ref(PyObject_CallFunctionObjArgs(type.numpy_empty, sizes.get(), dtype.get(), nullptr));
}

/// A new contiguous tensor of the library and on the device of q. Null, without an exception, if it
/// could not be made.
Ref make_tensor(PyObject* q, const anyflash_tensor& like, bool as_float32, int ndim,
                const int64_t* shape) {
  const TensorType& type = tensor_type_of(q);
  Ref tensor = type.empty_like ? make_by_torch(type, q, like, as_float32, ndim, shape)
               : type.api      ? make_by_dlpack(type, like, as_float32, ndim, shape)
                               : make_by_numpy(type, q, as_float32, ndim, shape);
  if (!tensor) PyErr_Clear();
  return tensor;
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

  bool read_tensor(PyObject* object, anyflash_tensor& tensor) {
    return read(object, tensor, kept[kept_count++]);
  }
  bool read_optional(PyObject* object, anyflash_tensor& tensor) {
    return object == Py_None || read_tensor(object, tensor);
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
  return read_tensor(arguments[at_q], p.q) && read_tensor(arguments[at_k], p.k) &&
         read_tensor(arguments[at_v], p.v) &&
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
    if (!o || !read_tensor(o.get(), problem.o)) return false;
  } else {
    o = Ref(Py_NewRef(arguments[at_out]));
  }
  if (!return_lse) return true;
  // [B, H, N], or [H, total_q]
  std::array<int64_t, 3> shape = {q.shape[0], q.shape[2], q.shape[1]};
  if (q.ndim == 3) shape = {q.shape[1], q.shape[0], 0};
  lse = make_tensor(arguments[at_q], q, true, q.ndim - 1, shape.data());
  return lse && read_tensor(lse.get(), problem.lse);
}

bool current_stream(PyObject* q, const anyflash_tensor& tensor, void*& stream) {
  stream = nullptr;
  if (tensor.device_type != ANYFLASH_CUDA) return true;
  const TensorType& type = tensor_type_of(q);
  if (type.api && type.api->current_stream(dlpack::cuda, tensor.device_index, &stream) == 0)
    return true;
  PyErr_Clear();
  return false;
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

PyMODINIT_FUNC PyInit__fast() {
  constants = {PyUnicode_InternFromString("__dlpack__"),
               PyUnicode_InternFromString("dtype"),
               PyUnicode_InternFromString("requires_grad"),
               PyUnicode_InternFromString("new_empty"),
               PyUnicode_InternFromString("__dlpack_c_exchange_api__"),
               PyUnicode_InternFromString("__dict__"),
               PyUnicode_InternFromString("__module__"),
               PyUnicode_InternFromString("__name__")};
  return PyModule_Create(&module);
}
