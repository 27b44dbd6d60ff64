"""The functions that compute nothing: whether a call would run, how, and its kernels made ready.

All three take the same arguments.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Support(NamedTuple):
    """The answer of `supports`; true if the call would run."""

    supported: bool
    reason: str  # why not; empty if it would
    plan: Any  # anyflash_plan as a ctypes struct: row, grid, ...; None if it would not

    def __bool__(self) -> bool:
        return self.supported


def supports(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    *,
    seqused_q: Any = None,
    seqused_k: Any = None,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool | None = None,
    out: Any = None,
    return_lse: bool = False,
    dtype: Any = None,
    device: Any = None,
    backward: bool = False,
) -> Support:
    """Would `attention` (with cu_seqlens: `attention_varlen`) run, and how? Plans only.

    Arguments: those of the call, where each tensor may be a shape (a tuple of integers); then
      dtype: "float16", "bfloat16" or "float32", and
      device: "cpu", "cuda", "cuda:1", or "sm_86" for a GPU that need not be here. With tensors,
      device asks how they would do there.
      backward: asks about the gradients of that call (`attention_backward`, torch's autograd)
      instead; gradients are taken to be contiguous.

    Returns: a `Support`, true or false, with the reason and the plan. Every refusal of the call
      itself, of whatever kind, is a false answer.

    Raises: TypeError for a shape without dtype and device, ValueError for an unknown device.
    """
    from . import _call, _plan

    arguments = _call.Arguments.of(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q,
        seqused_k,
        causal,
        window,
        scale,
        softcap,
        alibi_slopes,
        deterministic,
        out,
        return_lse,
    )
    question = _plan.Question(arguments, dtype, device, backward)
    question.check()
    try:
        return Support(True, "", _plan.plan(question))
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        return Support(False, str(error), None)


def explain(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    *,
    seqused_q: Any = None,
    seqused_k: Any = None,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool | None = None,
    out: Any = None,
    return_lse: bool = False,
    dtype: Any = None,
    device: Any = None,
    backward: bool = False,
) -> str:
    """The plan of a call in words: row, grid, shared memory, flops, bytes, the machine's floor.

    Arguments: as `supports`. Raises: as the call itself.
    """
    from . import _call, _plan

    arguments = _call.Arguments.of(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q,
        seqused_k,
        causal,
        window,
        scale,
        softcap,
        alibi_slopes,
        deterministic,
        out,
        return_lse,
    )
    return _plan.explain(_plan.Question(arguments, dtype, device, backward))


def warm_up(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    *,
    seqused_q: Any = None,
    seqused_k: Any = None,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool | None = None,
    out: Any = None,
    return_lse: bool = False,
    dtype: Any = None,
    device: Any = None,
    backward: bool = False,
) -> None:
    """Loads the kernels of a call, and compiles those that the package was not built with.

    Nothing is launched. For whoever cannot wait in the first call: a server, or the capture of a
    CUDA graph. Which kernels they are (`explain` says it) depends on dtype, head dims, options and
    strides; not on lengths, but that Hopper has others for short sequences under a mask: where
    lengths vary, warm up the shortest and the longest.

    Arguments: as `supports`, of a device that is here ("cuda" is "cuda:0"); on the CPU there is
    nothing to load. backward: the kernels of the gradients too.

    Raises: as the call itself; ValueError for "sm_86".
    """
    from . import _call, _plan

    arguments = _call.Arguments.of(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q,
        seqused_k,
        causal,
        window,
        scale,
        softcap,
        alibi_slopes,
        deterministic,
        out,
        return_lse,
    )
    _plan.warm_up(_plan.Question(arguments, dtype, device, backward))
