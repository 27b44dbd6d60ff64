"""Models of Hugging Face transformers on anyflash.

    import anyflash.transformers
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="anyattention")

Importing this module registers the name "anyattention" through transformers' public interfaces for
attention functions and masks. (A name with "flash" in it is taken there for a flash-attn package.)

A batch with padding is computed as packed sequences of different lengths, and a row that holds
several sequences one after the other (position_ids that start anew) likewise. Which sequences those
are is found out once a forward, by `mask`; every layer then calls `attention`. Windows, softcap,
fewer key heads than query heads, key-value caches, encoders and decoders all run. Dropout, masks
of another kind, attention sinks, position biases and paged caches raise NotImplementedError.
"""

from __future__ import annotations

from typing import Any, Callable

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from . import api

NAME = "anyattention"
Window = tuple[Any, Any]  # (left, right), None is unbounded


class PackedMask:
    """Which keys the queries of a batch see: what `mask` finds out for the layers of one forward.

    Queries and keys of a batch [B, N, ...], [B, M, ...] are taken as rows one after the other. Each
    row of the batch is up to three sequences: padding, what counts, padding. Sequences of padding
    see no key, and no query sees theirs, so that nothing needs to be copied. Two other forms: rows
    with gaps in between are first put in order, and rows that hold several sequences without any
    padding have `cu_seqlens` at once.
    """

    ndim = 4  # models that prepare masks themselves pass 4-D ones on as they are

    def __init__(self, shape: tuple[int, int, int], causal: bool, window: Window) -> None:
        batch, q_length, kv_length = shape
        self.shape = (batch, 1, q_length, kv_length)
        self.causal = causal
        self.window = window
        # What counts: [B, 2] int32, start and end in each row; None: no padding.
        self.queries: torch.Tensor | None = None
        self.keys: torch.Tensor | None = None
        # [B, N] and [B, M]: the order that puts what counts in front; None: no gaps.
        self.query_order: torch.Tensor | None = None
        self.key_order: torch.Tensor | None = None
        # Several sequences in a row, the same for queries and keys: int32 [sequences + 1]
        self.cu_seqlens: torch.Tensor | None = None
        self.longest = 0
        self._lengths: dict[Any, dict[str, Any]] = {}

    def contiguous(self) -> PackedMask:
        """Itself: transformers asks every mask for it."""
        return self

    @property
    def is_dense(self) -> bool:
        """Nothing but causal and window: no lengths."""
        return self.keys is None and self.cu_seqlens is None

    def lengths(self, heads: int, device: torch.device) -> dict[str, Any]:
        """The arguments of `attention_varlen` that describe the sequences. Computed once.

        heads: 1 for rows [B * N, H, d]; Hk for rows [B * Hk * N, H / Hk, d], where each key head is
        a batch of its own.
        """
        found = self._lengths.get((heads, device))
        if found is None:
            found = self._lengths[heads, device] = self._make_lengths(heads, device)
        return found

    def _make_lengths(self, heads: int, device: torch.device) -> dict[str, Any]:
        if self.cu_seqlens is not None:
            cu_seqlens = self.cu_seqlens.to(device)
            return _varlen(cu_seqlens, cu_seqlens, self.longest, self.longest)
        assert self.queries is not None and self.keys is not None
        queries, keys = (
            x.to(device).repeat_interleave(heads, 0) for x in (self.queries, self.keys)
        )
        q_length, kv_length = self.shape[2:]
        count = torch.zeros(len(keys), 3, dtype=torch.int32, device=device)
        count[:, 1] = keys[:, 1] - keys[:, 0]
        return {
            **_varlen(
                _boundaries(queries, q_length), _boundaries(keys, kv_length), q_length, kv_length
            ),
            "seqused_k": count.flatten(),
        }


def _varlen(cu_seqlens_q: Any, cu_seqlens_k: Any, longest_q: Any, longest_k: Any) -> dict[str, Any]:
    return {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": longest_q,
        "max_seqlen_k": longest_k,
    }


def _boundaries(bounds: torch.Tensor, length: int) -> torch.Tensor:
    """[rows, 2] starts and ends inside rows of `length` -> cu_seqlens int32 [3 * rows + 1]."""
    rows = len(bounds)
    first = torch.arange(0, (rows + 1) * length, max(length, 1), device=bounds.device)[: rows + 1]
    first = first.to(torch.int32)
    inside = torch.cat([first[:-1, None], first[:-1, None] + bounds], dim=1)
    return torch.cat([inside.flatten(), first[-1:]]).contiguous()


# The mask: once a forward (and kind of layer)


def mask(
    batch_size: int,
    q_length: int = 0,
    kv_length: int = 0,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Any = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    config: Any = None,
    device: Any = None,
    cache_position: torch.Tensor | None = None,
    **options: Any,
) -> PackedMask | None:
    """What transformers' AttentionMaskInterface asks for: the mask that `attention` will be given.

    Arguments: those of transformers' own mask functions. Queries stand at positions q_offset to
    q_offset + q_length - 1, keys at kv_offset to kv_offset + kv_length - 1; attention_mask
    [B, positions] is True where a token counts.

    Returns: None where causal or nothing says it all; else a `PackedMask`.

    Synchronises with the device once, to see whether there is padding: only if there is an
    attention_mask, or if positions start anew inside a row.

    Raises: NotImplementedError for masks that are neither causal, windows, padding nor packing.
    """
    if isinstance(attention_mask, PackedMask):  # prepared earlier, by generate()
        return attention_mask
    if cache_position is not None:  # transformers 4: positions in a tensor
        q_length = cache_position.shape[0]
        q_offset = 0 if q_length == kv_length else cache_position[0]
        if kv_offset + kv_length == getattr(attention_mask, "shape", (0,))[-1]:
            q_offset = kv_offset + kv_length - q_length
    # Only masks for both directions come with this option.
    causal = "allow_is_bidirectional_skip" not in options
    window = _window(local_size, causal, config, kv_length + kv_offset)
    if use_vmap:
        raise NotImplementedError(
            f"asked: {NAME} with a mask function added to the model's; available: causal, "
            'windows, padding, packing; missing: other masks: use attn_implementation="sdpa"'
        )
    result = PackedMask((batch_size, q_length, kv_length), causal, window)
    if causal and not allow_is_causal_skip and q_length == kv_length:
        _find_packing(result, mask_function, device)
    first = q_offset - kv_offset  # the first query's place among the keys
    aligned = not causal or (isinstance(first, int) and first + q_length == kv_length)
    if attention_mask is not None or not aligned:
        both = causal or _only_self_attention(config) or window != (None, None)
        same = both and (causal or q_length == kv_length)
        valid = _valid_keys(result, attention_mask, kv_offset, device)
        _find_padding(result, valid, first, aligned, same)
    plain = window == (None, None) and result.is_dense
    return None if plain else result


def _window(local_size: int | None, causal: bool, config: Any, length: int) -> Window:
    """transformers' size of a window in ours: a causal one counts the query's own key."""
    if local_size is None:
        return None, None
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk == local_size and getattr(config, "sliding_window", None) != local_size:
        if length > local_size:
            raise NotImplementedError(
                f"asked: {NAME} with attention in chunks of {local_size} keys, for {length}; "
                "available: causal, windows, padding, packing; missing: chunks: use "
                'attn_implementation="sdpa"'
            )
        return None, None
    return (local_size - 1, 0) if causal else (local_size, local_size)


def _only_self_attention(config: Any) -> bool:
    """In a model without cross-attention the mask of the keys is that of the queries too."""
    return not (
        config is None
        or getattr(config, "is_encoder_decoder", False)
        or getattr(config, "add_cross_attention", False)
    )


def _find_packing(result: PackedMask, mask_function: Any, device: Any) -> None:
    """Several sequences in a row: a token that does not see the one before it starts a new one."""
    batch, _, length, _ = result.shape
    if mask_function is None or length < 2:
        return
    row = torch.arange(batch, device=device)[:, None]
    head = torch.zeros((), dtype=torch.long, device=device)
    later = torch.arange(1, length, device=device)[None]
    sees_previous = mask_function(row, head, later, later - 1).expand(batch, -1)
    sees_next = mask_function(row, head, later - 1, later).expand(batch, -1)
    sees_previous, sees_next = torch.stack([sees_previous, sees_next]).cpu()  # waits for the device
    if sees_next.any():
        raise NotImplementedError(
            f"asked: {NAME} with a causal mask that lets some tokens see later ones; available: "
            'causal, windows, padding, packing; missing: blocks: use attn_implementation="sdpa"'
        )
    if sees_previous.all():
        return
    starts = torch.ones(batch, length, dtype=torch.bool)
    starts[:, 1:] = ~sees_previous
    ends = torch.tensor([batch * length])
    cu_seqlens = torch.cat([starts.flatten().nonzero().flatten(), ends]).to(torch.int32)
    result.longest = int(cu_seqlens.diff().max())
    result.cu_seqlens = cu_seqlens.to(device)


def _valid_keys(
    result: PackedMask, attention_mask: torch.Tensor | None, kv_offset: int, device: Any
) -> torch.Tensor:
    """[B, M] bool: the keys that count, by the mask of tokens; those after its end do not."""
    batch, _, _, kv_length = result.shape
    if attention_mask is None:
        return torch.ones(batch, kv_length, dtype=torch.bool, device=device)
    if attention_mask.ndim != 2:
        raise NotImplementedError(
            f"asked: {NAME} with a mask of shape {list(attention_mask.shape)}; available: "
            "[batch, tokens], 0 where a token is padding; missing: other masks: use "
            'attn_implementation="sdpa"'
        )
    valid = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    return torch.nn.functional.pad(valid, (0, kv_length - valid.shape[1]))


def _find_padding(
    result: PackedMask, valid: torch.Tensor, first: Any, aligned: bool, same: bool
) -> None:
    """Where in each row the tokens are that count.

    first: the first query's place among the keys; aligned: the last query stands at the last key;
    same: the queries are tokens of the keys, and count as these do.
    """
    _, _, q_length, kv_length = result.shape
    places = torch.arange(kv_length, device=valid.device)
    if not aligned:  # a cache with room for later keys
        valid = valid & (places < first + q_length)
    count = valid.sum(1)
    start = valid.int().argmax(1)
    end = torch.where(count > 0, kv_length - valid.flip(1).int().argmax(1), 0)
    start = torch.minimum(start, end)
    full, gaps = torch.stack([valid.all(), (end - start != count).any()]).tolist()  # waits
    if full and aligned:
        return
    if gaps:
        if result.window != (None, None):
            raise NotImplementedError(
                f"asked: {NAME} with a window over rows that have padding between their tokens; "
                "available: padding before and after; missing: distances over gaps: use "
                'attn_implementation="sdpa"'
            )
        result.key_order = valid.int().argsort(dim=1, descending=True, stable=True)
        start, end = torch.zeros_like(count), count
    result.keys = torch.stack([start, end], 1).to(torch.int32)
    if not same:
        result.queries = torch.tensor([[0, q_length]], dtype=torch.int32, device=valid.device)
        result.queries = result.queries.expand(len(valid), 2)
    elif gaps:
        mine = valid.gather(1, (first + places[:q_length]).expand(len(valid), q_length))
        result.query_order = mine.int().argsort(dim=1, descending=True, stable=True)
        result.queries = torch.stack([torch.zeros_like(count), mine.sum(1)], 1).to(torch.int32)
    else:
        result.queries = (result.keys - first).clamp(0, q_length).to(torch.int32)


# Attention: once a layer


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Any = None,
    cu_seq_lens_k: Any = None,
    max_length_q: Any = None,
    max_length_k: Any = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' AttentionInterface asks for: O of one layer.

    Arguments: module: the layer, whose is_causal counts where the argument is None. query
      [B, H, N, d], key [B, Hk, M, d], value [B, Hk, M, dv]. attention_mask: what `mask` returned.
      sliding_window: keys of a window with the query's own, where the mask says nothing.
      cu_seq_lens_q and the three after it: lengths of sequences packed in one row, from a collator.

    Returns: (O [B, N, H, dv], None). O of padding is 0.

    Raises: NotImplementedError (dropout, sinks, position biases, paged caches, foreign masks), and
      what `anyflash.attention` raises.
    """
    _refuse(dropout, attention_mask, options)
    found: PackedMask | None = attention_mask
    if found is not None:
        causal, window = found.causal, found.window
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        window = (None, None)
        if sliding_window is not None:
            window = (sliding_window - 1, sliding_window - 1)
    settings: dict[str, Any] = {
        "causal": bool(causal),
        "window": window,
        "scale": scaling,
        "softcap": 0.0 if softcap is None else softcap,
    }
    given = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if (found is None or found.keys is None) and all(length is not None for length in given):
        cu_seqlens_q, cu_seqlens_k = (cumulated.to(torch.int32) for cumulated in given[:2])
        lengths = _varlen(cu_seqlens_q, cu_seqlens_k, int(max_length_q), int(max_length_k))
        return _token_rows(q, k, v, lengths, settings), None
    if found is None or found.is_dense:
        return api.attention(q, k, v, **settings), None
    if found.key_order is not None:
        return _reordered(found, q, k, v, settings), None
    return _packed(found, q, k, v, settings), None


def _packed(found: PackedMask, q: Any, k: Any, v: Any, settings: dict[str, Any]) -> torch.Tensor:
    """O of rows of tokens, or in a step of generation of rows of heads: as the cache lies."""
    if q.shape[1] == 1 and found.keys is not None and not k.is_contiguous():
        return _head_rows(found, q, k, v, settings)
    return _token_rows(q, k, v, found.lengths(1, q.device), settings)


def _token_rows(
    q: Any, k: Any, v: Any, lengths: dict[str, Any], settings: dict[str, Any]
) -> torch.Tensor:
    """[B, N, H, d] as rows [B * N, H, d]; a copy of what does not lie so (a cache's K and V)."""
    o: torch.Tensor = api.attention_varlen(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), **lengths, **settings
    )
    return o.view(*q.shape[:3], v.shape[-1])


def _head_rows(found: PackedMask, q: Any, k: Any, v: Any, settings: dict[str, Any]) -> torch.Tensor:
    """One query for each row of the batch, keys in a cache that lies [B, Hk, M, d]: each key head
    is a sequence of rows [B * Hk * M, 1, d], so that the cache is read where it is."""
    heads = k.shape[2]
    queries = q.reshape(q.shape[0] * heads, -1, q.shape[-1])
    keys, values = (x.transpose(1, 2).flatten(0, 2).unsqueeze(1) for x in (k, v))
    lengths = found.lengths(heads, q.device)
    o: torch.Tensor = api.attention_varlen(queries, keys, values, **lengths, **settings)
    return o.reshape(*q.shape[:3], v.shape[-1])


def _reordered(found: PackedMask, q: Any, k: Any, v: Any, settings: dict[str, Any]) -> torch.Tensor:
    """O of rows with gaps: what counts is gathered in front, O goes back to the queries' places."""
    rows = torch.arange(q.shape[0], device=q.device)[:, None]
    keys, queries = found.key_order, found.query_order
    assert keys is not None
    k, v = k[rows, keys.to(q.device)], v[rows, keys.to(q.device)]
    lengths = found.lengths(1, q.device)
    if queries is None:
        return _token_rows(q, k, v, lengths, settings)
    order = queries.to(q.device)
    o = _token_rows(q[rows, order], k, v, lengths, settings)
    return o[rows, order.argsort(1)]


def _refuse(dropout: float, attention_mask: Any, options: dict[str, Any]) -> None:
    """What anyflash does not compute, told before anything is."""
    asked, remedy = None, 'use attn_implementation="sdpa"'
    if dropout:
        asked, remedy = f"dropout of {dropout}", "set the model's attention dropout to 0"
    elif attention_mask is not None and not isinstance(attention_mask, PackedMask):
        shape = list(getattr(attention_mask, "shape", ()))
        asked = f"a mask of the model's own, {type(attention_mask).__name__} {shape}"
    elif options.get("output_attentions"):
        asked, remedy = "output_attentions=True", 'use attn_implementation="eager"'
    else:
        for name in ("s_aux", "position_bias", "cache"):
            if options.get(name) is not None:
                asked = name
    if asked is not None:
        raise NotImplementedError(
            f"asked: {NAME} with {asked}; available: causal, windows, padding, packing, softcap, "
            f"GQA, without dropout; missing: {remedy}"
        )


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
