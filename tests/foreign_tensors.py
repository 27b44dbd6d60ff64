"""Tensors of a library that nobody knows: objects that only speak DLPack, made by hand."""

from __future__ import annotations

import ctypes

import numpy as np

FLOAT, INT, BFLOAT = 2, 0, 4


class Tensor(ctypes.Structure):
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


class Managed(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


class Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    ]


def _capsule(struct, name):
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(ctypes.addressof(struct), name, None)


class Foreign:
    """An array that shows itself through DLPack only."""

    def __init__(
        self,
        array,
        device=(1, 0),
        versioned=False,
        read_only=False,
        strides=True,
        byte_offset=0,
        **fields,
    ):
        self.array = array
        self.device = device
        self.versioned = versioned
        count = array.ndim
        self._shape = (ctypes.c_int64 * count)(*array.shape)
        self._strides = (ctypes.c_int64 * count)(*(s // array.itemsize for s in array.strides))
        tensor = Tensor(
            array.ctypes.data - byte_offset,
            *device,
            count,
            fields.get("code", INT if array.dtype.kind == "i" else FLOAT),
            fields.get("bits", array.itemsize * 8),
            fields.get("lanes", 1),
            self._shape,
            self._strides if strides else None,
            byte_offset,
        )
        if versioned:
            self._managed = Versioned(fields.get("major", 1), 0, None, None, read_only, tensor)
        else:
            self._managed = Managed(tensor, None, None)

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **options):
        if not self.versioned:
            if "max_version" in options:
                raise TypeError("an old library")
            return _capsule(self._managed, b"dltensor")
        return _capsule(self._managed, b"dltensor_versioned")


def bfloat16_bits(array):
    """float32 values cut to bfloat16, as 16-bit integers."""
    return (np.ascontiguousarray(array, np.float32).view(np.uint32) >> 16).astype(np.uint16)
