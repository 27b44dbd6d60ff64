"""Plain `torch.nn.functional.scaled_dot_product_attention` on anyflash, when it is asked for.

The flash kernels that torch's SDPA dispatches to are replaced by ours in torch's dispatcher,
forward and backward. All above them stays torch's own: the choice between flash and other kernels,
autograd, `torch.compile`, autocast, vmap, checkpointing. What ours does not take goes to the kernel
that it replaced, call by call.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple

import torch

from . import api, planning

NAME = "anyflash"  # in torch's registry of flash kernels
LARGEST_HEAD_DIM = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def enable_sdpa() -> None:
    """Lets `torch.nn.functional.scaled_dot_product_attention` run on anyflash, in this process.

    It replaces torch's flash kernels on the CPU, and flash and cuDNN on NVIDIA GPUs, forward and
    backward: so modules such as `torch.nn.MultiheadAttention` and code that `torch.compile` has
    compiled, before or after, follow too. `is_causal` keeps torch's meaning (query i sees keys
    j <= i). A mask, dropout, float64 or a head dim above 256 run on torch's kernels as before;
    `explain_sdpa` says for given arguments which kernel runs, and why. Where torch has a registry
    of flash kernels, this is `torch.nn.attention.activate_flash_attention_impl("anyflash")`, which
    turns off another one that is active. Enabling twice is enabling once.

    Raises: NotImplementedError: this torch cannot replace kernels and keep the old ones.
    """
    with _lock:
        if _active_name() != NAME:
            _activate(NAME)


def disable_sdpa() -> None:
    """Gives torch its own kernels back; nothing happens if anyflash is not enabled."""
    with _lock:
        if _active_name() == NAME:
            _activate(None)


@contextlib.contextmanager
def sdpa() -> Iterator[None]:
    """`enable_sdpa` for a block, then what was active before; blocks may be nested.

    Kernels belong to the process, not to a thread: blocks in several threads must not overlap.
    """
    before = _active_name()
    enable_sdpa()
    try:
        yield
    finally:
        with _lock:
            if _active_name() != before:
                _activate(before)


def sdpa_enabled() -> bool:
    """Is anyflash enabled for torch's SDPA?"""
    return _active_name() == NAME


def explain_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str:
    """Which kernel `scaled_dot_product_attention` would run for these arguments, and why not ours.

    Arguments: those of `torch.nn.functional.scaled_dot_product_attention`. Nothing is computed.

    Returns: a text whose first word is "anyflash", with the plan, or "torch", with the reason.
    """
    backend = _choice_of_torch(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
    )
    try:
        _check(query, key, value, attn_mask, dropout_p)
        if backend not in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
            raise NotImplementedError(_other_backend(query, key, value, backend))
        q, k, v, window = _our_arguments(query, key, value, is_causal)
        plan = planning.explain(q, k, v, window=window, scale=scale, return_lse=True)
    except NotImplementedError as error:
        return f"torch ({backend}): {error}"
    if not sdpa_enabled():
        return f"torch ({backend}): anyflash is not enabled: anyflash.torch.enable_sdpa()"
    return f"anyflash, in the place of torch's {backend}:\n{plan}"


def _choice_of_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> str:
    """The name of the kernel that torch chooses; anyflash replaces some, and does not choose."""
    number = torch._fused_sdp_choice(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    members = torch.nn.attention.SDPBackend.__members__
    return next((name for name, member in members.items() if int(member) == number), str(number))


def _other_backend(query: Any, key: Any, value: Any, backend: str) -> str:
    """Why torch does not come to a flash kernel, as far as the arguments tell."""
    if not query.dim() == key.dim() == value.dim() == 4:
        return f"query has shape {tuple(query.shape)}; flash kernels want [batch, heads, seqlen, d]"
    if query.shape[-1] != value.shape[-1]:
        return (
            f"query has head dim {query.shape[-1]}, value {value.shape[-1]}; torch's flash kernels "
            "want them equal (anyflash.attention does not)"
        )
    if query.shape[1] != key.shape[1]:
        return (
            f"{query.shape[1]} query heads, {key.shape[1]} key heads, without enable_gqa=True or "
            "more than torch's flash kernels take of it"
        )
    if not (query.stride(-1) == key.stride(-1) == value.stride(-1) == 1):
        return "the last dimension of query, key and value must be contiguous for a flash kernel"
    return f"torch chooses {backend} (torch.nn.attention.sdpa_kernel, its own rules and priorities)"


# What ours takes, in torch's layout [B, H, N, d]


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
) -> None:
    """Raises NotImplementedError with the reason why a call goes to torch's kernel."""
    if attn_mask is not None:
        raise NotImplementedError(
            f"attn_mask {list(attn_mask.shape)} is given; anyflash takes is_causal, or windows by "
            "anyflash.attention"
        )
    if dropout_p != 0.0:
        raise NotImplementedError(f"dropout_p is {dropout_p}; anyflash has no dropout")
    if query.dtype not in _DTYPES:
        raise NotImplementedError(f"dtype is {query.dtype}; anyflash takes fp16, bf16 and fp32")
    if query.shape[-1] > LARGEST_HEAD_DIM:
        raise NotImplementedError(
            f"head dim is {query.shape[-1]}; anyflash takes up to {LARGEST_HEAD_DIM}"
        )
    if not (query.shape[-1] == value.shape[-1] and query.numel() and key.numel()):
        raise NotImplementedError(
            f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}: empty, "
            "or of different head dims"
        )


def _our_arguments(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int | None, int | None]]:
    """q, k, v [B, N, H, d] and the window. Views only.

    torch's causal mask starts in the top left corner, ours ends in the bottom right one: query i
    sees keys j <= i + M - N + right. Keys that no query sees are cut off, so that M <= N and
    right = N - M is no negative number.
    """
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if not is_causal:
        return q, k, v, (None, None)
    length = q.shape[1]
    k, v = k[:, :length], v[:, :length]
    return q, k, v, (None, length - k.shape[1])


def _forward(given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """O, laid out like query, and L [B, H, N]."""
    query = given["query"]
    q, k, v, window = _our_arguments(query, given["key"], given["value"], given["is_causal"])
    out = torch.empty_like(query)
    # torch's own autograd holds the graph, one level above.
    with torch.no_grad():
        _, lse = api.attention(
            q, k, v, window=window, scale=given["scale"], out=out.transpose(1, 2), return_lse=True
        )
    return out, lse


def _backward(given: dict[str, Any], empty: Callable[[Any], Any]) -> tuple[torch.Tensor, ...]:
    """dQ, dK, dV in the memory that `empty` gives for each; the forward may have been torch's."""
    query, key, value = given["query"], given["key"], given["value"]
    q, k, v, window = _our_arguments(query, key, value, given["is_causal"])
    dq, dk, dv = empty(query), empty(key), empty(value)
    seen = k.shape[1]
    dout = given["grad_out"]
    if dout.stride(-1) != 1:  # such as the gradient of a sum: one number, expanded
        dout = dout.contiguous()
    with torch.no_grad():
        api.attention_backward(
            dout.transpose(1, 2),
            q,
            k,
            v,
            given["out"].transpose(1, 2),
            given["logsumexp"].reshape(query.shape[:3]).contiguous(),  # cuDNN's: [B, H, N, 1]
            window=window,
            scale=given["scale"],
            dq=dq.transpose(1, 2),
            dk=dk.transpose(1, 2)[:, :seen],
            dv=dv.transpose(1, 2)[:, :seen],
        )
    for gradient in (dk, dv):  # of the keys that were cut off
        gradient[:, :, seen:].zero_()
    return dq, dk, dv


# The replaced operators. Each has a backward of its name with "_backward" behind it.


def _results_for_cpu(query: Any, key: Any, out: Any, lse: Any) -> Any:
    # Laid out as torch's kernel does it: compiled code relies on it.
    return out, lse.transpose(1, 2).contiguous().transpose(1, 2)


def _heads_inside(like: torch.Tensor) -> torch.Tensor:
    return torch.empty_permuted(like.shape, (0, 2, 1, 3), dtype=like.dtype, device=like.device)


def _results_of_flash(query: Any, key: Any, out: Any, lse: Any) -> Any:
    seed = torch.empty(2, dtype=torch.uint64, device=query.device)  # dropout's; nobody reads it
    offset = torch.empty((), dtype=torch.uint64, device=query.device)
    mask = torch.empty(0, dtype=query.dtype, device=query.device)
    return out, lse, None, None, query.shape[2], key.shape[2], seed, offset, mask


def _results_of_cudnn(query: Any, key: Any, out: Any, lse: Any) -> Any:
    seed, offset = torch.empty(2, dtype=torch.int64, device=query.device).unbind()
    return out, lse.unsqueeze(-1), None, None, query.shape[2], key.shape[2], seed, offset, None


class _Operator(NamedTuple):
    """A forward operator of torch's and what is its own in it and in its backward."""

    name: str
    dispatch_key: str
    results: Callable[[Any, Any, Any, Any], Any]  # around O and L; of query, key, O, L
    empty: Callable[[torch.Tensor], torch.Tensor]  # memory for a gradient


_FLASH_FOR_CPU = _Operator(
    "_scaled_dot_product_flash_attention_for_cpu", "CPU", _results_for_cpu, _heads_inside
)
_FLASH = _Operator(
    "_scaled_dot_product_flash_attention", "CUDA", _results_of_flash, torch.empty_like
)
_CUDNN = _Operator(
    "_scaled_dot_product_cudnn_attention", "CUDA", _results_of_cudnn, torch.empty_like
)


def _replace(library: Any, operator: _Operator, original_of: Callable[[str, str], Any]) -> None:
    """Puts our forward and backward in the place of torch's. original_of: the kernel there was."""
    key = operator.dispatch_key

    def forward(given: dict[str, Any]) -> Any:
        return operator.results(given["query"], given["key"], *_forward(given))

    def backward(given: dict[str, Any]) -> Any:
        return _backward(given, operator.empty)

    for name, compute in ((operator.name, forward), (f"{operator.name}_backward", backward)):
        kernel = _kernel(name, compute, original_of(f"aten::{name}", key))
        library.impl(name, kernel, key, with_keyset=True)


def _kernel(name: str, compute: Callable[[dict[str, Any]], Any], original: Any) -> Any:
    """A kernel of the dispatcher: ours, which takes the operator's arguments by their names, or
    for what it does not take torch's own."""
    arguments = getattr(torch.ops.aten, name).default._schema.arguments
    names = [argument.name for argument in arguments]
    # The dispatcher leaves out what has its default.
    defaults = {x.name: x.default_value for x in arguments if x.has_default_value()}

    def kernel(keys: Any, *positional: Any, **named: Any) -> Any:
        given = {**defaults, **dict(zip(names, positional)), **named}
        try:
            if given.get("return_debug_mask"):
                raise NotImplementedError("return_debug_mask: only torch's kernel has it")
            mask = given.get("attn_mask", given.get("attn_bias"))
            _check(given["query"], given["key"], given["value"], mask, given["dropout_p"])
            return compute(given)
        except NotImplementedError:
            return original.call_boxed(keys, *positional, **named)

    return kernel


class _Replacement:
    """Our kernels in torch's dispatcher until `remove`; what torch's registry calls a handle."""

    def __init__(self) -> None:
        if not hasattr(torch.library, "get_kernel"):
            raise NotImplementedError(
                f"asked: SDPA on anyflash; available: torch {torch.__version__}; missing: "
                "torch.library.get_kernel of newer versions, which keeps the kernel that a call "
                "falls back to; anyflash.attention itself works"
            )
        self.library: Any = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*previously registered kernel")
            for operator in (_FLASH_FOR_CPU, _FLASH, _CUDNN):
                if operator.dispatch_key == "CPU" or torch.version.cuda is not None:
                    _replace(self.library, operator, torch.library.get_kernel)

    def remove(self) -> None:
        self.library._destroy()


# The registry: torch's where it has one, else a variable of ours


_lock = threading.RLock()
_own_handle: _Replacement | None = None  # only where torch has no registry
_registry: Any = torch.nn.attention
_HAS_REGISTRY = all(
    hasattr(_registry, name)
    for name in (
        "register_flash_attention_impl",
        "activate_flash_attention_impl",
        "restore_flash_attention_impl",
        "current_flash_attention_impl",
    )
)
if _HAS_REGISTRY:  # makes the name known, and no more
    _registry.register_flash_attention_impl(NAME, register_fn=_Replacement)


def _active_name() -> str | None:
    if _HAS_REGISTRY:
        return _registry.current_flash_attention_impl()  # type: ignore[no-any-return]
    return NAME if _own_handle is not None else None


def _activate(name: str | None) -> None:
    """Makes one implementation active, or with None torch's own."""
    global _own_handle
    if _HAS_REGISTRY:
        if name is None:
            _registry.restore_flash_attention_impl()
        else:
            _registry.activate_flash_attention_impl(name)
        return
    if _own_handle is not None:
        _own_handle.remove()
    _own_handle = None if name is None else _Replacement()
