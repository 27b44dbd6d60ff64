"""Where the tests of torch run, and the dtype that they use there.

ANYFLASH_TEST_DEVICE=cuda: on the GPU. By default on the CPU; what only a GPU can show is skipped.
"""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = os.environ.get("ANYFLASH_TEST_DEVICE", "cpu")
ON_GPU = DEVICE.startswith("cuda")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32  # GPUs have no float32 kernels
EPS = torch.finfo(DTYPE).eps
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU (ANYFLASH_TEST_DEVICE=cuda)")


def qkv(
    *,
    batch: int = 2,
    n: int = 5,
    m: int = 7,
    heads: int = 4,
    heads_k: int = 2,
    d: int = 16,
    dv: int | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    requires_grad: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dense q, k, v of a small problem on the device of the tests."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, n, heads, d), (batch, m, heads_k, d), (batch, m, heads_k, dv or d))
    return tuple(
        torch.randn(shape, generator=generator)
        .to(DEVICE, dtype or DTYPE)
        .requires_grad_(requires_grad)
        for shape in shapes
    )
