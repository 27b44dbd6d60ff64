"""Every refusal: the exception and all of its words. And: nothing is written then."""

from __future__ import annotations

import anyflash
import numpy as np
import pytest


def f(*shape, dtype=np.float32):
    """Zeros: f(2, 8, 4, 64)."""
    return np.zeros(shape, dtype)


def h(*shape):
    return f(*shape, dtype=np.float16)


def ints(*values):
    return np.array(values, np.int32)


def every_second(x):
    """The same shape with a last dimension of stride 2."""
    return np.repeat(x, 2, -1)[..., ::2]


def read_only(x):
    x.flags.writeable = False
    return x


def broadcast(*shape):
    """Writable, with all its rows in one place."""
    row = np.zeros((1,) * (len(shape) - 1) + shape[-1:], np.float32)
    return np.lib.stride_tricks.as_strided(row, shape, (0,) * (len(shape) - 1) + (4,))


# A sound call of each kind: entries below change one thing.
DENSE = {"q": f(2, 8, 4, 64), "k": f(2, 9, 2, 64), "v": f(2, 9, 2, 32)}
PACKED = {
    "q": f(12, 4, 64),
    "k": f(9, 2, 64),
    "v": f(9, 2, 32),
    "cu_seqlens_q": ints(0, 5, 12),
    "cu_seqlens_k": ints(0, 2, 9),
    "max_seqlen_q": 7,
    "max_seqlen_k": 7,
}
NAN = float("nan")
INF = float("inf")
SHARED = f(2, 8, 4, 64)

# (changes, exception, message)
REFUSALS = {
    "dense": [
        # kinds of objects
        (
            {"q": None},
            TypeError,
            (
                "q is a NoneType; it must be a tensor: torch, NumPy, CuPy, JAX, or any object"
                " with __dlpack__"
            ),
        ),
        (
            {"k": [[1.0]]},
            TypeError,
            (
                "k is a list; it must be a tensor: torch, NumPy, CuPy, JAX, or any object "
                "with __dlpack__"
            ),
        ),
        (
            {"v": "v"},
            TypeError,
            (
                "v is a str; it must be a tensor: torch, NumPy, CuPy, JAX, or any object with"
                " __dlpack__"
            ),
        ),
        (
            {"q": f(2, 8, 4, 64, dtype=np.int64)},
            TypeError,
            (
                "q has dtype int64; it must be float16, bfloat16 or float32 (on the CPU; "
                "float64 for the reference)"
            ),
        ),
        (
            {"q": f(2, 8, 4, 64, dtype=">f4")},
            TypeError,
            (
                "q has dtype >f4; it must be float16, bfloat16 or float32 (on the CPU; "
                "float64 for the reference)"
            ),
        ),
        (
            {"k": h(2, 9, 2, 64)},
            TypeError,
            (
                "q has dtype float32 but k has dtype float16; q, k, v and the output must "
                "have one dtype: convert k"
            ),
        ),
        (
            {"v": f(2, 9, 2, 32, dtype=np.float64)},
            TypeError,
            (
                "q has dtype float32 but v has dtype float64; q, k, v and the output must "
                "have one dtype: convert v"
            ),
        ),
        (
            {"q": ints(1), "k": ints(1), "v": ints(1)},
            ValueError,
            "q has rank 1 ([1]); it must have rank 4: [batch, seqlen_q, heads, d] (dense)",
        ),
        (
            {
                "q": f(2, 8, 4, 64, dtype=np.float64),
                "k": f(2, 9, 2, 64, dtype=np.float64),
                "v": f(2, 9, 2, 32, dtype=np.float64),
            },
            NotImplementedError,
            (
                "asked: forward of float64; available: float32, float16, bfloat16 on the CPU;"
                " missing: a tiled algorithm in double (the reference takes float64)"
            ),
        ),
        # shapes
        (
            {"q": f(8, 4, 64)},
            ValueError,
            ("q has rank 3 ([8, 4, 64]); it must have rank 4: [batch, seqlen_q, heads, d] (dense)"),
        ),
        (
            {"k": f(2, 9, 2, 2, 64)},
            ValueError,
            "k has rank 5; it must have rank 4: [batch, seqlen_k, heads_k, d] (dense)",
        ),
        (
            {"v": f()},
            ValueError,
            "v is a single number (rank 0); it must have dimensions",
        ),
        (
            {"k": f(3, 9, 2, 64)},
            ValueError,
            "q has batch 2 but k has batch 3; they must be equal",
        ),
        (
            {"v": f(1, 9, 2, 32)},
            ValueError,
            "q has batch 2 but v has batch 1; they must be equal",
        ),
        (
            {"v": f(2, 10, 2, 32)},
            ValueError,
            "k has 9 rows but v has 10; they must be equal",
        ),
        (
            {"k": f(2, 9, 3, 64), "v": f(2, 9, 3, 32)},
            ValueError,
            ("q has 4 heads and k has 3; the heads of q must be a multiple of the heads of k"),
        ),
        (
            {"k": f(2, 9, 0, 64), "v": f(2, 9, 0, 32)},
            ValueError,
            ("q has 4 heads and k has 0; the heads of q must be a multiple of the heads of k"),
        ),
        (
            {"v": f(2, 9, 4, 32)},
            ValueError,
            "k has 2 heads but v has 4; they must be equal",
        ),
        (
            {"k": f(2, 9, 2, 32)},
            ValueError,
            "q has head dim 64 but k has head dim 32; they must be equal",
        ),
        (
            {"q": f(2, 8, 4, 257), "k": f(2, 9, 2, 257)},
            NotImplementedError,
            "asked: head dim 257 of q and k; available: 1 to 256; missing: kernels for it",
        ),
        (
            {"q": f(2, 8, 4, 0), "k": f(2, 9, 2, 0)},
            NotImplementedError,
            "asked: head dim 0 of q and k; available: 1 to 256; missing: kernels for it",
        ),
        (
            {"v": f(2, 9, 2, 320)},
            NotImplementedError,
            "asked: head dim 320 of v; available: 1 to 256; missing: kernels for it",
        ),
        (
            {"v": f(2, 9, 2, 0)},
            NotImplementedError,
            "asked: head dim 0 of v; available: 1 to 256; missing: kernels for it",
        ),
        (
            {
                "q": np.broadcast_to(f(1, 1, 4, 64), (1, 2**30, 4, 64)),
                "k": f(1, 9, 2, 64),
                "v": f(1, 9, 2, 32),
            },
            NotImplementedError,
            (
                "asked: seqlen_q 1073741824; available: sequences shorter than 2^30 = "
                "1073741824; missing: wider positions in the kernels"
            ),
        ),
        (
            {
                "k": np.broadcast_to(f(1, 1, 2, 64), (2, 2**31, 2, 64)),
                "v": np.broadcast_to(f(1, 1, 2, 32), (2, 2**31, 2, 32)),
            },
            NotImplementedError,
            (
                "asked: seqlen_k 2147483648; available: sequences shorter than 2^30 = "
                "1073741824; missing: wider positions in the kernels"
            ),
        ),
        # strides
        (
            {"q": every_second(f(2, 8, 4, 64))},
            ValueError,
            (
                "q has stride 2 in its last dimension; that dimension must be contiguous "
                "(stride 1): copy q to a contiguous tensor first"
            ),
        ),
        (
            {"v": np.broadcast_to(f(2, 9, 2, 1), (2, 9, 2, 32))},
            ValueError,
            (
                "v has stride 0 in its last dimension; that dimension must be contiguous "
                "(stride 1): copy v to a contiguous tensor first"
            ),
        ),
        # scores
        ({"scale": NAN}, ValueError, "scale is nan; it must be finite in float32"),
        ({"scale": INF}, ValueError, "scale is inf; it must be finite in float32"),
        ({"scale": 1e300}, ValueError, "scale is inf; it must be finite in float32"),
        ({"scale": 10**400}, ValueError, "scale is too large for a float"),
        ({"scale": "0.1"}, TypeError, "scale is '0.1'; it must be a number"),
        ({"scale": True}, TypeError, "scale is True; it must be a number"),
        (
            {"softcap": -1.0},
            ValueError,
            ("softcap is -1; it must be 0 (off) or a finite positive number, at least 1e-20"),
        ),
        (
            {"softcap": NAN},
            ValueError,
            ("softcap is nan; it must be 0 (off) or a finite positive number, at least 1e-20"),
        ),
        (
            {"softcap": INF},
            ValueError,
            ("softcap is inf; it must be 0 (off) or a finite positive number, at least 1e-20"),
        ),
        (
            {"softcap": 1e-30},
            ValueError,
            ("softcap is 1e-30; it must be 0 (off) or a finite positive number, at least 1e-20"),
        ),
        ({"softcap": None}, TypeError, "softcap is None; it must be a number"),
        (
            {"alibi_slopes": f(3)},
            ValueError,
            "alibi_slopes has shape [3]; it must be [heads] = [4]",
        ),
        (
            {"alibi_slopes": f(3, 4)},
            ValueError,
            "alibi_slopes has shape [3, 4]; it must be [batch, heads] = [2, 4]",
        ),
        (
            {"alibi_slopes": f(2, 4, 1)},
            ValueError,
            (
                "alibi_slopes has rank 3 ([2, 4, 1]); it must have rank 2: [batch, heads], or"
                " rank 1: [heads]"
            ),
        ),
        (
            {"alibi_slopes": f(4, dtype=np.float64)},
            TypeError,
            "alibi_slopes has dtype float64; it must be float32",
        ),
        (
            {"alibi_slopes": f(4, dtype=np.int64)},
            TypeError,
            "alibi_slopes has dtype int64; it must be float32",
        ),
        (
            {"alibi_slopes": f(8)[::2]},
            ValueError,
            (
                "alibi_slopes has stride 2 in its last dimension; that dimension must be "
                "contiguous (stride 1): copy alibi_slopes to a contiguous tensor first"
            ),
        ),
        (
            {"alibi_slopes": 0.5},
            TypeError,
            (
                "alibi_slopes is a float; it must be a tensor: torch, NumPy, CuPy, JAX, or "
                "any object with __dlpack__"
            ),
        ),
        # masks
        (
            {"window": (-1, 0)},
            ValueError,
            "the left side of window is -1; it must be 0 or more, or None for unbounded",
        ),
        (
            {"window": (0, -5)},
            ValueError,
            "the right side of window is -5; it must be 0 or more, or None for unbounded",
        ),
        (
            {"window": (1.0, 0)},
            TypeError,
            "the left side of window is 1.0; it must be an integer, or None for unbounded",
        ),
        (
            {"window": (0, True)},
            TypeError,
            ("the right side of window is True; it must be an integer, or None for unbounded"),
        ),
        (
            {"window": 5},
            TypeError,
            "window is 5; it must be a pair (left, right) of integers or None",
        ),
        (
            {"window": (1, 2, 3)},
            TypeError,
            "window is (1, 2, 3); it must be a pair (left, right) of integers or None",
        ),
        (
            {"window": None},
            TypeError,
            "window is None; it must be a pair (left, right) of integers or None",
        ),
        ({"causal": "yes"}, TypeError, "causal is 'yes'; it must be True or False"),
        ({"causal": 2}, TypeError, "causal is 2; it must be True or False"),
        (
            {"deterministic": "no"},
            TypeError,
            "deterministic is 'no'; it must be True or False",
        ),
        (
            {"return_lse": None},
            TypeError,
            "return_lse is None; it must be True or False",
        ),
        # out
        (
            {"out": f(2, 8, 4, 64)},
            ValueError,
            (
                "out has shape [2, 8, 4, 64]; it must be [batch, seqlen_q, heads, dv] = [2, "
                "8, 4, 32]"
            ),
        ),
        (
            {"out": f(8, 4, 32)},
            ValueError,
            ("out has rank 3 ([8, 4, 32]); it must have rank 4: [batch, seqlen_q, heads, dv]"),
        ),
        (
            {"out": h(2, 8, 4, 32)},
            TypeError,
            (
                "q has dtype float32 but out has dtype float16; q, k, v and the output must "
                "have one dtype: convert out"
            ),
        ),
        (
            {"out": f(2, 8, 4, 32, dtype=np.int64)},
            TypeError,
            (
                "out has dtype int64; it must be float16, bfloat16 or float32 (on the CPU; "
                "float64 for the reference)"
            ),
        ),
        (
            {"out": [0.0]},
            TypeError,
            (
                "out is a list; it must be a tensor: torch, NumPy, CuPy, JAX, or any object "
                "with __dlpack__"
            ),
        ),
        (
            {"out": every_second(f(2, 8, 4, 32))},
            ValueError,
            (
                "out has stride 2 in its last dimension; that dimension must be contiguous "
                "(stride 1): copy out to a contiguous tensor first"
            ),
        ),
        (
            {"out": read_only(f(2, 8, 4, 32))},
            ValueError,
            "out is read-only; it must be writable",
        ),
        (
            {"out": broadcast(2, 8, 4, 32)},
            ValueError,
            (
                "out has stride 0 in dimension 0 of size 2; every element of an output must "
                "have its own memory"
            ),
        ),
        (
            {
                "out": np.lib.stride_tricks.as_strided(
                    f(2 * 8 * 4 * 32), (2, 8, 4, 32), (4096, 128, 128, 4)
                )
            },
            ValueError,
            (
                "out of shape [2, 8, 4, 32] and strides [1024, 32, 32, 1] may hold one "
                "element twice; every element of an output must have its own memory"
            ),
        ),
        (
            {"q": SHARED, "out": SHARED[..., :32]},
            ValueError,
            (
                "out shares memory with q; outputs must not overlap inputs: give it memory of"
                " its own"
            ),
        ),
    ],
    "packed": [
        (
            {"cu_seqlens_q": None},
            TypeError,
            "cu_seqlens_q is None; it must be an int32 tensor of shape [batch + 1]",
        ),
        (
            {"cu_seqlens_k": None},
            TypeError,
            "cu_seqlens_k is None; it must be an int32 tensor of shape [batch + 1]",
        ),
        (
            {"q": f(1, 12, 4, 64)},
            ValueError,
            ("q has rank 4 ([1, 12, 4, 64]); it must have rank 3: [total_q, heads, d] (packed)"),
        ),
        (
            {"cu_seqlens_q": np.array([0, 5, 12])},
            TypeError,
            "cu_seqlens_q has dtype int64; it must be int32",
        ),
        (
            {"cu_seqlens_k": f(3)},
            TypeError,
            "cu_seqlens_k has dtype float32; it must be int32",
        ),
        (
            {"cu_seqlens_k": [0, 2, 9]},
            TypeError,
            (
                "cu_seqlens_k is a list; it must be a tensor: torch, NumPy, CuPy, JAX, or any"
                " object with __dlpack__"
            ),
        ),
        (
            {"cu_seqlens_q": ints(0, 5, 4)},
            ValueError,
            (
                "cu_seqlens_q decreases: [1] is 5, [2] is 4; it must be a running sum of the "
                "lengths, starting with 0"
            ),
        ),
        (
            {"cu_seqlens_q": ints(-1, 5, 7)},
            ValueError,
            "cu_seqlens_q[0] is -1; it must be 0 or more",
        ),
        (
            {"cu_seqlens_q": ints(0, 5, 12).reshape(1, 3)},
            ValueError,
            "cu_seqlens_q has rank 2 ([1, 3]); it must have rank 1: [batch + 1]",
        ),
        (
            {"cu_seqlens_q": ints(0, 0, 5, 5, 12, 12)[::2]},
            ValueError,
            ("cu_seqlens_q has strides [2] for shape [3]; it must be contiguous: copy it first"),
        ),
        (
            {"cu_seqlens_q": ints()},
            ValueError,
            "cu_seqlens_q is empty; it must have batch + 1 entries, starting with 0",
        ),
        (
            {"cu_seqlens_q": ints(0, 12)},
            ValueError,
            "cu_seqlens_q has 2 entries but cu_seqlens_k has 3; both must have batch + 1",
        ),
        (
            {"cu_seqlens_k": ints(0, 3, 10)},
            ValueError,
            ("cu_seqlens_k ends with 10 but k has 9 rows; its last entry must not be larger"),
        ),
        (
            {"max_seqlen_q": 6},
            ValueError,
            (
                "max_seqlen_q is 6 but sequence 1 of cu_seqlens_q has length 7; it must be at"
                " least the longest length"
            ),
        ),
        (
            {"max_seqlen_k": 0},
            ValueError,
            (
                "max_seqlen_k is 0 but sequence 0 of cu_seqlens_k has length 2; it must be at"
                " least the longest length"
            ),
        ),
        (
            {"max_seqlen_k": -7},
            ValueError,
            "max_seqlen_k is -7; it must be at least the longest length, and 0 or more",
        ),
        (
            {"max_seqlen_q": None},
            TypeError,
            "max_seqlen_q is None; it must be an integer",
        ),
        (
            {"max_seqlen_q": 7.0},
            TypeError,
            "max_seqlen_q is 7.0; it must be an integer",
        ),
        (
            {"max_seqlen_q": 2**30},
            NotImplementedError,
            (
                "asked: max_seqlen_q 1073741824; available: sequences shorter than 2^30 = "
                "1073741824; missing: wider positions in the kernels"
            ),
        ),
        (
            {"seqused_q": ints(5, 8)},
            ValueError,
            (
                "seqused_q[1] is 8 but sequence 1 of cu_seqlens_q has length 7; it must be "
                "between 0 and the length"
            ),
        ),
        (
            {"seqused_k": ints(-1, 7)},
            ValueError,
            (
                "seqused_k[0] is -1 but sequence 0 of cu_seqlens_k has length 2; it must be "
                "between 0 and the length"
            ),
        ),
        (
            {"seqused_k": ints(2)},
            ValueError,
            "seqused_k has shape [1]; it must be [batch] = [2]",
        ),
        (
            {"seqused_k": f(2)},
            TypeError,
            "seqused_k has dtype float32; it must be int32",
        ),
        (
            {"seqused_k": ints(2, 2, 7, 7)[::2]},
            ValueError,
            ("seqused_k has strides [2] for shape [2]; it must be contiguous: copy it first"),
        ),
        (
            {"alibi_slopes": f(3, 4)},
            ValueError,
            "alibi_slopes has shape [3, 4]; it must be [batch, heads] = [2, 4]",
        ),
        (
            {"out": f(12, 4, 64)},
            ValueError,
            "out has shape [12, 4, 64]; it must be [total_q, heads, dv] = [12, 4, 32]",
        ),
        (
            {"v": f(10, 2, 32)},
            ValueError,
            "k has 9 rows but v has 10; they must be equal",
        ),
    ],
}

TABLE = [
    pytest.param(kind, changes, exception, message, id=f"{kind}: {message[:60]}")
    for kind, entries in REFUSALS.items()
    for changes, exception, message in entries
]


def call(kind, changes):
    function = anyflash.attention if kind == "dense" else anyflash.attention_varlen
    return function, {**(DENSE if kind == "dense" else PACKED), **changes}


@pytest.mark.parametrize(("kind", "changes", "exception", "message"), TABLE)
def test_refusal(binding, kind, changes, exception, message):
    function, arguments = call(kind, changes)
    with pytest.raises(exception) as caught:
        function(**arguments)
    assert str(caught.value) == message
    assert type(caught.value) is exception


@pytest.mark.parametrize(("kind", "changes", "exception", "message"), TABLE)
def test_nothing_is_written_on_refusal(binding, kind, changes, exception, message):
    function, arguments = call(kind, changes)
    out = arguments.setdefault("out", np.full((2, 8, 4, 32), 7, np.float32))
    if kind == "packed" and "out" not in changes:
        out = arguments["out"] = np.full((12, 4, 32), 7, np.float32)
    before = np.array(out)
    with pytest.raises((TypeError, ValueError, NotImplementedError)):
        function(**arguments)
    np.testing.assert_array_equal(np.array(out), before)


def asks_the_same(kind, changes):
    """False where `supports` takes the arguments for something else: a list for a shape, absent
    cu_seqlens for a dense problem."""
    lengths = [changes.get(name, 0) for name in ("cu_seqlens_q", "cu_seqlens_k")]
    return not any(value is None or isinstance(value, list) for value in lengths)


@pytest.mark.parametrize(
    ("kind", "changes", "exception", "message"),
    [param for param in TABLE if asks_the_same(*param.values[:2])],
)
def test_supports_says_the_same(kind, changes, exception, message):
    """What a call refuses, `supports` answers with the same words."""
    _, arguments = call(kind, changes)
    answer = anyflash.supports(**arguments)
    assert not answer
    assert answer.plan is None
    assert answer.reason == message


def test_sound_calls_run(binding):
    assert anyflash.attention(**DENSE).shape == (2, 8, 4, 32)
    assert anyflash.attention_varlen(**PACKED).shape == (12, 4, 32)


def test_reference_refuses_alike():
    with pytest.raises(ValueError, match=r"^q has batch 2 but k has batch 3; they must be equal$"):
        anyflash.reference(**{**DENSE, "k": f(3, 9, 2, 64)})


def test_torch_refusals(binding):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    q = torch.zeros(1, 8, 2, 64)
    with pytest.raises(NotImplementedError) as caught:
        anyflash.reference(q.clone().requires_grad_(), q, q)
    assert str(caught.value) == (
        "asked: gradients through a function that has none (q.requires_grad is True); available: "
        "gradients of attention and attention_varlen by q, k and v, if q is a torch tensor; "
        "missing: this one: call it under torch.no_grad(), or detach the tensors"
    )
    with torch.no_grad():
        anyflash.attention(q.clone().requires_grad_(), q, q)
    with pytest.raises(NotImplementedError) as caught:
        anyflash.reference(q.to("meta"), q, q)
    assert str(caught.value) == (
        "asked: attention on meta (q); available: cpu and cuda; missing: a backend for it"
    )
    with pytest.raises(TypeError) as caught:
        anyflash.attention(q, q.to_sparse(), q)
    assert str(caught.value) == (
        "k has layout torch.sparse_coo; it must be a dense tensor (torch.strided)"
    )
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.zeros(1, 8, 2, 64)
    with pytest.raises(NotImplementedError, match="asked: attention with q a FakeTensor"):
        anyflash.reference(fake, fake, fake)
    with pytest.raises(NotImplementedError, match=r"q inside a transformation of torch \(vmap,"):
        torch.func.vmap(lambda x: anyflash.reference(x, x, x))(torch.zeros(3, 1, 8, 2, 64))


# Gradients

DENSE_BACKWARD = {**DENSE, "dout": f(2, 8, 4, 32), "out": f(2, 8, 4, 32), "lse": f(2, 4, 8)}
PACKED_BACKWARD = {**PACKED, "dout": f(12, 4, 32), "out": f(12, 4, 32), "lse": f(4, 12)}
BOTH = f(2, 18, 4, 64)

# What is said of q, k, v and the options is above: a call of each kind, and the new arguments.
BACKWARD_REFUSALS = {
    "dense": [
        (
            {"k": f(3, 9, 2, 64)},
            ValueError,
            "q has batch 2 but k has batch 3; they must be equal",
        ),
        (
            {"softcap": -1.0},
            ValueError,
            "softcap is -1; it must be 0 (off) or a finite positive number, at least 1e-20",
        ),
        # absent
        (
            {"dout": None},
            ValueError,
            "dout is missing; the backward reads the gradient of the output",
        ),
        ({"out": None}, ValueError, "out is missing; the backward reads what the forward wrote"),
        ({"lse": None}, ValueError, "lse is missing; the backward reads what the forward wrote"),
        # dout and dlse
        (
            {"dout": [1.0]},
            TypeError,
            (
                "dout is a list; it must be a tensor: torch, NumPy, CuPy, JAX, or any object with"
                " __dlpack__"
            ),
        ),
        (
            {"dout": f(2, 8, 4, 64)},
            ValueError,
            (
                "dout has shape [2, 8, 4, 64]; it must be [batch, seqlen_q, heads, dv] = [2, 8, "
                "4, 32]"
            ),
        ),
        (
            {"dout": f(8, 4, 32)},
            ValueError,
            "dout has rank 3 ([8, 4, 32]); it must have rank 4: [batch, seqlen_q, heads, dv]",
        ),
        (
            {"dout": h(2, 8, 4, 32)},
            TypeError,
            (
                "q has dtype float32 but dout has dtype float16; q, k, v and the output must have"
                " one dtype: convert dout"
            ),
        ),
        (
            {"dout": every_second(f(2, 8, 4, 32))},
            ValueError,
            (
                "dout has stride 2 in its last dimension; that dimension must be contiguous "
                "(stride 1): copy dout to a contiguous tensor first"
            ),
        ),
        (
            {"dlse": 3.0},
            TypeError,
            (
                "dlse is a float; it must be a tensor: torch, NumPy, CuPy, JAX, or any object with"
                " __dlpack__"
            ),
        ),
        (
            {"dlse": f(2, 8, 4)},
            ValueError,
            "dlse has shape [2, 8, 4]; it must be [batch, heads, seqlen_q] = [2, 4, 8]",
        ),
        (
            {"dlse": f(2, 4, 8, dtype=np.float64)},
            TypeError,
            "dlse has dtype float64; it must be float32",
        ),
        (
            {"dlse": f(2, 4, 16)[..., ::2]},
            ValueError,
            (
                "dlse has strides [64, 16, 2] for shape [2, 4, 8]; it must be contiguous: copy it "
                "first"
            ),
        ),
        # what the forward wrote
        (
            {"out": f(2, 9, 4, 32)},
            ValueError,
            (
                "out has shape [2, 9, 4, 32]; it must be [batch, seqlen_q, heads, dv] = [2, 8, 4,"
                " 32]"
            ),
        ),
        (
            {"lse": f(2, 8, 4)},
            ValueError,
            "lse has shape [2, 8, 4]; it must be [batch, heads, seqlen_q] = [2, 4, 8]",
        ),
        ({"lse": h(2, 4, 8)}, TypeError, "lse has dtype float16; it must be float32"),
        (
            {"lse": f(2, 4, 8, 1)},
            ValueError,
            "lse has rank 4 ([2, 4, 8, 1]); it must have rank 3: [batch, heads, seqlen_q]",
        ),
        # gradients to write
        (
            {"dq": f(2, 8, 4, 32)},
            ValueError,
            ("dq has shape [2, 8, 4, 32]; it must be [batch, seqlen_q, heads, d] = [2, 8, 4, 64]"),
        ),
        (
            {"dk": f(2, 9, 4, 64)},
            ValueError,
            (
                "dk has shape [2, 9, 4, 64]; it must be [batch, seqlen_k, heads_k, d] = [2, 9, 2,"
                " 64]"
            ),
        ),
        (
            {"dv": f(2, 9, 2, 64)},
            ValueError,
            (
                "dv has shape [2, 9, 2, 64]; it must be [batch, seqlen_k, heads_k, dv] = [2, 9, "
                "2, 32]"
            ),
        ),
        (
            {"dv": h(2, 9, 2, 32)},
            TypeError,
            (
                "q has dtype float32 but dv has dtype float16; q, k, v and the output must have "
                "one dtype: convert dv"
            ),
        ),
        (
            {"dq": read_only(f(2, 8, 4, 64))},
            ValueError,
            "dq is read-only; it must be writable",
        ),
        (
            {"dk": broadcast(2, 9, 2, 64)},
            ValueError,
            (
                "dk has stride 0 in dimension 0 of size 2; every element of an output must have "
                "its own memory"
            ),
        ),
        (
            {"dq": every_second(f(2, 8, 4, 64))},
            ValueError,
            (
                "dq has stride 2 in its last dimension; that dimension must be contiguous (stride "
                "1): copy dq to a contiguous tensor first"
            ),
        ),
        # memory
        (
            {"q": SHARED, "dq": SHARED},
            ValueError,
            ("dq shares memory with q; outputs must not overlap inputs: give it memory of its own"),
        ),
        (
            {"dout": SHARED[..., :32], "dq": SHARED},
            ValueError,
            (
                "dq shares memory with dout; outputs must not overlap inputs: give it memory of "
                "its own"
            ),
        ),
        (
            {"out": SHARED[..., :32], "dq": SHARED},
            ValueError,
            (
                "dq shares memory with out; outputs must not overlap inputs: give it memory of "
                "its own"
            ),
        ),
        (
            {"dq": BOTH[:, :8], "dk": BOTH[:, :9, :2]},
            ValueError,
            (
                "dk shares memory with dq; outputs must not overlap one another: give it memory of "
                "its own"
            ),
        ),
    ],
    "packed": [
        (
            {"dout": f(12, 4, 64)},
            ValueError,
            "dout has shape [12, 4, 64]; it must be [total_q, heads, dv] = [12, 4, 32]",
        ),
        (
            {"dout": f(1, 12, 4, 32)},
            ValueError,
            "dout has rank 4 ([1, 12, 4, 32]); it must have rank 3: [total_q, heads, dv]",
        ),
        (
            {"lse": f(12, 4)},
            ValueError,
            "lse has shape [12, 4]; it must be [heads, total_q] = [4, 12]",
        ),
        (
            {"dlse": f(4, 11)},
            ValueError,
            "dlse has shape [4, 11]; it must be [heads, total_q] = [4, 12]",
        ),
        (
            {"dq": f(12, 2, 64)},
            ValueError,
            "dq has shape [12, 2, 64]; it must be [total_q, heads, d] = [12, 4, 64]",
        ),
        (
            {"dk": f(9, 4, 64)},
            ValueError,
            "dk has shape [9, 4, 64]; it must be [total_k, heads_k, d] = [9, 2, 64]",
        ),
        (
            {"dv": f(9, 2, 64)},
            ValueError,
            "dv has shape [9, 2, 64]; it must be [total_k, heads_k, dv] = [9, 2, 32]",
        ),
        (
            {"cu_seqlens_q": None},
            ValueError,
            (
                "cu_seqlens_k is given but cu_seqlens_q is missing; packed problems need both, "
                "dense ones neither"
            ),
        ),
    ],
}

BACKWARD_TABLE = [
    pytest.param(kind, changes, exception, message, id=f"{kind}: {message[:60]}")
    for kind, entries in BACKWARD_REFUSALS.items()
    for changes, exception, message in entries
]


def gradients_of(kind, changes):
    """The arguments, every gradient given and full of 7 where `changes` does not give it."""
    arguments = {**(DENSE_BACKWARD if kind == "dense" else PACKED_BACKWARD), **changes}
    sound = DENSE if kind == "dense" else PACKED
    for name in ("dq", "dk", "dv"):
        arguments.setdefault(name, np.full(sound[name[1]].shape, 7, np.float32))
    return arguments


@pytest.mark.parametrize(("kind", "changes", "exception", "message"), BACKWARD_TABLE)
def test_backward_refusal(kind, changes, exception, message):
    """The exception, all of its words, and that no gradient is written."""
    arguments = gradients_of(kind, changes)
    before = {name: np.array(arguments[name]) for name in ("dq", "dk", "dv")}
    with pytest.raises(exception) as caught:
        anyflash.attention_backward(**arguments)
    assert str(caught.value) == message
    assert type(caught.value) is exception
    for name, x in before.items():
        np.testing.assert_array_equal(np.array(arguments[name]), x)


def test_sound_backward_calls_run():
    for kind in ("dense", "packed"):
        arguments = gradients_of(kind, {})
        gradients = anyflash.attention_backward(**arguments)
        assert [x.shape for x in gradients] == [arguments[n].shape for n in "qkv"]


def test_backward_of_float64_is_refused():
    doubles = {n: x.astype(np.float64) for n, x in DENSE_BACKWARD.items() if n != "lse"}
    with pytest.raises(NotImplementedError) as caught:
        anyflash.attention_backward(**doubles, lse=DENSE_BACKWARD["lse"])
    assert str(caught.value) == (
        "asked: backward of float64; available: float32, float16, bfloat16 on the CPU; missing: a "
        "tiled algorithm in double (the reference takes float64)"
    )


def test_reference_backward_refuses_alike():
    arguments = {n: x for n, x in DENSE_BACKWARD.items() if n not in ("out", "lse")}
    with pytest.raises(ValueError, match=r"^dlse has shape \[2, 8, 4\]; it must be \[batch, heads"):
        anyflash.reference_backward(**arguments, dlse=f(2, 8, 4))
