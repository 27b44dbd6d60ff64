"""What a call would do, without doing it: of tensors, or of shapes with a dtype and a device."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from . import _library, _options
from ._call import Arguments, describe_inputs, describe_tensor, inputs_of, numbers_of, pack
from ._library import CPU, CUDA, FLOAT32, Device, Plan
from ._tensors import Described, adapter_of, contiguous_strides


class Question(NamedTuple):
    """A call, and where. backward: the one that follows it is meant."""

    arguments: Arguments
    dtype: Any
    device: Any
    backward: Any

    def check(self) -> None:
        """Refuses what has no answer: no device, no dtype, an unknown one."""
        _options.flag(self.backward, "backward")
        if self.device is not None:
            _parse_device(self.device)
        if self.dtype is not None:
            _dtype_code(self.dtype)
        for name, value in {**inputs_of(self.arguments), "out": self.arguments.out}.items():
            if _is_shape(value) and (self.dtype is None or self.device is None):
                raise TypeError(f"{name} is a shape; dtype= and device= must be given with it")


def plan(question: Question) -> Plan:
    return _library.make_plan(*_problem(question))


def explain(question: Question) -> str:
    return _library.explain(*_problem(question))


def warm_up(question: Question) -> None:
    """Loads the kernels of the forward and, where it is meant, of the backward."""
    question.check()
    if question.device is not None and _parse_device(question.device)["capability"]:
        raise ValueError(
            f'device is {question.device!r}; kernels are loaded by a device that is here: "cpu", '
            '"cuda" or "cuda:N"'
        )
    forward = plan(question._replace(backward=False))
    plans = [forward, plan(question)] if question.backward else [forward]
    for one in plans:
        _library.warm_up(one)


class _Target(NamedTuple):
    """Where a plan is for: DLPack's (type, index), and the GPU if only described."""

    place: tuple[int, int]
    device: Device | None


_DEVICE = re.compile(r"cpu(?::0)?|cuda(?::(?P<index>\d{1,4}))?|sm_(?P<capability>\d{2,3})")


def _parse_device(device: Any) -> re.Match[str]:
    match = _DEVICE.fullmatch(str(device))
    if match is None:
        raise ValueError(f'device is {device!r}; it must be "cpu", "cuda", "cuda:N" or "sm_NN"')
    return match


def _target_of(device: Any) -> _Target:
    """ "cpu", "cuda", "cuda:1", "sm_86" (a GPU that need not be here), or a torch.device."""
    match = _parse_device(device)
    if match["capability"]:
        return _Target((CUDA, 0), _library.describe_gpu(int(match["capability"])))
    if match[0].startswith("cpu"):
        return _Target((CPU, 0), None)
    return _Target((CUDA, int(match["index"] or 0)), None)


def _is_shape(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(isinstance(n, int) for n in value)


def _dtype_code(dtype: Any) -> int:
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    code = _library.DTYPES.get(str(name).rpartition(".")[2])
    if code is None:
        raise TypeError(f"dtype is {dtype!r}; it must be float16, bfloat16, float32 or float64")
    return code


def _describe(value: Any, name: str, dtype: Any, target: _Target | None) -> Described:
    """A tensor where it is, or as if it were on the target; a shape as a contiguous tensor."""
    if not _is_shape(value):
        described = describe_tensor(value, name, written=name == "out")
        if target is None:
            return described
        # Memory elsewhere; only whether it starts on 16 bytes matters.
        return described._replace(data=described.data % 16, device=target.place)
    assert target is not None
    if name == "alibi_slopes":
        code = FLOAT32
    else:
        code = _dtype_code(dtype) if name in ("q", "k", "v", "out") else _library.INT32
    shape = tuple(value)
    return Described(0, code, target.place, shape, contiguous_strides(shape), None)


def _problem(question: Question) -> tuple[bytes, Device | None]:
    """Of a backward: O, L and all gradients as new tensors are, but for an `out` that is given."""
    question.check()
    arguments, dtype, device, backward = question
    target = None if device is None else _target_of(device)
    inputs = describe_inputs(arguments, lambda x, name: _describe(x, name, dtype, target))
    q, out, lse = inputs[0], None, None
    assert q is not None
    if arguments.out is not None:
        out = _describe(arguments.out, "out", dtype, target)
    if _options.flag(arguments.return_lse, "return_lse"):
        rows, heads = q.shape[:-2], q.shape[-2:-1]
        shape = rows[:-1] + heads + rows[-1:]
        lse = Described(0, FLOAT32, q.device, shape, contiguous_strides(shape), None)
    options = arguments.options
    if backward and options.deterministic is None and not _is_shape(arguments.q):
        options = options._replace(deterministic=adapter_of(arguments.q, "q").deterministic())
    gradients = [None] * 5 if backward else None
    problem = pack(inputs, out, lse, numbers_of(options, q.shape), gradients)
    return problem, target.device if target else None
