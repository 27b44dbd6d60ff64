"""What the benchmark compares, and how a call is timed, on each framework and device.

anyflash gets tensors of its own layout [batch, seqlen, heads, d]; the others get contiguous
[batch, heads, seqlen, d], the layout that is best for them. All of them get the same values.
"""

from __future__ import annotations

import gc
import importlib.util
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from anyflash.cli.console import UserError
from anyflash.cli.facts import cpu_description, cuda_version, environment, gpus
from anyflash.cli.memory import PeakResident, available

Call = Callable[[], Any]
OURS, STANDARD, SDPA = "anyflash", "standard", "torch SDPA"


@dataclass(frozen=True)
class Cell:
    """One point of the grid: a batch of self-attention over seqlen tokens."""

    d: int
    heads: int
    seqlen: int
    batch: int
    causal: bool
    dtype: str

    @property
    def flops(self) -> float:
        """Multiplications and additions of both products; half of them when causal, as is the
        custom."""
        full = 4.0 * self.batch * self.heads * self.seqlen**2 * self.d
        return full / 2 if self.causal else full


class OutOfMemory(Exception):
    """A contestant does not fit; the text says into what."""


class Backend:
    """A framework on a device. `calls` makes the contestants of a cell; `seconds` and `peak` run
    one of them."""

    framework = ""
    on_gpu = False
    dtypes: tuple[str, ...] = ()

    def hardware(self) -> str:
        raise NotImplementedError

    def calls(self, cell: Cell) -> dict[str, Call]:
        raise NotImplementedError

    def seconds(self, call: Call) -> float:
        """Time of one call, once everything before it is over. Raises OutOfMemory."""
        raise NotImplementedError

    def peak(self, call: Call) -> tuple[int | None, Any]:
        """(largest memory that one call adds, its output included, in bytes, or None; what it
        returned)."""
        raise NotImplementedError

    def refuse(self, name: str, cell: Cell) -> None:
        """Raises OutOfMemory for a contestant that would not fit, where trying it would end the
        process."""

    def difference(self, name: str, a: Any, b: Any) -> float:
        """Largest difference of anyflash's result a from contestant `name`'s b."""
        raise NotImplementedError

    def release(self) -> None:
        gc.collect()


def choose(device: str, dtype: str | None) -> Backend:
    """The backend of --device ("auto", "cpu", "cuda"). Raises UserError, with what to do, where
    there is none."""
    backend: Backend
    if device == "cuda" or (device == "auto" and gpus()):
        backend = _gpu_backend(device)
    elif importlib.util.find_spec("torch"):
        backend = TorchCpu()
    elif importlib.util.find_spec("numpy"):
        backend = NumpyCpu()
    else:
        raise UserError(
            "the benchmark needs NumPy or torch: `pip install anyflash[bench]`", exit_code=1
        )
    if dtype is not None and dtype not in backend.dtypes:
        place = "GPU" if backend.on_gpu else "CPU"
        raise UserError(
            f"--dtype {dtype}: {backend.framework} on the {place} has {', '.join(backend.dtypes)}"
        )
    return backend


def _gpu_backend(device: str) -> Backend:
    if not gpus():
        raise UserError(
            "--device cuda: there is no GPU here; `python -m anyflash doctor` says why", exit_code=1
        )
    if importlib.util.find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            return TorchGpu()
    text = "the benchmark on a GPU needs torch with CUDA: `pip install torch`; or add --device cpu"
    raise UserError(text, exit_code=1)


class NumpyCpu(Backend):
    framework = "NumPy"
    dtypes = ("float32", "float16")

    def hardware(self) -> str:
        return cpu_description()

    def calls(self, cell: Cell) -> dict[str, Call]:
        import numpy as np

        import anyflash

        random = np.random.default_rng(1)
        shape = (cell.batch, cell.seqlen, cell.heads, cell.d)
        q, k, v = (random.standard_normal(shape, np.float32).astype(cell.dtype) for _ in range(3))
        others = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for x in (q, k, v)]
        hidden: Any = np.triu(np.ones((cell.seqlen, cell.seqlen), bool), 1) if cell.causal else None
        return {
            OURS: lambda: anyflash.attention(q, k, v, causal=cell.causal),
            STANDARD: lambda: _standard_numpy(others, hidden),
        }

    def seconds(self, call: Call) -> float:
        return _wall_seconds(call)

    def peak(self, call: Call) -> tuple[int | None, Any]:
        return _resident_growth(call)

    def refuse(self, name: str, cell: Cell) -> None:
        _refuse_on_cpu(name, cell)

    def difference(self, name: str, a: Any, b: Any) -> float:
        return float(abs(a.astype("float32") - b.transpose(0, 2, 1, 3)).max())


class TorchCpu(Backend):
    framework = "torch"
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    device = "cpu"

    def hardware(self) -> str:
        return cpu_description()

    def calls(self, cell: Cell) -> dict[str, Call]:
        import torch
        import torch.nn.functional as F

        import anyflash

        generator = torch.Generator(self.device).manual_seed(1)
        shape = (cell.batch, cell.seqlen, cell.heads, cell.d)
        kind = {"dtype": getattr(torch, cell.dtype), "device": self.device, "generator": generator}
        q, k, v = (torch.randn(shape, **kind) for _ in range(3))
        others = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        hidden: Any = None
        if cell.causal:
            square = torch.ones(cell.seqlen, cell.seqlen, dtype=torch.bool, device=self.device)
            hidden = square.triu(1)
        return {
            OURS: lambda: anyflash.attention(q, k, v, causal=cell.causal),
            STANDARD: lambda: _standard_torch(others, hidden),
            SDPA: lambda: F.scaled_dot_product_attention(*others, is_causal=cell.causal),
        }

    def seconds(self, call: Call) -> float:
        return _wall_seconds(call)

    def peak(self, call: Call) -> tuple[int | None, Any]:
        return _resident_growth(call)

    def refuse(self, name: str, cell: Cell) -> None:
        _refuse_on_cpu(name, cell)

    def difference(self, name: str, a: Any, b: Any) -> float:
        return float((a.float() - b.transpose(1, 2).float()).abs().max())


class TorchGpu(TorchCpu):
    on_gpu = True
    dtypes = ("bfloat16", "float16")
    device = "cuda"

    def __init__(self) -> None:
        import torch

        self.torch = torch
        # Written before each timed call, so that no contestant finds its inputs in the L2 cache.
        self.flush = torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")

    def hardware(self) -> str:
        driver = (environment().get("driver") or {}).get("version")
        return f"{self.torch.cuda.get_device_name()}, driver of CUDA {cuda_version(driver)}"

    def seconds(self, call: Call) -> float:
        cuda = self.torch.cuda
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        try:
            self.flush.zero_()  # takes longer than the launch that follows, which thus is not timed
            start.record()
            call()
            end.record()
            cuda.synchronize()
        except cuda.OutOfMemoryError:
            raise OutOfMemory(self._capacity()) from None
        return float(start.elapsed_time(end)) * 1e-3

    def peak(self, call: Call) -> tuple[int | None, Any]:
        cuda = self.torch.cuda
        cuda.synchronize()
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
        try:
            result = call()
            cuda.synchronize()
        except cuda.OutOfMemoryError:
            raise OutOfMemory(self._capacity()) from None
        return cuda.max_memory_allocated() - before, result

    def refuse(self, name: str, cell: Cell) -> None:
        """The GPU's allocator says itself when it is full."""

    def release(self) -> None:
        super().release()
        self.torch.cuda.empty_cache()
        time.sleep(0.2)  # let it cool

    def _capacity(self) -> str:
        total = self.torch.cuda.get_device_properties(0).total_memory
        return f"more than the GPU's {total / 2**30:.0f} GB"


def _standard_torch(qkv: list[Any], hidden: Any) -> Any:
    """softmax(Q K^T / sqrt(d)) V as everybody writes it; hidden: True where a query does not see
    a key."""
    q, k, v = qkv
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if hidden is not None:
        s = s.masked_fill(hidden, float("-inf"))
    return s.softmax(-1) @ v


def _standard_numpy(qkv: list[Any], hidden: Any) -> Any:
    import numpy as np

    q, k, v = (x.astype(np.float32, copy=False) for x in qkv)
    s = q @ k.transpose(0, 1, 3, 2) * np.float32(q.shape[-1] ** -0.5)
    if hidden is not None:
        s[..., hidden] = -np.inf
    p = np.exp(s - s.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True) @ v


def _wall_seconds(call: Call) -> float:
    time.sleep(0.002)  # let the threads of the call before go to sleep: they spin for a while
    start = time.perf_counter()
    try:
        call()
    except MemoryError:
        raise OutOfMemory("more than there is") from None
    return time.perf_counter() - start


def _resident_growth(call: Call) -> tuple[int | None, Any]:
    peak = PeakResident()
    try:
        result = call()
    except MemoryError:
        raise OutOfMemory("more than there is") from None
    return peak.growth(), result


def _refuse_on_cpu(name: str, cell: Cell) -> None:
    """The standard attention holds up to three score matrices of float32 (half precision is
    computed in it here); the system would end a process that takes too much rather than tell it."""
    need, free = 3 * 4 * cell.batch * cell.heads * cell.seqlen**2, available()
    if name == STANDARD and free is not None and need > 0.9 * free:
        raise OutOfMemory(f"needs {need / 2**30:.0f} GB, {free / 2**30:.0f} GB are free")


def versions(backend: Backend) -> dict[str, str]:
    """What the numbers depend on."""
    import importlib

    import anyflash

    module = importlib.import_module("torch" if backend.framework == "torch" else "numpy")
    return {
        "anyflash": str(anyflash.__version__),
        backend.framework: str(module.__version__),
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
