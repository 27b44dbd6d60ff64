"""A case as torch tensors in its memory layout, and calls of anyflash on them.

Memory that belongs to no element (gaps, the rest of the storage) holds NaN, also around the
outputs: afterwards `untouched` says whether it still does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accuracy import Gradients, Result
from case_list import (
    PACKED_TAIL,
    Case,
    Cotangents,
    Inputs,
    make_cotangents,
    make_inputs,
    storage_of,
)


@dataclass
class Strided:
    """A tensor and the storage that it lies in."""

    storage: torch.Tensor
    view: torch.Tensor

    def untouched_around(self) -> bool:
        """True if memory that belongs to no element still holds NaN."""
        inside = torch.zeros(self.storage.shape, dtype=torch.bool, device=self.storage.device)
        view = self.view
        inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
        return bool(self.storage[~inside].isnan().all())


def strided(shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: str) -> Strided:
    """An uninitialised tensor in this layout: NaN everywhere."""
    elements, offset, strides = storage_of(shape, layout)
    storage = torch.full((elements,), math.nan, dtype=dtype, device=device)
    return Strided(storage, storage.as_strided(shape, strides, offset))


@dataclass
class Call:
    """One case on one device, ready to run."""

    case: Case
    inputs: Inputs  # the same values in float32, on the same device: what the rule is computed from
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: Strided
    options: dict[str, Any]

    def run(self, attention: Any, attention_varlen: Any) -> Result:
        """O and L by anyflash, into the poisoned output."""
        if self.case.packed is None:
            function, lengths = attention, ()
        else:
            function = attention_varlen
            lengths = tuple(self.options[name] for name in _LENGTHS)
        options = {name: x for name, x in self.options.items() if name not in _LENGTHS}
        o, lse = function(
            self.q, self.k, self.v, *lengths, out=self.out.view, return_lse=True, **options
        )
        assert o.data_ptr() == self.out.view.data_ptr(), "out= was not used"
        if self.case.packed is not None:
            lse[:, -PACKED_TAIL:] = math.nan  # allocated by the call, not written by it
        return Result(o, lse)

    def untouched(self) -> bool:
        """True if no memory around the output was written."""
        return self.out.untouched_around()


@dataclass
class BackwardCall:
    """One case's backward on one device, ready to run."""

    forward: Call
    cotangents: Cotangents  # float32, on the same device: what the rule is computed from
    dout: torch.Tensor
    dlse: torch.Tensor | None
    gradients: dict[str, Strided]  # dq, dk, dv

    def arguments(self, attention: Any, attention_varlen: Any) -> dict[str, Any]:
        """Runs the forward; what `attention_backward` takes, without dq, dk, dv."""
        call = self.forward
        result = call.run(attention, attention_varlen)
        tensors = {"q": call.q, "k": call.k, "v": call.v, "out": result.o, "lse": result.lse}
        return {"dout": self.dout, **tensors, "dlse": self.dlse, **call.options}

    def run(self, anyflash: Any, **options: Any) -> Gradients:
        """dQ, dK, dV by anyflash, into the poisoned tensors."""
        arguments = self.arguments(anyflash.attention, anyflash.attention_varlen)
        given = {name: tensor.view for name, tensor in self.gradients.items()}
        results = anyflash.attention_backward(**arguments, **given, **options)
        for result, tensor in zip(results, given.values()):
            assert result.data_ptr() == tensor.data_ptr(), "a given gradient was not used"
        return Gradients(*results)

    def poison(self) -> None:
        for tensor in self.gradients.values():
            tensor.storage.fill_(math.nan)

    def untouched(self) -> bool:
        """True if no memory around the gradients was written."""
        return all(tensor.untouched_around() for tensor in self.gradients.values())


_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


def prepare(case: Case, dtype: str, device: str) -> Call:
    torch_dtype = getattr(torch, dtype)
    inputs = make_inputs(case, dtype)
    for name in ("q", "k", "v"):
        setattr(inputs, name, torch.from_numpy(getattr(inputs, name)).to(device))
    q, k, v = (
        _placed(getattr(inputs, name), _layout_of(case, name), torch_dtype) for name in "qkv"
    )
    out = strided(case.shape_o, _layout_of(case, "out"), torch_dtype, device)
    options: dict[str, Any] = {
        "causal": case.causal,
        "window": case.window,
        "softcap": case.softcap,
        "scale": case.scale,
    }
    for name in ("alibi_slopes", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"):
        array: np.ndarray | None = getattr(inputs, name)
        if array is not None:
            options[name] = torch.from_numpy(array).to(device)
    if case.packed is not None:
        options.update(max_seqlen_q=case.q, max_seqlen_k=case.k)
    return Call(case, inputs, q, k, v, out, options)


def prepare_backward(case: Case, dtype: str, device: str, with_lse: bool = True) -> BackwardCall:
    forward = prepare(case, dtype, device)
    cotangents = make_cotangents(case, dtype, with_lse)
    cotangents.dout = torch.from_numpy(cotangents.dout).to(device)
    if cotangents.dlse is not None:
        cotangents.dlse = torch.from_numpy(cotangents.dlse).to(device)
    layout = _layout_of(case, "out")
    torch_dtype = getattr(torch, dtype)
    gradients = {
        f"d{name}": strided(tuple(getattr(forward, name).shape), layout, torch_dtype, device)
        for name in "qkv"
    }
    dout = _placed(cotangents.dout, layout, torch_dtype)
    return BackwardCall(forward, cotangents, dout, cotangents.dlse, gradients)


def _layout_of(case: Case, name: str) -> str:
    return "contiguous" if case.layout == "broadcast" and name in ("q", "out") else case.layout


def _placed(values: torch.Tensor, layout: str, dtype: torch.dtype) -> torch.Tensor:
    tensor = strided(tuple(values.shape), layout, dtype, str(values.device)).view
    if layout == "broadcast":
        tensor[:1].copy_(values[:1])
    else:
        tensor.copy_(values)
    return tensor
