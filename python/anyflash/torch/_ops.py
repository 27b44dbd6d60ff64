"""The operators `anyflash::attention` and `anyflash::attention_backward` of torch's dispatcher.

Whatever traces, transforms or watches calls sees these: torch.compile and torch.export, torch.func,
modes and tensor subclasses, autocast. Plain eager calls do not come here. Both operators are
functional, and their fakes give the strides of the real results. Registered when this module is
first imported, by the first call that needs them.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from .. import _backend
from .._call import Arguments, BackwardArguments, Options
from ._autograd import (
    deterministic_now,
    refuse_forward_mode,
    refuse_gradient_of_slopes,
    refuse_second_derivatives,
    with_unit_stride,
    zeros_like_expanded,
)

if not hasattr(torch.library, "register_autograd"):
    raise NotImplementedError(
        f"asked: attention inside a transformation of torch {torch.__version__} (compile, "
        "torch.func, a mode, a tensor subclass); available: plain eager tensors there; missing: "
        "torch 2.4 or newer"
    )

_OPTIONS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "Tensor? seqused_q, Tensor? seqused_k, bool causal, SymInt? window_left, SymInt? window_right, "
    "float? scale, float softcap, Tensor? alibi_slopes, bool deterministic"
)
_LIBRARY = torch.library.Library("anyflash", "DEF")
# Kernels want contiguous last dimensions: a compiler must not choose other strides.
_TAGS = (torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag)
_LIBRARY.define(
    f"attention(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)", tags=_TAGS
)
_LIBRARY.define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"Tensor? dlse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_attention = torch.ops.anyflash.attention.default
_attention_backward = torch.ops.anyflash.attention_backward.default


# What a call becomes


def forward(arguments: Arguments) -> Any:
    """O, or (O, L), through the dispatcher."""
    if arguments.out is not None:
        raise NotImplementedError(
            "asked: out= inside a transformation of torch (compile, torch.func, a mode, a tensor "
            "subclass); available: results of the call's own; missing: an operator that writes: "
            "leave out away"
        )
    refuse_gradient_of_slopes(arguments.options.alibi_slopes)
    if not torch.compiler.is_compiling():
        refuse_forward_mode(arguments)
    operator = _FunctionalAttention.apply if _inside_functorch() else _attention
    o, lse = operator(*arguments[:3], *_spread(arguments.options))
    return (o, lse) if arguments.return_lse else o


def backward(arguments: BackwardArguments) -> Any:
    """dQ, dK, dV through the dispatcher."""
    if any(given is not None for given in arguments[-3:]):
        raise NotImplementedError(
            "asked: dq=, dk= or dv= inside a transformation of torch (compile, torch.func, a mode, "
            "a tensor subclass); available: results of the call's own; missing: an operator that "
            "writes: leave them away"
        )
    operator = _FunctionalBackward.apply if _inside_functorch() else _attention_backward
    return operator(*arguments[:7], *_spread(arguments.options))


def _inside_functorch() -> bool:
    """torch.func differentiates autograd Functions, torch.compile takes operators."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


# An operator's options: those of a call, but the window is two numbers and torch's switch has been
# asked

_WINDOW = Options._fields.index("window")


def _spread(options: Options) -> tuple[Any, ...]:
    deterministic = deterministic_now(options.deterministic)
    return (*options[:_WINDOW], *options.window, *options[_WINDOW + 1 : -1], deterministic)


def _gathered(spread: tuple[Any, ...]) -> tuple[Any, ...]:
    left, right = spread[_WINDOW : _WINDOW + 2]
    return (*spread[:_WINDOW], (left, right), *spread[_WINDOW + 2 :])


# Kernels


def _attention_kernel(q: Any, k: Any, v: Any, *options: Any) -> Any:
    return _backend.compute(q, k, v, *_gathered(options), None, True)


def _backward_kernel(*values: Any) -> Any:
    options = _gathered(values[7:])
    return _backend.compute_backward(*values[:7], *options, None, None, None)


def _attention_fake(q: Any, k: Any, v: Any, *options: Any) -> Any:
    o = q.new_empty((*q.shape[:-1], v.shape[-1]))
    rows, heads = q.shape[-3], q.shape[-2]
    return o, q.new_empty((*q.shape[:-3], heads, rows), dtype=torch.float32)


def _backward_fake(dout: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


# Gradients


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, Any]) -> None:
    q, k, v, cu_q, cu_k, max_q, max_k, used_q, used_k, *score, slopes, deterministic = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, cu_q, cu_k, used_q, used_k, slopes)
    ctx.lengths, ctx.score, ctx.deterministic = (max_q, max_k), tuple(score), deterministic


def _differentiate(backward: Any, ctx: Any, dout: Any, dlse: Any) -> Any:
    inputs = len(_attention._schema.arguments)
    if dout is None and dlse is None:
        return (None,) * inputs
    q, k, v, o, lse, cu_q, cu_k, used_q, used_k, slopes = ctx.saved_tensors
    dout = zeros_like_expanded(o) if dout is None else with_unit_stride(dout)
    if dlse is not None:
        dlse = dlse.contiguous()
    given = (dout, q, k, v, o, lse, dlse, cu_q, cu_k, *ctx.lengths)
    gradients = backward(*given, used_q, used_k, *ctx.score, slopes, ctx.deterministic)
    wanted = ctx.needs_input_grad
    return (
        *(gradient if wanted[i] else None for i, gradient in enumerate(gradients)),
        *(None,) * (inputs - 3),
    )


# Autocast: as torch's own attention does


def _autocast(device: str, q: Any, k: Any, v: Any, *options: Any) -> Any:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))
    dtype = torch.get_autocast_dtype(device)
    with torch._C._ExcludeDispatchKeyGuard(keys):
        return _attention(*(x.to(dtype) for x in (q, k, v)), *options)


# vmap: one more dimension of the batch


def _front(x: Any, dim: int | None, size: int) -> Any:
    """The mapped dimension first; a tensor that is not mapped, seen `size` times."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _folded(x: Any, dim: int | None, size: int) -> Any:
    return None if x is None else _front(x, dim, size).flatten(0, 1)


def _folded_slopes(slopes: Any, dim: int | None, size: int, batch: int) -> Any:
    if slopes is None or (dim is None and slopes.dim() == 1):
        return slopes
    each = _front(slopes, dim, size)  # [size, H] or [size, B, H]
    if each.dim() == 2:
        each = each[:, None].expand(size, batch, each.shape[-1])
    return each.flatten(0, 1)


def _vmap(operator: Any, tensors: int, info: Any, in_dims: tuple[Any, ...], *values: Any) -> Any:
    """tensors: how many stand first, all with the batch as their first dimension."""
    size = info.batch_size
    if values[tensors] is not None:  # cu_seqlens_q: the rows of packed sequences cannot be folded
        calls = [
            operator(*(x if d is None else x.select(d, i) for x, d in zip(values, in_dims)))
            for i in range(size)
        ]
        return tuple(map(torch.stack, zip(*calls))), (0,) * len(calls[0])
    folded = [_folded(x, d, size) for x, d in zip(values[:tensors], in_dims)]
    batch = folded[0].shape[0] // max(size, 1)
    *options, slopes, deterministic = values[tensors:]
    slopes = _folded_slopes(slopes, in_dims[-2], size, batch)
    computed = operator(*folded, *options, slopes, deterministic)
    return tuple(x.unflatten(0, (size, batch)) for x in computed), (0,) * len(computed)


# The same for torch.func


class _FunctionalAttention(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(*values: Any) -> Any:
        return _attention(*values)

    setup_context = staticmethod(_keep)

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any) -> Any:
        return _differentiate(_FunctionalBackward.apply, ctx, dout, dlse)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *values: Any) -> Any:
        return _vmap(_FunctionalAttention.apply, 3, info, in_dims, *values)


class _FunctionalBackward(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(*values: Any) -> Any:
        return _attention_backward(*values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    backward = staticmethod(refuse_second_derivatives)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *values: Any) -> Any:
        return _vmap(_FunctionalBackward.apply, 7, info, in_dims, *values)


def _register() -> None:
    library = torch.library
    for operator, kernel, fake in (
        (_attention, _attention_kernel, _attention_fake),
        (_attention_backward, _backward_kernel, _backward_fake),
    ):
        name = operator._schema.name.rpartition("::")[2]
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, kernel, key)
        library.register_fake(f"anyflash::{name}", fake, lib=_LIBRARY)
        if hasattr(library, "register_vmap"):  # torch >= 2.5
            tensors = 3 if operator is _attention else 7
            rule = functools.partial(_vmap, operator, tensors)
            library.register_vmap(f"anyflash::{name}", rule, lib=_LIBRARY)
    library.register_autograd(
        "anyflash::attention",
        functools.partial(_differentiate, _attention_backward),
        setup_context=_keep,
        lib=_LIBRARY,
    )
    library.register_autograd(
        "anyflash::attention_backward", refuse_second_derivatives, lib=_LIBRARY
    )
    for device in ("cpu", "cuda"):
        rule = functools.partial(_autocast, device)
        _LIBRARY.impl("attention", rule, f"Autocast{device.upper()}")


_register()
