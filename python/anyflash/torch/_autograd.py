"""Gradients of a call on plain tensors in eager mode: classic autograd Functions.

Arguments stand in the order of `_call.Arguments` and `_call.BackwardArguments`.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import _backend
from .._call import Arguments

_NOT_GIVEN = (None, None, None)  # dq, dk, dv: allocated by the call


def forward(arguments: Arguments) -> Any:
    """O, or (O, L), with a gradient function. q, k or v requires grad."""
    if arguments.out is not None:
        raise ValueError(
            "out is given and a gradient is wanted; autograd keeps the output for the backward: "
            "leave out away, or call under torch.no_grad()"
        )
    slopes = arguments.alibi_slopes
    if isinstance(slopes, torch.Tensor) and slopes.requires_grad:
        raise NotImplementedError(
            "asked: gradients of alibi_slopes (alibi_slopes.requires_grad is True); available: "
            "gradients of q, k and v; missing: this one: pass alibi_slopes.detach()"
        )
    return Attention.apply(*arguments)


def deterministic_now(given: Any) -> Any:
    """What the backward of a forward that runs now shall do."""
    return torch.are_deterministic_algorithms_enabled() if given is None else given


def with_unit_stride(dout: Any) -> Any:
    """dO as the kernels read it: autograd hands over any strides, often those of an expanded
    scalar."""
    if dout.stride(-1) == 1 or dout.shape[-1] <= 1:
        return dout
    return dout.contiguous()


class Attention(torch.autograd.Function):  # type: ignore[misc]
    """The tensors of a call are kept by save_for_backward: hooks of saved tensors (offloading,
    checkpointing) see them, and one changed in place since is an error."""

    @staticmethod
    def forward(ctx: Any, *positional: Any) -> Any:
        arguments = Arguments(*positional)
        o, lse = _backend.compute(*arguments[:-1], True)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            arguments.q,
            arguments.k,
            arguments.v,
            o,
            lse,
            arguments.cu_seqlens_q,
            arguments.cu_seqlens_k,
            arguments.seqused_q,
            arguments.seqused_k,
            arguments.alibi_slopes,
        )
        ctx.lengths = arguments.max_seqlen_q, arguments.max_seqlen_k
        ctx.score = arguments.causal, arguments.window, arguments.scale, arguments.softcap
        ctx.deterministic = deterministic_now(arguments.deterministic)
        return (o, lse) if arguments.return_lse else o

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any = None) -> Any:
        if dout is None and dlse is None:
            return (None,) * len(Arguments._fields)
        q, k, v, o, lse, cu_q, cu_k, used_q, used_k, slopes = ctx.saved_tensors
        if dout is None:  # only L was used
            dout = o.new_zeros((1,) * (o.dim() - 1) + o.shape[-1:]).expand(o.shape)
        if dlse is not None:
            dlse = dlse.contiguous()
        given = (with_unit_stride(dout), q, k, v, o, lse, dlse, cu_q, cu_k, *ctx.lengths)
        arguments = (*given, used_q, used_k, *ctx.score, slopes, ctx.deterministic, *_NOT_GIVEN)
        if torch.is_grad_enabled():  # create_graph: the gradients get a gradient function, too
            gradients = Gradients.apply(*arguments)
        else:
            gradients = _backend.backward(*arguments)
        wanted = ctx.needs_input_grad
        return (
            *(gradient if wanted[i] else None for i, gradient in enumerate(gradients)),
            *(None,) * (len(Arguments._fields) - 3),
        )


class Gradients(torch.autograd.Function):  # type: ignore[misc]
    """The backward as a function of its own, for who asks for a graph of it: it ends here."""

    @staticmethod
    def forward(ctx: Any, *positional: Any) -> Any:
        return _backend.backward(*positional)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(
            "asked: second derivatives of attention (a gradient of its backward); available: "
            "first derivatives; missing: the backward of the backward"
        )
