"""From the arguments of a call to the library and back: the complete way, through ctypes.

`forward` and `backward` take every argument by position, in the order of `Arguments` and of
`BackwardArguments` with the fields of `Options` in their place. The faster functions of `_fast`
take the same and hand back here what they do not know.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Callable, NamedTuple

from . import _library, _options
from ._library import ABSENT, BACKWARD, FLOAT32, FORWARD
from ._tensors import Adapter, Described, adapter_of


class Options(NamedTuple):
    """What forward and backward take alike, besides q, k, v."""

    cu_seqlens_q: Any
    cu_seqlens_k: Any
    max_seqlen_q: Any
    max_seqlen_k: Any
    seqused_q: Any
    seqused_k: Any
    causal: Any
    window: Any
    scale: Any
    softcap: Any
    alibi_slopes: Any
    deterministic: Any


class Arguments(NamedTuple):
    """Everything that `attention` and `attention_varlen` take."""

    q: Any
    k: Any
    v: Any
    options: Options
    out: Any
    return_lse: Any

    @classmethod
    def of(cls, *positional: Any) -> Arguments:
        q, k, v, *options, out, return_lse = positional
        return cls(q, k, v, Options(*options), out, return_lse)


class BackwardArguments(NamedTuple):
    """Everything that `attention_backward` takes."""

    dout: Any
    q: Any
    k: Any
    v: Any
    out: Any
    lse: Any
    dlse: Any
    options: Options
    dq: Any
    dk: Any
    dv: Any

    @classmethod
    def of(cls, *positional: Any) -> BackwardArguments:
        dout, q, k, v, out, lse, dlse, *options, dq, dk, dv = positional
        return cls(dout, q, k, v, out, lse, dlse, Options(*options), dq, dk, dv)


class _Numbers(NamedTuple):
    """The options that are no tensors, as the library's numbers."""

    max_seqlen_q: int
    max_seqlen_k: int
    window_left: int
    window_right: int
    scale: float
    softcap: float
    causal: bool
    deterministic: bool


def numbers_of(options: Options, shape_q: tuple[int, ...]) -> _Numbers:
    left, right = _options.window_sides(options.window)
    d = max(shape_q[-1], 1) if shape_q else 1
    scale, deterministic = options.scale, options.deterministic
    return _Numbers(
        _options.length(options.max_seqlen_q, "max_seqlen_q"),
        _options.length(options.max_seqlen_k, "max_seqlen_k"),
        left,
        right,
        d**-0.5 if scale is None else _options.real(scale, "scale"),
        _options.real(options.softcap, "softcap"),
        _options.flag(options.causal, "causal"),
        False if deterministic is None else _options.flag(deterministic, "deterministic"),
    )


def inputs_of(arguments: Arguments | BackwardArguments) -> dict[str, Any]:
    """What both directions read, in the order of anyflash_problem without o and lse."""
    options = arguments.options
    return {
        "q": arguments.q,
        "k": arguments.k,
        "v": arguments.v,
        "alibi_slopes": options.alibi_slopes,
        "cu_seqlens_q": options.cu_seqlens_q,
        "cu_seqlens_k": options.cu_seqlens_k,
        "seqused_q": options.seqused_q,
        "seqused_k": options.seqused_k,
    }


def describe_inputs(
    arguments: Arguments | BackwardArguments, describe: Callable[[Any, str], Described]
) -> list[Described | None]:
    return [
        None if tensor is None and name not in ("q", "k", "v") else describe(tensor, name)
        for name, tensor in inputs_of(arguments).items()
    ]


def describe_tensor(tensor: Any, name: str, *, written: bool = False) -> Described:
    described = adapter_of(tensor, name).describe(tensor, name, written=written)
    if not described.shape:  # the library's sign for an absent tensor
        raise ValueError(f"{name} is a single number (rank 0); it must have dimensions")
    return described


def _packed(described: Described | None) -> bytes:
    return ABSENT if described is None else _library.pack_tensor(*described[:5])


def pack(
    inputs: list[Described | None],
    o: Described | None,
    lse: Described | None,
    numbers: _Numbers,
    gradients: Sequence[Described | None] | None = None,
) -> bytes:
    """An anyflash_problem; with gradients (dout, dlse, dq, dk, dv), of the backward."""
    q, k, v, *rest = [_packed(one) for one in inputs]
    tensors = (q, k, v, _packed(o), _packed(lse), *rest)
    if gradients is None:
        return _library.pack_problem(FORWARD, tensors, None, *numbers)
    return _library.pack_problem(BACKWARD, tensors, tuple(map(_packed, gradients)), *numbers)


def _refuse_gradients(arguments: Arguments | BackwardArguments) -> None:
    given = {**arguments._asdict(), "alibi_slopes": arguments.options.alibi_slopes}
    for name in ("q", "k", "v", "alibi_slopes", "out", "lse", "dout", "dlse"):
        tensor = given.get(name)
        if tensor is not None and adapter_of(tensor, name).needs_grad(tensor):
            raise NotImplementedError(
                f"asked: gradients through a function that has none ({name}.requires_grad is "
                "True); available: gradients of attention and attention_varlen by q, k and v, if "
                "q is a torch tensor; missing: this one: call it under torch.no_grad(), or detach "
                "the tensors"
            )


def _check_out(arguments: Arguments) -> Described | None:
    out = arguments.out
    return None if out is None else describe_tensor(out, "out", written=True)


class _Read(NamedTuple):
    """The arguments of a call as the library's numbers."""

    inputs: list[Described | None]
    out: Described | None
    numbers: _Numbers
    adapter: Adapter
    q: Described
    v: Described


def _read(arguments: Arguments) -> _Read:
    _options.flag(arguments.return_lse, "return_lse")
    inputs = describe_inputs(arguments, describe_tensor)
    q, v = inputs[0], inputs[2]
    assert q is not None and v is not None
    numbers = numbers_of(arguments.options, q.shape)
    return _Read(inputs, _check_out(arguments), numbers, adapter_of(arguments.q, "q"), q, v)


class _Outputs(NamedTuple):
    o: Any
    lse: Any
    o_described: Described
    lse_described: Described | None

    def results(self, adapter: Adapter, out: Any) -> Any:
        """What the user gets: o, or (o, lse)."""
        o = adapter.result(self.o) if out is None else out
        return o if self.lse is None else (o, adapter.result(self.lse))


def _allocate(
    arguments: Arguments, adapter: Adapter, q: Described, v: Described, out: Described | None
) -> _Outputs:
    """out, or a new tensor; and L if it is wanted. Shapes: the problem has been validated."""
    o, lse, lse_described = arguments.out, None, None
    if out is None:
        o = adapter.empty(arguments.q, q.shape[:-1] + v.shape[-1:], q.dtype)
        out = adapter_of(o, "out").describe(o, "out")
    if arguments.return_lse:
        rows, heads = q.shape[:-2], q.shape[-2:-1]
        lse = adapter.empty(arguments.q, rows[:-1] + heads + rows[-1:], FLOAT32)
        lse_described = adapter_of(lse, "lse").describe(lse, "lse")
    return _Outputs(o, lse, out, lse_described)


def forward(*positional: Any) -> Any:
    """O, or (O, L), with gradients where q's library has them."""
    arguments = Arguments.of(*positional)
    routed = adapter_of(arguments.q, "q").route(arguments)
    if routed is not None:
        return routed(arguments)
    _refuse_gradients(arguments)
    return compute(*positional)


def compute(*positional: Any) -> Any:
    """O, or (O, L), without gradients. Everything is validated before the first allocation."""
    arguments = Arguments.of(*positional)
    inputs, out, numbers, adapter, q, v = _read(arguments)
    _library.make_plan(pack(inputs, out, None, numbers), None)

    outputs = _allocate(arguments, adapter, q, v, out)
    problem = pack(inputs, outputs.o_described, outputs.lse_described, numbers)
    _run(problem, arguments.q, adapter, q)
    return outputs.results(adapter, arguments.out)


def _run(problem: bytes, like: Any, adapter: Adapter, q: Described) -> None:
    """Plans with the memory of the outputs known, and runs on the caller's stream."""
    plan = _library.make_plan(problem, None)
    workspace, workspace_data = None, 0
    if plan.workspace_bytes:
        # float32 elements, and room to align.
        count = plan.workspace_bytes // 4 + 65
        workspace = adapter.empty(like, (count,), FLOAT32)
        data = adapter_of(workspace, "workspace").describe(workspace, "workspace").data
        workspace_data = (data + 255) // 256 * 256
    stream = adapter.stream(q.device)
    _library.check(
        _library.library().anyflash_run(ctypes.byref(plan), problem, workspace_data, stream)
    )


def reference(*positional: Any) -> Any:
    """O, or (O, L), by the plain formula in double on the CPU."""
    arguments = Arguments.of(*positional)
    _refuse_gradients(arguments)
    inputs, out, numbers, adapter, q, v = _read(arguments)
    outputs = _allocate(arguments, adapter, q, v, out)
    problem = pack(inputs, outputs.o_described, outputs.lse_described, numbers)
    _library.check(_library.library().anyflash_reference(problem))
    return outputs.results(adapter, arguments.out)


# Gradients

_FORWARD_RESULTS = ("out", "lse")
_GIVEN_GRADIENTS = ("dout", "dlse")
_WANTED_GRADIENTS = ("dq", "dk", "dv")


class _BackwardCall:
    """One backward: its arguments read, its gradients allocated where they are not given."""

    def __init__(self, arguments: BackwardArguments) -> None:
        self.arguments = arguments
        self.inputs = describe_inputs(arguments, describe_tensor)
        q = self.inputs[0]
        assert q is not None
        self.q = q
        self.adapter = adapter_of(arguments.q, "q")
        options = arguments.options
        if options.deterministic is None:
            options = options._replace(deterministic=self.adapter.deterministic())
        self.numbers = numbers_of(options, q.shape)
        self.results = [self._optional(name) for name in _FORWARD_RESULTS]
        self.given = [self._optional(name) for name in _GIVEN_GRADIENTS]
        self.wanted = [self._optional(name, written=True) for name in _WANTED_GRADIENTS]

    def _optional(self, name: str, *, written: bool = False) -> Described | None:
        tensor = getattr(self.arguments, name)
        return None if tensor is None else describe_tensor(tensor, name, written=written)

    def problem(self) -> bytes:
        out, lse = self.results
        return pack(self.inputs, out, lse, self.numbers, [*self.given, *self.wanted])

    def allocate(self) -> list[Any]:
        """dq, dk, dv: the caller's, or new ones. The problem has been validated."""
        tensors = []
        for i, name in enumerate(_WANTED_GRADIENTS):
            tensor, like = getattr(self.arguments, name), self.inputs[i]
            if tensor is None:
                assert like is not None
                tensor = self.adapter.empty(self.arguments.q, like.shape, like.dtype)
                self.wanted[i] = adapter_of(tensor, name).describe(tensor, name)
            tensors.append(tensor)
        return tensors

    def returned(self, tensors: list[Any]) -> tuple[Any, ...]:
        return tuple(
            self.adapter.result(tensor) if getattr(self.arguments, name) is None else tensor
            for name, tensor in zip(_WANTED_GRADIENTS, tensors)
        )


def backward(*positional: Any) -> Any:
    """dQ, dK, dV; the library of q may want to see the call."""
    arguments = BackwardArguments.of(*positional)
    routed = adapter_of(arguments.q, "q").route(arguments)
    if routed is not None:
        return routed(arguments)
    _refuse_gradients(arguments)
    return compute_backward(*positional)


def compute_backward(*positional: Any) -> Any:
    """dQ, dK, dV. Everything is validated before the first allocation."""
    call = _BackwardCall(BackwardArguments.of(*positional))
    _library.make_plan(call.problem(), None)
    gradients = call.allocate()
    _run(call.problem(), call.arguments.q, call.adapter, call.q)
    return call.returned(gradients)


def reference_backward(*positional: Any) -> Any:
    """dQ, dK, dV by the plain formula in double on the CPU."""
    arguments = BackwardArguments.of(*positional)
    _refuse_gradients(arguments)
    call = _BackwardCall(arguments)
    gradients = call.allocate()
    _library.check(_library.library().anyflash_reference(call.problem()))
    return call.returned(gradients)
