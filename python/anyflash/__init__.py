"""Exact attention, tile by tile, on any CPU and NVIDIA GPU.

    S = scale Q K^T;  softcap;  ALiBi;  mask;  P = softmax(S);  O = P V;  L = log(sum(exp(S)))

`attention` and `attention_varlen` take tensors of any library that speaks DLPack (torch, NumPy,
CuPy, JAX on the CPU, ...) and return tensors of the same library. Importing this package needs no
GPU, driver, torch or NumPy; everything is looked up at the first call.
"""

from __future__ import annotations

from ._version import __version__
from .api import attention, attention_backward, attention_varlen, reference, reference_backward
from .planning import Support, explain, supports, warm_up

__all__ = [
    "Support",
    "__version__",
    "attention",
    "attention_backward",
    "attention_varlen",
    "explain",
    "reference",
    "reference_backward",
    "supports",
    "warm_up",
]
