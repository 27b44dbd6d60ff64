"""Gradients of a call on plain tensors in eager mode: classic autograd Functions."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from .. import _backend
from .._call import Arguments, Options

# Positions in `Options`
_CU_SEQLENS_Q = Options._fields.index("cu_seqlens_q")
_ALIBI_SLOPES = Options._fields.index("alibi_slopes")
_OPTIONAL_TENSORS = tuple(
    Options._fields.index(name)
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "alibi_slopes")
)


def forward(arguments: Arguments) -> Any:
    """O, or (O, L), with a gradient function. q, k or v requires grad."""
    if arguments.out is not None:
        raise ValueError(
            "out is given and a gradient is wanted; autograd keeps the output for the backward: "
            "leave out away, or call under torch.no_grad()"
        )
    q, k, v, options = arguments[:4]
    refuse_gradient_of_slopes(options.alibi_slopes)
    o, lse = _backend.compute(q, k, v, *options, None, True)
    deterministic = deterministic_now(options.deterministic)
    return attach(q, k, v, (o, lse, arguments.return_lse), (*options[:-1], deterministic))


def refuse_gradient_of_slopes(slopes: Any) -> None:
    if isinstance(slopes, torch.Tensor) and slopes.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(
            "asked: gradients of alibi_slopes (alibi_slopes.requires_grad is True); available: "
            "gradients of q, k and v; missing: this one: pass alibi_slopes.detach()"
        )


def refuse_forward_mode(arguments: Arguments) -> None:
    """Dual tensors, whose tangent would be lost."""
    if forward_ad._current_level < 0:
        return
    for name, x in zip("qkv", arguments):
        if isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(
                f"asked: forward-mode differentiation of attention (jvp; {name} has a tangent); "
                "available: reverse mode (backward, grad, vjp); missing: a formula for tangents"
            )


def refuse_second_derivatives(ctx: Any, *gradients: Any) -> Any:
    """The backward of the backward."""
    raise NotImplementedError(
        "asked: second derivatives of attention (a gradient of its backward); available: first "
        "derivatives; missing: the backward of the backward"
    )


def deterministic_now(given: Any) -> Any:
    """What the backward of a forward that runs now shall do."""
    return torch.are_deterministic_algorithms_enabled() if given is None else given


def with_unit_stride(dout: Any) -> Any:
    """dO as the kernels read it: autograd hands over any strides, often those of an expanded
    scalar."""
    if dout.stride(-1) == 1 or dout.shape[-1] <= 1:
        return dout
    return dout.contiguous()


def zeros_like_expanded(o: Any) -> Any:
    """The gradient of an O that was not used: one row of zeros, seen everywhere."""
    return o.new_zeros((1,) * (o.dim() - 1) + o.shape[-1:]).expand(o.shape)


class Attention(torch.autograd.Function):  # type: ignore[misc]
    """Gives what has been computed a gradient function.

    The tensors of a call are kept by save_for_backward: hooks of saved tensors (offloading,
    checkpointing) see them, and one changed in place since is an error.
    """

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, results: Any, options: Any) -> Any:
        """results: (o, lse, is L wanted). options: a tuple in the order of `Options`."""
        o, lse, return_lse = results
        ctx.set_materialize_grads(False)
        if options[_CU_SEQLENS_Q] is None and options[_ALIBI_SLOPES] is None:
            ctx.save_for_backward(q, k, v, o, lse)
        else:
            ctx.save_for_backward(q, k, v, o, lse, *(options[i] for i in _OPTIONAL_TENSORS))
            options = tuple(
                None if i in _OPTIONAL_TENSORS else option for i, option in enumerate(options)
            )
        ctx.options = options
        return (o, lse) if return_lse else o

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any = None) -> Any:
        if dout is None and dlse is None:
            return None, None, None, None, None
        q, k, v, o, lse, *optional = ctx.saved_tensors
        options = ctx.options
        if optional:
            options = list(options)
            for i, tensor in zip(_OPTIONAL_TENSORS, optional):
                options[i] = tensor
        dout = zeros_like_expanded(o) if dout is None else with_unit_stride(dout)
        if dlse is not None:
            dlse = dlse.contiguous()
        # create_graph: the gradients get a gradient function, too.
        function = Gradients.apply if torch.is_grad_enabled() else _backend.backward
        dq, dk, dv = function(dout, q, k, v, o, lse, dlse, *options, None, None, None)
        wanted = ctx.needs_input_grad
        return (
            dq if wanted[0] else None,
            dk if wanted[1] else None,
            dv if wanted[2] else None,
            None,
            None,
        )


# Function.apply without its checks, which `_route` has made.
attach = super(torch.autograd.Function, Attention).apply


class Gradients(torch.autograd.Function):  # type: ignore[misc]
    """The backward as a function of its own, for who asks for a graph of it: it ends here."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        return _backend.backward(*arguments)

    backward = staticmethod(refuse_second_derivatives)
