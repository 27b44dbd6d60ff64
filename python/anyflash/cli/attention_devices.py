"""anyflash's attention as the encoder calls it: NumPy in, NumPy out, computed on the CPU or on a
GPU."""

from __future__ import annotations

import importlib.util

import numpy as np

import anyflash
from anyflash.cli.bert import Array, Attention
from anyflash.cli.console import UserError
from anyflash.cli.facts import gpus


def choose(device: str) -> tuple[Attention, str]:
    """The attention function of a device ("auto", "cpu", "cuda") and its name. Raises UserError
    where there is none."""
    if device == "cpu":
        return on_cpu, "the CPU, float32"
    here = gpus()
    if not here:
        if device == "auto":
            return on_cpu, "the CPU, float32"
        text = "--device cuda: there is no GPU here; `python -m anyflash doctor` says why"
        raise UserError(text, exit_code=1)
    if importlib.util.find_spec("cupy"):
        return on_gpu_by_cupy, f"{here[0]['name']}, float16 through CuPy"
    if importlib.util.find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            return on_gpu_by_torch, f"{here[0]['name']}, float16 through torch"
    needs = "the GPU needs CuPy or torch with CUDA to hold tensors: `pip install cupy-cuda12x`"
    if device == "auto":
        return on_cpu, f"the CPU, float32 ({needs})"
    raise UserError(f"--device cuda: {needs}", exit_code=1)


def on_cpu(q: Array, k: Array, v: Array, cu_seqlens: Array, longest: int) -> Array:
    return np.asarray(anyflash.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, longest, longest))


def on_gpu_by_cupy(q: Array, k: Array, v: Array, cu_seqlens: Array, longest: int) -> Array:
    import cupy

    qd, kd, vd = (cupy.asarray(x.astype(np.float16)) for x in (q, k, v))
    lengths = cupy.asarray(cu_seqlens)
    o = anyflash.attention_varlen(qd, kd, vd, lengths, lengths, longest, longest)
    return np.asarray(cupy.asnumpy(o)).astype(np.float32)


def on_gpu_by_torch(q: Array, k: Array, v: Array, cu_seqlens: Array, longest: int) -> Array:
    import torch

    qd, kd, vd = (torch.from_numpy(x.astype(np.float16)).cuda() for x in (q, k, v))
    lengths = torch.from_numpy(cu_seqlens).cuda()
    o = anyflash.attention_varlen(qd, kd, vd, lengths, lengths, longest, longest)
    return np.asarray(o.float().cpu().numpy())
