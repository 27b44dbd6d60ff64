#include "tensors.h"

#include <algorithm>
#include <array>

namespace fast {
namespace {

/// Names that live as long as the process.
struct Names {
  PyObject *dlpack, *dtype, *requires_grad, *new_empty, *exchange_api, *dict, *module, *name;
};
Names names;

/// How the tensors of one Python type are read and made.
struct TensorType {
  PyTypeObject* type = nullptr; // owned, for ever
  const dlpack::ExchangeApi* api = nullptr;
  PyObject* numpy_empty = nullptr; // for NumPy's arrays
  PyObject* float32 = nullptr;     // the library's name of that dtype; torch's as {"dtype": ...}
  PyObject* empty_like = nullptr;  // torch's own ways, beside tensor.new_empty(shape)
  bool has_grad = false;
};

/// NumPy's own array type: read through __dlpack__, made by numpy.empty.
bool is_numpy_array(PyObject* type) {
  Ref module(PyObject_GetAttr(type, names.module));
  Ref name(PyObject_GetAttr(type, names.name));
  return module && name && PyUnicode_Check(module.get()) && PyUnicode_Check(name.get()) &&
         PyUnicode_CompareWithASCIIString(module.get(), "numpy") == 0 &&
         PyUnicode_CompareWithASCIIString(name.get(), "ndarray") == 0;
}

/// The C functions that the type itself offers. Those of a base class do not count: what a subclass
/// changes (a tensor that is only traced, say) they would not see.
const dlpack::ExchangeApi* exchange_api_of(PyObject* type) {
  Ref dict(PyObject_GetAttr(type, names.dict));
  if (!dict) return nullptr;
  Ref own(PyObject_GetItem(dict.get(), names.exchange_api));
  if (!own) return nullptr;
  Ref capsule(PyObject_GetAttr(type, names.exchange_api));
  if (!capsule || !PyCapsule_IsValid(capsule.get(), "dlpack_exchange_api")) return nullptr;
  auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.get(), "dlpack_exchange_api"));
  while (api && api->version.major > 1) api = api->older;
  return api && api->version.major == 1 && api->tensor_from_object ? api : nullptr;
}

/// torch makes its tensors itself: what DLPack's allocator makes is memory that torch does not know
/// as its own (record_stream, for one, would do nothing).
void find_new_empty(PyObject* type, TensorType& result) {
  Ref name(PyObject_GetAttr(type, names.module));
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
    result.has_grad = PyObject_HasAttr(object, names.requires_grad);
    if (result.api && PyObject_HasAttr(object, names.new_empty)) find_new_empty(object, result);
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
  Ref method(PyObject_GetAttr(q, names.new_empty));
  Ref sizes = tuple_of(ndim, shape);
  Ref positional(sizes ? PyTuple_Pack(1, sizes.get()) : nullptr);
  if (!method || !positional) return Ref();
  return Ref(PyObject_Call(method.get(), positional.get(), as_float32 ? type.float32 : nullptr));
}

Ref make_by_numpy(const TensorType& type, PyObject* q, bool as_float32, int ndim,
                  const int64_t* shape) {
  Ref sizes = tuple_of(ndim, shape);
  Ref dtype(as_float32 ? Py_NewRef(type.float32) : PyObject_GetAttr(q, names.dtype));
  if (!sizes || !dtype) return Ref();
  return Ref(PyObject_CallFunctionObjArgs(type.numpy_empty, sizes.get(), dtype.get(), nullptr));
}

} // namespace

void init_tensors() {
  names = {PyUnicode_InternFromString("__dlpack__"),
           PyUnicode_InternFromString("dtype"),
           PyUnicode_InternFromString("requires_grad"),
           PyUnicode_InternFromString("new_empty"),
           PyUnicode_InternFromString("__dlpack_c_exchange_api__"),
           PyUnicode_InternFromString("__dict__"),
           PyUnicode_InternFromString("__module__"),
           PyUnicode_InternFromString("__name__")};
}

bool read_tensor(PyObject* object, anyflash_tensor& tensor, Ref& keep) {
  const TensorType& type = tensor_type_of(object);
  if (type.api) {
    dlpack::Tensor view;
    if (type.api->tensor_from_object(object, &view) == 0) return convert(view, tensor);
  } else if (type.numpy_empty) {
    // Refuses read-only arrays and dtypes of others (bfloat16): the complete way takes those.
    keep = Ref(PyObject_CallMethodObjArgs(object, names.dlpack, nullptr));
    if (keep) {
      void* managed = PyCapsule_GetPointer(keep.get(), "dltensor");
      if (managed) return convert(static_cast<dlpack::ManagedTensor*>(managed)->tensor, tensor);
    }
  }
  PyErr_Clear();
  return false;
}

bool is_torch_tensor(PyObject* object) { return tensor_type_of(object).empty_like != nullptr; }

bool requires_grad(PyObject* object) {
  if (!tensor_type_of(object).has_grad) return false;
  Ref value(PyObject_GetAttr(object, names.requires_grad));
  if (value.get() == Py_False) return false;
  PyErr_Clear();
  return true;
}

Ref make_tensor(PyObject* q, const anyflash_tensor& like, bool as_float32, int ndim,
                const int64_t* shape) {
  const TensorType& type = tensor_type_of(q);
  Ref tensor = type.empty_like ? make_by_torch(type, q, like, as_float32, ndim, shape)
               : type.api      ? make_by_dlpack(type, like, as_float32, ndim, shape)
                               : make_by_numpy(type, q, as_float32, ndim, shape);
  if (!tensor) PyErr_Clear();
  return tensor;
}

Ref make_hidden_tensor(PyObject* q, const anyflash_tensor& like, bool as_float32, int ndim,
                       const int64_t* shape) {
  const TensorType& type = tensor_type_of(q);
  Ref tensor;
  if (type.api) tensor = make_by_dlpack(type, like, as_float32, ndim, shape);
  if (tensor) return tensor;
  PyErr_Clear();
  return make_tensor(q, like, as_float32, ndim, shape);
}

Workspace::~Workspace() {
  if (managed_ && managed_->deleter) managed_->deleter(managed_);
}

bool Workspace::allocate(PyObject* object, const anyflash_tensor& like, uint64_t bytes) {
  const TensorType& type = tensor_type_of(object);
  if (!type.api) return false;
  int64_t count = static_cast<int64_t>(bytes / sizeof(float)) + 65; // and room to align
  dlpack::Tensor prototype{};
  prototype.device = {like.device_type, like.device_index};
  prototype.ndim = 1;
  prototype.shape = &count;
  prototype.dtype = {dlpack::code_float, 32, 1};
  if (type.api->allocate(&prototype, &managed_, nullptr, ignore_error) == 0) return true;
  managed_ = nullptr;
  PyErr_Clear();
  return false;
}

void* Workspace::data() const {
  if (!managed_) return nullptr;
  const dlpack::Tensor& tensor = managed_->tensor;
  const uintptr_t address = reinterpret_cast<uintptr_t>(tensor.data) + tensor.byte_offset;
  return reinterpret_cast<void*>((address + 255) / 256 * 256);
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

} // namespace fast
