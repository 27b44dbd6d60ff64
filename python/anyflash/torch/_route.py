"""Which way a call on torch tensors takes.

- plain tensors in eager mode: straight to the library, and a classic autograd Function around it
  where a gradient is wanted;
- everything else (a transformation, a mode, tracing, autocast that casts, tensor subclasses,
  tensors without memory): the operators of the dispatcher.
"""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch.autograd import forward_ad

from .._call import Arguments, BackwardArguments

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def of_forward(arguments: Arguments) -> Callable[[Any], Any] | None:
    """Who takes this forward; None: straight to the library."""
    if _needs_dispatcher(arguments) or _autocast_casts(arguments):
        from . import _ops

        return _ops.forward
    if torch.is_grad_enabled() and any(
        isinstance(x, torch.Tensor) and x.requires_grad for x in arguments[:3]
    ):
        from . import _autograd

        return _autograd.forward
    return None


def of_backward(arguments: BackwardArguments) -> Callable[[Any], Any] | None:
    """Who takes this backward; None: straight to the library."""
    if _needs_dispatcher(arguments):
        from . import _ops

        return _ops.backward
    return None


def _needs_dispatcher(arguments: Arguments | BackwardArguments) -> bool:
    return _watched() or any(
        isinstance(x, torch.Tensor) and not _is_plain(x) for x in (*arguments, *arguments.options)
    )


def _is_plain(x: Any) -> bool:
    """A tensor of memory. Wrappers of torch's (mapped ones, say) have none of their own; neither
    have sparse tensors, which the library refuses in its own words."""
    if type(x) not in _PLAIN or x.device.type == "meta":
        return False
    return x.layout is not torch.strided or bool(torch._C._has_storage(x))


def _watched() -> bool:
    """Does somebody transform, trace or watch what is called now?"""
    return bool(
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def _autocast_casts(arguments: Arguments) -> bool:
    dtype = _autocast_dtype(arguments.q.device.type)
    return dtype is not None and any(
        isinstance(x, torch.Tensor) and x.dtype is not dtype for x in arguments[:3]
    )


def _autocast_dtype(device: str) -> Any:
    """None where autocast is off."""
    if device not in ("cpu", "cuda"):
        return None
    if hasattr(torch, "get_autocast_dtype"):
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if device == "cuda":  # before torch 2.4
        return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
    return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
