"""Tensors of other libraries: where their memory is, and how to make one more like them.

One adapter a library, chosen by the type of the tensor; no library is imported that the tensor's
own type has not imported already.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from typing import Any, Callable, NamedTuple

from ._library import CPU, CUDA, DTYPES, FLOAT32


class Described(NamedTuple):
    """A tensor as the library needs it. strides count elements."""

    data: int
    dtype: int
    device: tuple[int, int]  # DLPack's (type, index)
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    owner: Any  # keeps the memory alive


class Adapter:
    """What one library's tensors need. Subclasses say how."""

    def describe(self, tensor: Any, name: str, *, written: bool = False) -> Described:
        raise NotImplementedError

    def empty(self, like: Any, shape: tuple[int, ...], dtype: int) -> Any:
        """A new tensor on the device of `like`: its own dtype, or float32."""
        raise NotImplementedError

    def result(self, tensor: Any) -> Any:
        """What the user gets for a tensor made by `empty`, once it is computed."""
        return tensor

    def stream(self, device: tuple[int, int]) -> int:
        """The caller's current stream on that device, as a CUstream."""
        return 0

    def needs_grad(self, tensor: Any) -> bool:
        return False

    def route(self, arguments: Any) -> Callable[[Any], Any] | None:
        """Who takes these `_call.Arguments` or `_call.BackwardArguments` instead, where the
        library's own machinery has to see the call."""
        return None

    def deterministic(self) -> bool:
        """The library's global switch."""
        return False


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = []
    stride = 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= max(size, 1)
    return tuple(reversed(strides))


def _unknown_dtype(name: str, dtype: Any) -> TypeError:
    if name.startswith(("cu_seqlens", "seqused")):
        wanted = "int32"
    elif name == "alibi_slopes":
        wanted = "float32"
    else:
        wanted = "float16, bfloat16 or float32 (on the CPU; float64 for the reference)"
    return TypeError(f"{name} has dtype {dtype}; it must be {wanted}")


def _element_strides(name: str, strides: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    if any(stride % itemsize for stride in strides):
        raise ValueError(
            f"{name} has strides of {strides} bytes, not multiples of its {itemsize}-byte "
            "elements; copy it to a contiguous tensor first"
        )
    return tuple(stride // itemsize for stride in strides)


class Torch(Adapter):
    def __init__(self) -> None:
        torch = sys.modules["torch"]
        self.torch: Any = torch
        self.dtypes = {getattr(torch, name): code for name, code in DTYPES.items()}
        self.plain_dispatch = torch.Tensor.__torch_dispatch__

    def describe(self, tensor: Any, name: str, *, written: bool = False) -> Described:
        kind = type(tensor)
        if kind is not self.torch.Tensor and kind.__torch_dispatch__ != self.plain_dispatch:
            raise NotImplementedError(
                f"asked: attention with {name} a {kind.__name__}; available: plain torch tensors; "
                "missing: the operator for tensor subclasses and tracing"
            )
        if tensor.layout is not self.torch.strided:
            raise TypeError(
                f"{name} has layout {tensor.layout}; it must be a dense tensor (torch.strided)"
            )
        dtype = self.dtypes.get(tensor.dtype)
        if dtype is None:
            raise _unknown_dtype(name, tensor.dtype)
        device = tensor.device
        if device.type == "cpu":
            place = (CPU, 0)
        elif device.type == "cuda":
            place = (CUDA, device.index)
        else:
            raise NotImplementedError(
                f"asked: attention on {device} ({name}); available: cpu and cuda; missing: a "
                "backend for it"
            )
        try:
            data = tensor.data_ptr()
        except RuntimeError as error:
            raise NotImplementedError(
                f"asked: attention with {name} inside a transformation of torch (vmap, grad, ...); "
                "available: plain torch tensors; missing: the operator for it"
            ) from error
        return Described(data, dtype, place, tuple(tensor.shape), tensor.stride(), tensor)

    def empty(self, like: Any, shape: tuple[int, ...], dtype: int) -> Any:
        kind = self.torch.float32 if dtype == FLOAT32 else like.dtype
        return self.torch.empty(shape, dtype=kind, device=like.device)

    def stream(self, device: tuple[int, int]) -> int:
        if device[0] != CUDA:
            return 0
        return int(self.torch._C._cuda_getCurrentRawStream(device[1]))

    def needs_grad(self, tensor: Any) -> bool:
        return bool(tensor.requires_grad and self.torch.is_grad_enabled())

    def route(self, arguments: Any) -> Callable[[Any], Any] | None:
        from .torch import _route

        forward = hasattr(arguments, "return_lse")
        return _route.of_forward(arguments) if forward else _route.of_backward(arguments)

    def deterministic(self) -> bool:
        return bool(self.torch.are_deterministic_algorithms_enabled())


class NumPy(Adapter):
    """Also bfloat16, which ml_dtypes brings to NumPy."""

    def __init__(self) -> None:
        self.dtypes: dict[Any, int] = {}

    def dtype_of(self, dtype: Any, name: str) -> int:
        code = self.dtypes.get(dtype)
        if code is None:
            code = DTYPES.get(dtype.name) if dtype.isnative else None
            if code is None:
                raise _unknown_dtype(name, dtype)
            self.dtypes[dtype] = code
        return code

    def describe(self, tensor: Any, name: str, *, written: bool = False) -> Described:
        dtype = self.dtype_of(tensor.dtype, name)
        if written and not tensor.flags.writeable:
            raise ValueError(f"{name} is read-only; it must be writable")
        strides = _element_strides(name, tensor.strides, tensor.itemsize)
        return Described(tensor.ctypes.data, dtype, (CPU, 0), tensor.shape, strides, tensor)

    def empty(self, like: Any, shape: tuple[int, ...], dtype: int) -> Any:
        numpy: Any = sys.modules["numpy"]
        return numpy.empty(shape, numpy.float32 if dtype == FLOAT32 else like.dtype)


class CuPy(Adapter):
    def __init__(self) -> None:
        self.cupy: Any = sys.modules["cupy"]
        self.numpy = NumPy()

    def describe(self, tensor: Any, name: str, *, written: bool = False) -> Described:
        dtype = self.numpy.dtype_of(tensor.dtype, name)
        strides = _element_strides(name, tensor.strides, tensor.itemsize)
        place = (CUDA, tensor.device.id)
        return Described(tensor.data.ptr, dtype, place, tensor.shape, strides, tensor)

    def empty(self, like: Any, shape: tuple[int, ...], dtype: int) -> Any:
        with like.device:
            return self.cupy.empty(shape, self.cupy.float32 if dtype == FLOAT32 else like.dtype)

    def stream(self, device: tuple[int, int]) -> int:
        with self.cupy.cuda.Device(device[1]):
            return int(self.cupy.cuda.get_current_stream().ptr)


class Jax(Adapter):
    """JAX on the CPU. Its arrays are immutable: the result is computed in NumPy's memory."""

    def __init__(self) -> None:
        self.jax: Any = sys.modules["jax"]
        self.numpy = NumPy()

    def describe(self, tensor: Any, name: str, *, written: bool = False) -> Described:
        if isinstance(tensor, self.jax.core.Tracer):
            raise NotImplementedError(
                f"asked: attention inside a JAX transformation ({name} is a tracer); available: "
                "JAX arrays on the CPU, outside jit, grad and vmap; missing: the JAX operator"
            )
        if written:
            raise TypeError(f"{name} is a JAX array, which is immutable; leave {name} away")
        platform = next(iter(tensor.devices())).platform
        if platform != "cpu" or len(tensor.devices()) != 1:
            raise NotImplementedError(
                f"asked: attention on JAX's {platform} ({name}); available: JAX on one CPU "
                "device; missing: the JAX operator"
            )
        view = sys.modules["numpy"].asarray(tensor)
        return self.numpy.describe(view, name)

    def empty(self, like: Any, shape: tuple[int, ...], dtype: int) -> Any:
        return self.numpy.empty(like, shape, dtype)

    def result(self, tensor: Any) -> Any:
        return self.jax.device_put(tensor, self.jax.devices("cpu")[0])


# DLPack, for everybody else. Layouts from the public specification (dlpack.h 1.0).


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned; the older DLManagedTensor starts with its tensor."""

    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    ]


# (DLDataTypeCode, bits)
_DLPACK_DTYPES = {(2, 16): 1, (4, 16): 2, (2, 32): 3, (2, 64): 4, (0, 32): 5}
_DLPACK_WORDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
_READ_ONLY = 1
_LEGACY_STREAM = 1  # DLPack's number for CUDA's legacy default stream


def _capsule_pointer(capsule: Any, name: bytes) -> int | None:
    api = ctypes.pythonapi
    is_valid = api.PyCapsule_IsValid
    is_valid.argtypes = [ctypes.py_object, ctypes.c_char_p]
    get = api.PyCapsule_GetPointer
    get.restype = ctypes.c_void_p
    get.argtypes = [ctypes.py_object, ctypes.c_char_p]
    return get(capsule, name) if is_valid(capsule, name) else None


class DLPack(Adapter):
    """Any object with __dlpack__. New tensors come from its array namespace, or from NumPy."""

    def describe(self, tensor: Any, name: str, *, written: bool = False) -> Described:
        device_type, device_index = (int(number) for number in tensor.__dlpack_device__())
        if device_type not in (CPU, CUDA):
            raise NotImplementedError(
                f"asked: attention on DLPack device type {device_type} ({name}); available: cpu "
                "(1) and cuda (2); missing: a backend for it"
            )
        stream = {"stream": _LEGACY_STREAM} if device_type == CUDA else {}
        try:
            capsule = tensor.__dlpack__(max_version=(1, 0), **stream)
        except TypeError:  # from before version 1.0
            capsule = tensor.__dlpack__(**stream)
        return self._read(capsule, name, (device_type, device_index), written)

    def _read(self, capsule: Any, name: str, place: tuple[int, int], written: bool) -> Described:
        address = _capsule_pointer(capsule, b"dltensor_versioned")
        if address:
            versioned = _Versioned.from_address(address)
            if versioned.major != 1:
                raise NotImplementedError(
                    f"asked: {name} in DLPack version {versioned.major}.{versioned.minor}; "
                    "available: versions 0 and 1; missing: a newer anyflash"
                )
            if written and versioned.flags & _READ_ONLY:
                raise ValueError(f"{name} is read-only; it must be writable")
            raw = versioned.tensor
        else:
            address = _capsule_pointer(capsule, b"dltensor")
            if not address:
                raise TypeError(f"{name}.__dlpack__() gave no DLPack capsule")
            raw = _DLTensor.from_address(address)
        dtype = _DLPACK_DTYPES.get((raw.code, raw.bits)) if raw.lanes == 1 else None
        if dtype is None:
            words = _DLPACK_WORDS.get(raw.code, f"type code {raw.code} ")
            lanes = "" if raw.lanes == 1 else f"x{raw.lanes}"
            raise _unknown_dtype(name, f"{words}{raw.bits}{lanes}")
        shape = tuple(raw.shape[: raw.ndim])
        strides = tuple(raw.strides[: raw.ndim]) if raw.strides else contiguous_strides(shape)
        return Described((raw.data or 0) + raw.byte_offset, dtype, place, shape, strides, capsule)

    def empty(self, like: Any, shape: tuple[int, ...], dtype: int) -> Any:
        if hasattr(like, "__array_namespace__"):
            xp = like.__array_namespace__()
            kind = xp.float32 if dtype == FLOAT32 else like.dtype
            return xp.empty(shape, dtype=kind, device=like.device)
        if like.__dlpack_device__()[0] == CPU:
            return _numpy_empty(shape, dtype)
        raise NotImplementedError(
            f"asked: a new {type(like).__name__} for the result; available: libraries with "
            "__array_namespace__, torch, CuPy; missing: a way to allocate one: pass out= (and no "
            "return_lse)"
        )


def _numpy_empty(shape: tuple[int, ...], dtype: int) -> Any:
    name = next(name for name, code in DTYPES.items() if code == dtype)
    try:
        numpy = importlib.import_module("numpy")
        if name == "bfloat16":
            return numpy.empty(shape, importlib.import_module("ml_dtypes").bfloat16)
        return numpy.empty(shape, name)
    except ImportError as error:
        raise NotImplementedError(
            "asked: a new tensor for the result of an object that only speaks DLPack; available: "
            f"NumPy arrays; missing: {error.name} (pip install {error.name}), or pass out="
        ) from None


_FAMILIES: dict[str, type[Adapter]] = {
    "torch": Torch,
    "numpy": NumPy,
    "cupy": CuPy,
    "jax": Jax,
    "jaxlib": Jax,
}
_adapters: dict[type, Adapter] = {}


def adapter_of(tensor: Any, name: str) -> Adapter:
    """The adapter of this tensor's library. Raises TypeError for what is no tensor."""
    kind = type(tensor)
    adapter = _adapters.get(kind)
    if adapter is None:
        adapter = _adapters[kind] = _choose(kind, name)
    return adapter


def _choose(kind: type, name: str) -> Adapter:
    for base in kind.__mro__[:-1]:
        library = base.__module__.partition(".")[0]
        # Only their tensors: torch has other classes too.
        if library in _FAMILIES and base.__name__ in _TENSOR_CLASSES:
            return _FAMILIES[library]()
    if hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__"):
        return DLPack()
    raise TypeError(
        f"{name} is a {kind.__name__}; it must be a tensor: torch, NumPy, CuPy, JAX, or any object "
        "with __dlpack__"
    )


_TENSOR_CLASSES = {"Tensor", "ndarray", "ArrayImpl", "Array", "Tracer"}
