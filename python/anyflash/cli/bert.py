"""A BERT encoder in NumPy that leaves its attention to a function, over a Hugging Face folder.

All sequences of a batch are packed one behind the other, [total tokens, hidden], with their
starts in cu_seqlens: no padding anywhere. Only inference, only what encoders of sentences need.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anyflash.cli.console import UserError

Array = Any  # np.ndarray
# (q, k, v [total, heads, d] float32, cu_seqlens [B + 1] int32, longest sequence)
# -> o [total, heads, d] float32
Attention = Callable[[Array, Array, Array, Array, int], Array]

ROWS_AT_ONCE = (
    512  # tokens that go through the wide layers together: bounds their memory, fits the caches
)


class Bert:
    """The encoder of a folder with config.json, model.safetensors and tokenizer.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = _read_config(folder)
        self.heads = int(config["num_attention_heads"])
        self.hidden = int(config["hidden_size"])
        self.layers = int(config["num_hidden_layers"])
        self.positions = int(config["max_position_embeddings"])
        self.epsilon = float(config.get("layer_norm_eps", 1e-12))
        self.activation = _activation(config.get("hidden_act", "gelu"))
        self.pooling = _pooling(folder)
        self.tokenizer = _read_tokenizer(folder)
        weights = _read_weights(folder)
        self.embeddings = _Embeddings(weights)
        self.blocks = [_Layer(weights, f"encoder.layer.{i}.") for i in range(self.layers)]

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    def tokenize(self, texts: Sequence[str], longest: int | None = None) -> list[list[int]]:
        """Token numbers of each text, [CLS] and [SEP] included, cut to `longest` (default: the
        model's positions)."""
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_length=longest or self.positions)
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]

    def encode(self, sequences: Sequence[Sequence[int]], attention: Attention) -> Array:
        """One unit vector for each sequence of tokens: [len(sequences), hidden] float32."""
        lengths = np.array([len(sequence) for sequence in sequences], np.int32)
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        tokens = np.concatenate([np.asarray(sequence, np.int64) for sequence in sequences])
        x = self._embed(tokens, lengths)
        for block in self.blocks:
            x = self._layer(x, block, attention, cu_seqlens, int(lengths.max()))
        if self.pooling == "cls":
            pooled = x[cu_seqlens[:-1]]
        else:
            pooled = np.add.reduceat(x, cu_seqlens[:-1], axis=0) / np.float32(lengths)[:, None]
        return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)

    def _embed(self, tokens: Array, lengths: Array) -> Array:
        e = self.embeddings
        positions = np.concatenate([_positions(int(n), e.position) for n in lengths])
        return _layer_norm(e.word[tokens] + positions + e.token_type[0], e.norm, self.epsilon)

    def _layer(
        self, x: Array, block: _Layer, attention: Attention, cu_seqlens: Array, longest: int
    ) -> Array:
        total = len(x)
        qkv = (x @ block.qkv[0] + block.qkv[1]).reshape(total, 3, self.heads, self.head_dim)
        o = attention(
            qkv[:, 0], qkv[:, 1], qkv[:, 2], cu_seqlens, longest
        )  # strided views: nothing is copied
        del qkv
        out = np.empty_like(x)
        for start in range(0, total, ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            attended = o[rows].reshape(-1, self.hidden) @ block.projection[0] + block.projection[1]
            y = _layer_norm(attended + x[rows], block.attention_norm, self.epsilon)
            wide = self.activation(y @ block.up[0] + block.up[1])
            out[rows] = _layer_norm(
                wide @ block.down[0] + block.down[1] + y, block.output_norm, self.epsilon
            )
        return out


class _Embeddings:
    def __init__(self, weights: _Weights) -> None:
        self.word = weights["embeddings.word_embeddings.weight"]
        self.position = weights["embeddings.position_embeddings.weight"]
        self.token_type = weights["embeddings.token_type_embeddings.weight"]
        self.norm = weights["embeddings.LayerNorm.weight"], weights["embeddings.LayerNorm.bias"]


class _Layer:
    """One layer's weights, transposed to multiply from the right; Q, K and V side by side."""

    def __init__(self, weights: _Weights, prefix: str) -> None:
        def linear(*names: str) -> tuple[Array, Array]:
            weight = np.concatenate([weights[f"{prefix}{name}.weight"] for name in names])
            return np.ascontiguousarray(weight.T), np.concatenate(
                [weights[f"{prefix}{name}.bias"] for name in names]
            )

        def norm(name: str) -> tuple[Array, Array]:
            return weights[f"{prefix}{name}.weight"], weights[f"{prefix}{name}.bias"]

        self.qkv = linear("attention.self.query", "attention.self.key", "attention.self.value")
        self.projection = linear("attention.output.dense")
        self.attention_norm = norm("attention.output.LayerNorm")
        self.up = linear("intermediate.dense")
        self.down = linear("output.dense")
        self.output_norm = norm("output.LayerNorm")


def standard_attention(q: Array, k: Array, v: Array, cu_seqlens: Array, longest: int) -> Array:
    """softmax(Q K^T / sqrt(d)) V as everybody writes it: each sequence's score matrix [heads, n,
    n] is in memory."""
    o = np.empty(q.shape, np.float32)
    for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:]):
        qs, ks, vs = (x[start:end].transpose(1, 0, 2) for x in (q, k, v))
        s = np.matmul(qs, ks.transpose(0, 2, 1))
        s *= q.shape[-1] ** -0.5
        s -= s.max(-1, keepdims=True)
        p = np.exp(s, out=s)
        p /= p.sum(-1, keepdims=True)
        o[start:end] = np.matmul(p, vs).transpose(1, 0, 2)
    return o


def _positions(n: int, table: Array) -> Array:
    """Position embeddings of a sequence of n tokens; beyond the model's own length they are
    interpolated."""
    if n <= len(table):
        return table[:n]
    at = np.linspace(0, len(table) - 1, n)
    low = np.minimum(at.astype(np.int64), len(table) - 2)
    part = (at - low).astype(np.float32)[:, None]
    return table[low] * (1 - part) + table[low + 1] * part


def _layer_norm(x: Array, norm: tuple[Array, Array], epsilon: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    variance = np.mean(centred * centred, -1, keepdims=True)
    return centred / np.sqrt(variance + np.float32(epsilon)) * norm[0] + norm[1]


def _erf(x: Array) -> Array:
    """The error function to float32's precision: Abramowitz and Stegun, 7.1.26 (largest error
    1.5e-7)."""
    t = 1 / (1 + np.float32(0.3275911) * np.abs(x))
    series = t * (
        np.float32(0.254829592)
        + t
        * (
            np.float32(-0.284496736)
            + t
            * (
                np.float32(1.421413741)
                + t * (np.float32(-1.453152027) + t * np.float32(1.061405429))
            )
        )
    )
    return np.copysign(1 - series * np.exp(-x * x), x)


def _gelu(x: Array) -> Array:
    return np.float32(0.5) * x * (1 + _erf(x * np.float32(0.5**0.5)))


def _gelu_tanh(x: Array) -> Array:
    return (
        np.float32(0.5)
        * x
        * (1 + np.tanh(np.float32((2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x * x * x)))
    )


def _relu(x: Array) -> Array:
    return np.maximum(x, 0)


def _activation(name: str) -> Callable[[Array], Array]:
    known = {"gelu": _gelu, "gelu_new": _gelu_tanh, "gelu_pytorch_tanh": _gelu_tanh, "relu": _relu}
    if name not in known:
        raise UserError(
            f"config.json: hidden_act {name!r}; the demo knows {', '.join(sorted(known))}"
        )
    return known[name]


def _read_config(folder: Path) -> dict[str, Any]:
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} is no model folder of Hugging Face's kind: {name} is missing"
            )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'} is not JSON: {error}") from None
    if config.get("model_type") != "bert":
        raise UserError(
            f"{folder}: model_type {config.get('model_type')!r}; the demo has an encoder for 'bert'"
        )
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise UserError(
            f"{folder}: position_embedding_type is {config['position_embedding_type']!r}, which "
            "the demo does not know"
        )
    missing = [
        name
        for name in (
            "num_attention_heads",
            "hidden_size",
            "num_hidden_layers",
            "max_position_embeddings",
        )
        if name not in config
    ]
    if missing:
        raise UserError(f"{folder / 'config.json'} does not state {', '.join(missing)}")
    return dict(config)


def _pooling(folder: Path) -> str:
    """ "mean" unless the folder's sentence-transformers part says that the first token stands for
    the text."""
    path = folder / "1_Pooling" / "config.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")).get(
        "pooling_mode_cls_token"
    ):
        return "cls"
    return "mean"


def _read_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises the bare class
        raise UserError(f"cannot read {folder / 'tokenizer.json'}: {error}") from None


class _Weights(dict[str, Array]):
    """Weights by name; one that is not there is told as the user's file lacking it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def __missing__(self, name: str) -> Array:
        raise UserError(f"{self.path} holds no BERT encoder of this config.json: {name} is missing")


def _read_weights(folder: Path) -> _Weights:
    """The weights in float32, without the prefix "bert." that models with a head on top carry."""
    from safetensors import SafetensorError, safe_open

    path = folder / "model.safetensors"
    weights = _Weights(path)
    try:
        with safe_open(str(path), framework="np") as file:
            for name in file.keys():  # noqa: SIM118
                if name.endswith((".weight", ".bias")):
                    weights[name[5:] if name.startswith("bert.") else name] = file.get_tensor(
                        name
                    ).astype(np.float32)
    except (SafetensorError, TypeError, ValueError) as error:
        raise UserError(f"cannot read {path} (float32 and float16 can be read): {error}") from None
    return weights
