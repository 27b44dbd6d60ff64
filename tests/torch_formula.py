"""The plain formula in torch, which torch's own autograd differentiates: what gradients are held
against."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Problem:
    """q [B, N, H, d], k [B, M, Hk, d], v [B, M, Hk, dv]; with lengths, packed [total, heads, d]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    options: dict[str, Any] = field(default_factory=dict)  # of attention
    lengths: tuple[list[int], list[int]] | None = None  # cu_seqlens of q and of k
    used: tuple[list[int] | None, list[int] | None] = (None, None)

    def to(self, dtype: torch.dtype) -> Problem:
        tensors = (x.detach().to(dtype).requires_grad_(x.requires_grad) for x in self.tensors())
        return Problem(*tensors, self.options, self.lengths, self.used)

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q, self.k, self.v

    def call(self, anyflash: Any, **more: Any) -> Any:
        """(O, L) by anyflash."""
        options = {**self.options, **more, "return_lse": True}
        if self.lengths is None:
            return anyflash.attention(*self.tensors(), **options)
        cu_q, cu_k = (int32(x, self.q) for x in self.lengths)
        for name, used in zip(("seqused_q", "seqused_k"), self.used):
            if used is not None:
                options[name] = int32(used, self.q)
        longest = [max(b - a for a, b in zip(x, x[1:])) for x in self.lengths]
        return anyflash.attention_varlen(*self.tensors(), cu_q, cu_k, *longest, **options)

    def formula(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(O, L) by the formula, in the dtype of the tensors."""
        slopes = self.options.get("alibi_slopes")
        if self.lengths is None and not self.q.shape[0]:
            return nothing(self.q, self.v), nothing(self.q, None).transpose(1, 2)
        if self.lengths is None:
            results = [
                one_sequence(*(x[b] for x in self.tensors()), self.options, slopes_of(slopes, b))
                for b in range(self.q.shape[0])
            ]
            return tuple(torch.stack(parts) for parts in zip(*results))
        o = self.q.new_zeros(*self.q.shape[:-1], self.v.shape[-1])
        lse = self.q.new_full((self.q.shape[1], self.q.shape[0]), -math.inf)
        cu_q, cu_k = self.lengths
        for b in range(len(cu_q) - 1):
            used_q, used_k = (used[b] if used else None for used in self.used)
            rows = slice(cu_q[b], cu_q[b + 1] if used_q is None else cu_q[b] + used_q)
            keys = slice(cu_k[b], cu_k[b + 1] if used_k is None else cu_k[b] + used_k)
            part = one_sequence(
                self.q[rows], self.k[keys], self.v[keys], self.options, slopes_of(slopes, b)
            )
            at = torch.arange(rows.start, rows.stop, device=self.q.device)
            o = o.index_copy(0, at, part[0])
            lse = lse.index_copy(1, at, part[1])
        return o, lse


def int32(values: list[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=like.device)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """O by the formula, in the place of anyflash.attention."""
    return Problem(q, k, v, options).formula()[0]


def slopes_of(slopes: torch.Tensor | None, b: int) -> torch.Tensor | None:
    return slopes if slopes is None or slopes.dim() == 1 else slopes[b]


def one_sequence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    options: dict[str, Any],
    slopes: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [N, H, d], k [M, Hk, d], v [M, Hk, dv] -> O [N, H, dv], L [H, N]."""
    n, m, group = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    if m == 0:
        return nothing(q, v), nothing(q, None).T - math.inf
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scale = options.get("scale") or q.shape[-1] ** -0.5
    s = torch.einsum("nhd,mhd->hnm", q, k) * scale
    if options.get("softcap"):
        s = torch.tanh(s / options["softcap"]) * options["softcap"]
    i = torch.arange(n, device=q.device)[:, None] + m - n
    j = torch.arange(m, device=q.device)[None]
    if slopes is not None:
        s = s - slopes.to(s.dtype)[:, None, None] * (i - j).abs()
    left, right = options.get("window", (None, None))
    if options.get("causal"):
        right = 0 if right is None else min(right, 0)
    visible = torch.ones(n, m, dtype=torch.bool, device=q.device)
    if left is not None:
        visible &= j >= i - left
    if right is not None:
        visible &= j <= i + right
    some = visible.any(-1)
    # A row without a key: any finite scores, whose probabilities are then replaced by 0.
    s = s.masked_fill(~visible & some[:, None], -math.inf)
    p = s.softmax(-1).masked_fill(~visible, 0)
    lse = s.logsumexp(-1).masked_fill(~some, -math.inf)
    return torch.einsum("hnm,mhd->nhd", p, v), lse


def nothing(q: torch.Tensor, v: torch.Tensor | None) -> torch.Tensor:
    """[..., H, dv] or, without v, [..., H] of zeros that autograd takes for a function of q."""
    zeros = q[..., :0].sum(-1)
    return zeros if v is None else zeros[..., None].expand(*zeros.shape, v.shape[-1])


def loss_of(o: torch.Tensor, lse: torch.Tensor | None, seed: int = 0) -> torch.Tensor:
    """A number to differentiate: every element of O, and of L where there is one, counts."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(o.shape, generator=generator).to(o.device, o.dtype)
    loss = (o * weights).sum()
    if lse is not None:
        weights = torch.randn(lse.shape, generator=generator).to(lse.device, lse.dtype)
        finite = lse > -math.inf
        loss = loss + (torch.where(finite, lse, 0) * weights).sum().to(loss.dtype)
    return loss


def gradients(problem: Problem, results: Any, use_lse: bool) -> tuple[torch.Tensor, ...]:
    o, lse = results
    return torch.autograd.grad(
        loss_of(o, lse if use_lse else None),
        problem.tensors(),
        allow_unused=True,
        materialize_grads=True,
    )


def assert_close(ours: Any, expected: Any, tolerance: float) -> None:
    """Errors over the largest number of all: a gradient may be 0 because its sums cancel."""
    ours, expected = list(ours), list(expected)
    assert len(ours) == len(expected)
    scale = max(float(y.abs().max()) for y in expected)
    for i, (x, y) in enumerate(zip(ours, expected)):
        assert x.shape == y.shape
        error = float((x.double() - y.double()).abs().max()) / scale
        assert error < tolerance, f"result {i}: {error:.2e}"


def worst(ours: Any, exact: Any, peer: Any) -> str | None:
    """None if every result of ours is at most twice as far from the exact one (fp64) as that of
    the plain formula in the same dtype, with a floor of a few roundings; else a line."""
    for i, (a, b, c) in enumerate(zip(ours, exact, peer)):
        if a.shape != b.shape or a.numel() == 0:
            if a.shape != b.shape:
                return f"result {i} has shape {tuple(a.shape)}, not {tuple(b.shape)}"
            continue
        if not torch.equal(a.isinf(), b.isinf()) or a.isnan().any():
            return f"result {i} has NaN, or infinities in other places"
        finite = ~b.isinf()
        error = (a.double() - b)[finite].abs().max() if finite.any() else torch.tensor(0.0)
        allowed = (c.double() - b)[finite].abs().max() if finite.any() else torch.tensor(0.0)
        size = float(b[finite].abs().max()) if finite.any() else 0.0
        # The floor: dP - delta may cancel, and leaves the rounding of numbers of about 1.
        noise = 16 * torch.finfo(torch.float32).eps
        limit = 2 * float(allowed) + 4 * torch.finfo(a.dtype).eps * max(size, 0.05) + noise
        if not float(error) <= limit:
            return f"result {i} is off by {float(error):.3g}, allowed {limit:.3g}"
    return None
