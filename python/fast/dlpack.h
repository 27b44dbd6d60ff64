// What this binding uses of DLPack 1.x, declared anew from its public specification: tensors in
// memory, and the table of C functions that a library puts on its tensor type.
#pragma once

#include <cstdint>

namespace dlpack {

enum DeviceType : int32_t { cpu = 1, cuda = 2 };
enum TypeCode : uint8_t { code_int = 0, code_float = 2, code_bfloat = 4 };

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides; // in elements; null: contiguous
  uint64_t byte_offset;
};

/// What a capsule "dltensor" holds.
struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

struct Version {
  uint32_t major;
  uint32_t minor;
};

struct ManagedTensorVersioned {
  Version version;
  void* context;
  void (*deleter)(ManagedTensorVersioned*);
  uint64_t flags;
  Tensor tensor;
};

/// `__dlpack_c_exchange_api__` of a tensor type: a capsule "dlpack_exchange_api" with this table.
/// Functions return 0, or -1 with a Python exception set. Nothing here waits for a stream.
struct ExchangeApi {
  Version version;
  ExchangeApi* older;
  int (*allocate)(Tensor* prototype, ManagedTensorVersioned** result, void* context,
                  void (*set_error)(void* context, const char* kind, const char* message));
  int (*managed_from_object)(void* object, ManagedTensorVersioned** result);
  int (*object_from_managed)(ManagedTensorVersioned* tensor, void** object); // steals the tensor
  int (*tensor_from_object)(void* object, Tensor* result);                   // borrows; may be null
  int (*current_stream)(DeviceType type, int32_t id, void** stream);
};

} // namespace dlpack
