"""libanyflash through ctypes: the structs of anyflash.h, loading, statuses to exceptions.

A problem is packed into bytes and passed as one pointer: setting its 140 fields one by one would
cost more than planning it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import sys
from typing import Any, Callable, NoReturn

# anyflash_dtype
FLOAT16, BFLOAT16, FLOAT32, FLOAT64, INT32 = 1, 2, 3, 4, 5
DTYPES = {"float16": 1, "bfloat16": 2, "float32": 3, "float64": 4, "int32": 5}

# anyflash_device_type
CPU, CUDA = 1, 2

# anyflash_op
FORWARD, BACKWARD = 1, 2

# anyflash_status
_EXCEPTIONS = {1: ValueError, 2: TypeError, 3: NotImplementedError, 4: RuntimeError, 5: MemoryError}

# anyflash_tensor: data, dtype, device_type, device_index, ndim, shape[4], strides[4]
_TENSOR = struct.Struct("=Q4i4q4q")
ABSENT = bytes(_TENSOR.size)
_PROBLEM_HEAD = struct.Struct("=Ii")
# max_seqlen_q, max_seqlen_k, window_left, window_right, scale, softcap, causal, deterministic
_PROBLEM_TAIL = struct.Struct("=4q2f2i")
_PROBLEM_SIZE = _PROBLEM_HEAD.size + 15 * _TENSOR.size + _PROBLEM_TAIL.size
_NO_GRADIENTS = (ABSENT,) * 5
_ZEROS = (0, 0, 0, 0)


class Device(ctypes.Structure):
    """anyflash_device."""

    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        ("type", ctypes.c_int32),
        ("index", ctypes.c_int32),
        ("compute_capability", ctypes.c_int32),
        ("multiprocessors", ctypes.c_int32),
        ("shared_bytes", ctypes.c_int32),
        ("driver", ctypes.c_int32),
    ]

    def __init__(self) -> None:
        super().__init__(ctypes.sizeof(Device))


class Launch(ctypes.Structure):
    """anyflash_launch."""

    _fields_ = [
        ("row", ctypes.c_int32),
        ("entry", ctypes.c_int32),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_uint32),
        ("shared_bytes", ctypes.c_uint32),
    ]


class Plan(ctypes.Structure):
    """anyflash_plan."""

    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        ("op", ctypes.c_int32),
        ("device", Device),
        ("launch_count", ctypes.c_int32),
        ("Br", ctypes.c_int32),
        ("Bc", ctypes.c_int32),
        ("splits", ctypes.c_int32),
        ("launches", Launch * 4),
        ("workspace_bytes", ctypes.c_uint64),
        ("workspace_offsets", ctypes.c_uint64 * 4),
    ]

    def __init__(self) -> None:
        super().__init__(ctypes.sizeof(Plan))

    def __repr__(self) -> str:
        launches = [
            f"row {launch.row} grid {tuple(launch.grid)} x {launch.threads} threads, "
            f"{launch.shared_bytes} B shared"
            for launch in self.launches[: self.launch_count]
        ]
        return (
            f"Plan(Br={self.Br}, Bc={self.Bc}, splits={self.splits}, launches={launches}, "
            f"workspace_bytes={self.workspace_bytes})"
        )


def pack_tensor(
    data: int,
    dtype: int,
    device: tuple[int, int],
    shape: tuple[int, ...],
    strides: tuple[int, ...],
) -> bytes:
    """An anyflash_tensor. Ranks over 4 keep their number, which the library refuses."""
    ndim = len(shape)
    padding = _ZEROS[ndim:]
    try:
        return _TENSOR.pack(
            data, dtype, *device, ndim, *shape[:4], *padding, *strides[:4], *padding
        )
    except struct.error:
        raise ValueError(f"shape {shape} or strides {strides} do not fit 64 bits") from None


def pack_problem(
    op: int,
    tensors: tuple[bytes, ...],
    gradients: tuple[bytes, ...] | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    window_left: int,
    window_right: int,
    scale: float,
    softcap: float,
    causal: bool,
    deterministic: bool,
) -> bytes:
    """An anyflash_problem; tensors in its order: q, k, v, o, lse, alibi_slopes, cu_seqlens_q,
    cu_seqlens_k, seqused_q, seqused_k; gradients: dout, dlse, dq, dk, dv."""
    tail = _PROBLEM_TAIL.pack(
        max_seqlen_q,
        max_seqlen_k,
        window_left,
        window_right,
        _as_float32(scale),
        _as_float32(softcap),
        causal,
        deterministic,
    )
    head = _PROBLEM_HEAD.pack(_PROBLEM_SIZE, op)
    return b"".join((head, *tensors, tail, *(gradients or _NO_GRADIENTS)))


def _as_float32(value: float) -> float:
    """struct refuses doubles beyond float32; the library refuses infinities with a better word."""
    return ctypes.c_float(value).value


def find() -> str:
    """The path of libanyflash: ANYFLASH_LIBRARY, or the one installed with this package."""
    name = "anyflash.dll" if sys.platform == "win32" else "libanyflash.so"
    package = os.path.dirname(os.path.abspath(__file__))
    # An editable install leaves Python files in the source tree, the library in site-packages.
    folders = [package, *(os.path.join(path, "anyflash") for path in sys.path)]
    inside = [os.path.join(folder, "lib", name) for folder in folders]
    given = os.environ.get("ANYFLASH_LIBRARY")
    path = given or next(filter(os.path.exists, inside), inside[0])
    if not os.path.exists(path):
        raise RuntimeError(
            f"{name} was not found at {path}; reinstall anyflash (pip install --force-reinstall "
            "anyflash), or set ANYFLASH_LIBRARY to its path"
        )
    return path


_NoticeHandler = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p)


def show_notice(message: str) -> None:
    """A line of the library for the user: the logger "anyflash", level WARNING."""
    import logging

    logging.getLogger("anyflash").warning("%s", message)


_show_notice = _NoticeHandler(lambda message, context: show_notice(message.decode()))


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library. Calls release the GIL. Raises RuntimeError when it is missing."""
    path = find()
    try:
        lib = ctypes.CDLL(path)
    except OSError as error:
        raise RuntimeError(f"{path} does not load: {error}") from error
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    size, size_pointer = ctypes.c_size_t, ctypes.POINTER(ctypes.c_size_t)
    lib.anyflash_version.restype = text
    lib.anyflash_last_error.restype = text
    lib.anyflash_get_device.argtypes = [ctypes.c_int32, ctypes.c_int32, pointer]
    lib.anyflash_describe_gpu.argtypes = [ctypes.c_int32, pointer]
    lib.anyflash_make_plan.argtypes = [text, pointer, pointer]
    lib.anyflash_run.argtypes = [pointer, text, pointer, pointer]
    lib.anyflash_warm_up.argtypes = [pointer]
    lib.anyflash_reference.argtypes = [text]
    lib.anyflash_explain.argtypes = [text, pointer, text, size, size_pointer]
    lib.anyflash_rows.argtypes = [text, size, size_pointer]
    lib.anyflash_environment.argtypes = [text, size, size_pointer]
    lib.anyflash_set_notice_handler.argtypes = [_NoticeHandler, pointer]
    lib.anyflash_set_notice_handler.restype = None
    lib.anyflash_set_notice_handler(_show_notice, None)
    lib.anyflash_add_compiler_path.argtypes = [text]
    lib.anyflash_add_compiler_path.restype = None
    for folder in sys.path:  # libnvrtc may be one of NVIDIA's pip packages
        if os.path.isdir(os.path.join(folder, "nvidia")):
            lib.anyflash_add_compiler_path(os.fsencode(folder))
    return lib


def raise_last_error(status: int) -> NoReturn:
    """The exception of a status, with the library's message."""
    message = library().anyflash_last_error().decode(errors="replace")
    raise _EXCEPTIONS.get(status, RuntimeError)(message)


def check(status: int) -> None:
    if status:
        raise_last_error(status)


def get_device(device_type: int, index: int) -> Device:
    device = Device()
    check(library().anyflash_get_device(device_type, index, ctypes.byref(device)))
    return device


def describe_gpu(compute_capability: int) -> Device:
    device = Device()
    check(library().anyflash_describe_gpu(compute_capability, ctypes.byref(device)))
    return device


def make_plan(problem: bytes, device: Device | None) -> Plan:
    """Validates and decides; raises what the library refuses."""
    plan = Plan()
    target = ctypes.byref(device) if device is not None else None
    check(library().anyflash_make_plan(problem, target, ctypes.byref(plan)))
    return plan


def warm_up(plan: Plan) -> None:
    """Loads what a plan needs on its device."""
    check(library().anyflash_warm_up(ctypes.byref(plan)))


def _text(call: Callable[[Any, int, Any], int]) -> str:
    """The two-call protocol of the library's texts."""
    needed = ctypes.c_size_t()
    check(call(None, 0, ctypes.byref(needed)))
    while True:
        buffer = ctypes.create_string_buffer(needed.value)
        check(call(buffer, len(buffer), ctypes.byref(needed)))
        if needed.value <= len(buffer):
            return buffer.value.decode(errors="replace")


def explain(problem: bytes, device: Device | None) -> str:
    target = ctypes.byref(device) if device is not None else None
    return _text(lambda *text: library().anyflash_explain(problem, target, *text))


def rows_json() -> str:
    """The table of kernels as JSON."""
    return _text(library().anyflash_rows)


def environment_json() -> str:
    """Driver, GPUs, CPU features, compiler, caches and archives as JSON."""
    return _text(library().anyflash_environment)
