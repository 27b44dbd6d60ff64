"""The functions that compute. Each says what it computes, on what, and what it refuses."""

from __future__ import annotations

from typing import Any, Literal, TypeVar, overload

from . import _backend

T = TypeVar("T")


@overload
def attention(
    q: T,
    k: Any,
    v: Any,
    *,
    causal: bool = ...,
    window: tuple[int | None, int | None] = ...,
    scale: float | None = ...,
    softcap: float = ...,
    alibi_slopes: Any = ...,
    deterministic: bool | None = ...,
    out: Any = ...,
    return_lse: Literal[False] = ...,
) -> T: ...


@overload
def attention(
    q: T,
    k: Any,
    v: Any,
    *,
    causal: bool = ...,
    window: tuple[int | None, int | None] = ...,
    scale: float | None = ...,
    softcap: float = ...,
    alibi_slopes: Any = ...,
    deterministic: bool | None = ...,
    out: Any = ...,
    return_lse: Literal[True],
) -> tuple[T, T]: ...


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool | None = None,
    out: Any = None,
    return_lse: bool = False,
) -> Any:
    """O = softmax(mask(softcap(scale Q K^T) + ALiBi)) V, exact, without the matrix of scores.

    Arguments:
      q: [B, N, H, d], float16 or bfloat16, on the CPU also float32; any strides with a contiguous
        last dimension. torch, NumPy (bfloat16 through ml_dtypes), CuPy, JAX on the CPU, or any
        object with __dlpack__.
      k: [B, M, Hk, d] and v: [B, M, Hk, dv], dtype and device of q. H is a multiple of Hk: H / Hk
        query heads share one key head. d and dv from 1 to 256.
      causal: query i sees keys j <= i + M - N: the last query sees every key.
      window: (left, right) in keys, None is unbounded: query i sees keys j with
        i + M - N - left <= j <= i + M - N + right. causal is right = 0.
      scale: of Q K^T; None: d ** -0.5.
      softcap: S becomes softcap * tanh(S / softcap) before ALiBi and mask; 0: off.
      alibi_slopes: float32 [H] or [B, H]: S -= slope * |i + M - N - j|.
      deterministic: for gradients; this forward always gives the same bits for the same input.
      out: receives O: [B, N, H, dv], dtype and device of q, memory of its own.
      return_lse: also return L.

    Returns: O [B, N, H, dv], a tensor of q's library on q's device, computed on the caller's
      current stream; with return_lse (O, L), L = log(sum(exp(S))) float32 [B, H, N], natural
      logarithm. A query that sees no key has O = 0, L = -inf.

    Raises: ValueError (shapes, values), TypeError (kinds of objects, mixed dtypes or devices),
      NotImplementedError (asked / available / missing), RuntimeError (driver, compiler),
      MemoryError. Nothing is written then.

    Source: FlashAttention-2 (arXiv 2307.08691), Algorithm 1.
    """
    forward = _backend.traced_forward if _backend.compiling() else _backend.forward
    return forward(
        q,
        k,
        v,
        None,
        None,
        0,
        0,
        None,
        None,
        causal,
        window,
        scale,
        softcap,
        alibi_slopes,
        deterministic,
        out,
        return_lse,
    )


@overload
def attention_varlen(
    q: T,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    seqused_q: Any = ...,
    seqused_k: Any = ...,
    causal: bool = ...,
    window: tuple[int | None, int | None] = ...,
    scale: float | None = ...,
    softcap: float = ...,
    alibi_slopes: Any = ...,
    deterministic: bool | None = ...,
    out: Any = ...,
    return_lse: Literal[False] = ...,
) -> T: ...


@overload
def attention_varlen(
    q: T,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    seqused_q: Any = ...,
    seqused_k: Any = ...,
    causal: bool = ...,
    window: tuple[int | None, int | None] = ...,
    scale: float | None = ...,
    softcap: float = ...,
    alibi_slopes: Any = ...,
    deterministic: bool | None = ...,
    out: Any = ...,
    return_lse: Literal[True],
) -> tuple[T, T]: ...


def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
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
) -> Any:
    """`attention` of many sequences of different lengths, packed one after the other.

    Arguments (others as in `attention`):
      q: [total_q, H, d]; k: [total_k, Hk, d]; v: [total_k, Hk, dv].
      cu_seqlens_q, cu_seqlens_k: int32 [B + 1] on q's device, running sums of the lengths: sequence
        b has rows cu_seqlens[b] to cu_seqlens[b + 1] - 1. Empty sequences are allowed; rows past
        the last entry are neither read nor written.
      max_seqlen_q, max_seqlen_k: upper bounds of the lengths. On the GPU a precondition: rows past
        a bound that is too small are not computed; on the CPU checked.
      seqused_q, seqused_k: int32 [B], rows of each sequence that count; the others get O = 0,
        L = -inf. None: all.

    Returns: O [total_q, H, dv]; with return_lse (O, L), L float32 [H, total_q].

    Raises: as `attention`. The values of cu_seqlens and seqused are checked on the CPU only.
    """
    if cu_seqlens_q is None or cu_seqlens_k is None:
        name = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise TypeError(f"{name} is None; it must be an int32 tensor of shape [batch + 1]")
    forward = _backend.traced_forward if _backend.compiling() else _backend.forward
    return forward(
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


def reference(
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
) -> Any:
    """The same by the plain formula in double, on the CPU: the oracle. Slow, of every option.

    Takes the arguments of `attention` or, with cu_seqlens, of `attention_varlen`; also float64.
    Returns and raises likewise; NotImplementedError for tensors that are not on the CPU.
    """
    from . import _call

    return _call.reference(
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


def attention_backward(
    dout: Any,
    q: T,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    *,
    dlse: Any = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool | None = None,
    dq: Any = None,
    dk: Any = None,
    dv: Any = None,
) -> tuple[T, T, T]:
    """dQ, dK, dV of a loss, from its gradients by the results of a forward.

    For libraries without automatic differentiation, and for who writes his own; torch's autograd
    needs no more than `attention` itself.

    Arguments:
      dout: the loss's gradient by O, shaped like it; any strides with a contiguous last dimension.
      q, k, v, and the options: as given to `attention` or, with cu_seqlens, `attention_varlen`.
      out, lse: what that call returned, with return_lse=True.
      dlse: the loss's gradient by L: float32, contiguous, shaped like lse; None: L was not used.
      deterministic: dQ too is the same bit for bit from run to run (dK and dV always are); slower
        on GPUs. None: what the tensors' library is set to (torch.use_deterministic_algorithms).
      dq, dk, dv: receive the gradients: shape, dtype and device of q, k, v, memory of their own.

    Returns: (dQ, dK, dV), shaped like q, k, v. dK and dV of query heads that share a key head are
      summed in fp32. What sees nothing, or is seen by nothing, has gradient 0.

    Raises: as `attention`.

    Source: FlashAttention-2 (arXiv 2307.08691), Algorithm 2; dS = P (dP - delta + dL).
    """
    backward = _backend.traced_backward if _backend.compiling() else _backend.backward
    return backward(  # type: ignore[no-any-return]
        dout,
        q,
        k,
        v,
        out,
        lse,
        dlse,
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
        dq,
        dk,
        dv,
    )


def reference_backward(
    dout: Any,
    q: T,
    k: Any,
    v: Any,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    *,
    dlse: Any = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Any = None,
) -> tuple[T, T, T]:
    """dQ, dK, dV by the plain formula in double, on the CPU: the oracle. Needs no forward.

    Arguments and results: as `attention_backward`; also float64.
    """
    from . import _call

    return _call.reference_backward(  # type: ignore[no-any-return]
        dout,
        q,
        k,
        v,
        None,
        None,
        dlse,
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
        None,
        None,
        None,
        None,
    )
