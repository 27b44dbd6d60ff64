"""Tensors of every library: what goes in comes out, on the same device, of the same kind."""

from __future__ import annotations

import contextlib
import gc
import sys
import types

import anyflash
import numpy as np
import pytest
from anyflash import _backend, _library, _tensors
from foreign_tensors import BFLOAT, Foreign, bfloat16_bits

RANDOM = np.random.default_rng(3)
Q = RANDOM.standard_normal((2, 17, 4, 32), np.float32)
K = RANDOM.standard_normal((2, 19, 2, 32), np.float32)
V = RANDOM.standard_normal((2, 19, 2, 16), np.float32)
O, L = anyflash.reference(Q, K, V, causal=True, return_lse=True)


def check(o, lse, tolerance=1e-5):
    np.testing.assert_allclose(np.asarray(o, np.float32), O, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(np.asarray(lse, np.float32), L, rtol=tolerance, atol=tolerance)


def attend(*tensors, **options):
    return anyflash.attention(*tensors, causal=True, return_lse=True, **options)


def test_numpy(binding):
    o, lse = attend(Q, K, V)
    assert type(o) is np.ndarray
    assert o.dtype == lse.dtype == np.float32
    assert lse.shape == (2, 4, 17)
    check(o, lse)


def test_numpy_float16(binding):
    o, lse = attend(*(x.astype(np.float16) for x in (Q, K, V)))
    assert o.dtype == np.float16
    assert lse.dtype == np.float32
    check(o, lse, 2e-2)


def test_numpy_bfloat16(binding):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="NumPy has bfloat16 through ml_dtypes")
    o, lse = attend(*(x.astype(ml_dtypes.bfloat16) for x in (Q, K, V)))
    assert o.dtype == ml_dtypes.bfloat16
    check(o, lse, 1e-1)


def test_numpy_inputs_may_be_read_only(binding):
    q = Q.copy()
    q.flags.writeable = False
    check(*attend(q, K, V))


def test_numpy_memory_map(binding, tmp_path):
    np.save(tmp_path / "q.npy", Q)
    o, lse = attend(np.load(tmp_path / "q.npy", mmap_mode="r"), K, V)
    check(o, lse)


@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize("strides", [False, True])
def test_objects_that_only_speak_dlpack(binding, versioned, strides):
    options = {"versioned": versioned, "strides": strides}
    o, lse = attend(*(Foreign(x, **options) for x in (Q, K, V)))
    assert type(o) is np.ndarray
    check(o, lse)


def test_dlpack_byte_offset(binding):
    check(*attend(*(Foreign(x, byte_offset=256) for x in (Q, K, V))))


def test_dlpack_strides(binding):
    q = np.ascontiguousarray(Q.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
    check(*attend(Foreign(q), K, V))


def test_dlpack_bfloat16(binding):
    pytest.importorskip("ml_dtypes", reason="NumPy has bfloat16 through ml_dtypes")
    tensors = (Foreign(bfloat16_bits(x), code=BFLOAT) for x in (Q, K, V))
    o, lse = attend(*tensors)
    assert o.dtype.name == "bfloat16"
    check(o, lse, 1e-1)


def test_dlpack_out(binding):
    out = np.full(O.shape, np.nan, np.float32)
    target = Foreign(out)
    result = anyflash.attention(*(Foreign(x) for x in (Q, K, V)), causal=True, out=target)
    assert result is target
    np.testing.assert_allclose(out, O, rtol=1e-5, atol=1e-5)


REFUSED = [
    (
        Foreign(Q, device=(2, 0)),
        TypeError,
        "q is on cuda:0 but k is on cpu; all tensors must be on one device: move k to cuda:0",
    ),
    (
        Foreign(Q, device=(4, 0)),
        NotImplementedError,
        "asked: attention on DLPack device type 4 (q); available: cpu (1) and cuda (2); missing: "
        "a backend for it",
    ),
    (
        Foreign(Q, code=5, bits=64),
        TypeError,
        "q has dtype complex64; it must be float16, bfloat16 or float32 (on the CPU; float64 for "
        "the reference)",
    ),
    (
        Foreign(Q, lanes=4),
        TypeError,
        "q has dtype float32x4; it must be float16, bfloat16 or float32 (on the CPU; float64 for "
        "the reference)",
    ),
    (
        Foreign(Q, versioned=True, major=2),
        NotImplementedError,
        "asked: q in DLPack version 2.0; available: versions 0 and 1; missing: a newer anyflash",
    ),
]


@pytest.mark.parametrize(("q", "exception", "message"), REFUSED)
def test_dlpack_refusals(binding, q, exception, message):
    with pytest.raises(exception) as caught:
        attend(q, K, V)
    assert str(caught.value) == message


def test_read_only_dlpack_is_no_output(binding):
    target = Foreign(np.zeros(O.shape, np.float32), versioned=True, read_only=True)
    with pytest.raises(ValueError, match=r"^out is read-only; it must be writable$"):
        anyflash.attention(Q, K, V, out=target)


def test_out_of_another_library(binding):
    out = np.full(O.shape, np.nan, np.float32)
    target = Foreign(out)
    assert anyflash.attention(Q, K, V, causal=True, out=target) is target
    np.testing.assert_allclose(out, O, rtol=1e-5, atol=1e-5)


# torch


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-2), ("bfloat16", 1e-1)]
)
def test_torch(binding, dtype, tolerance):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensors = [torch.from_numpy(x).to(getattr(torch, dtype)) for x in (Q, K, V)]
    o, lse = attend(*tensors)
    assert type(o) is torch.Tensor
    assert o.dtype is tensors[0].dtype
    assert lse.dtype is torch.float32
    assert not o.requires_grad
    check(o.float().numpy(), lse.numpy(), tolerance)


def test_torch_views(binding):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    q = torch.from_numpy(Q).transpose(1, 2).contiguous().transpose(1, 2)
    kv = torch.from_numpy(np.concatenate([K, K], 2))[:, :, 1:3]  # a storage offset
    expected = anyflash.reference(Q, np.ascontiguousarray(kv.numpy()), V)
    o = anyflash.attention(q, kv, torch.from_numpy(V))
    np.testing.assert_allclose(o.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_torch_out_and_parameter(binding):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    q, k, v = (torch.from_numpy(x) for x in (Q, K, V))
    out = torch.full(O.shape, float("nan"))
    assert anyflash.attention(q, k, v, causal=True, out=out) is out
    np.testing.assert_allclose(out.numpy(), O, rtol=1e-5, atol=1e-5)
    frozen = torch.nn.Parameter(q, requires_grad=False)
    check(*(x.numpy() for x in attend(frozen, k, v)))


def test_torch_results_are_torchs_own(binding):
    """Ordinary memory of torch, contiguous: it can be resized, and shared with nobody."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    q = torch.from_numpy(Q).transpose(1, 2).contiguous().transpose(1, 2)
    o, lse = attend(q, torch.from_numpy(K), torch.from_numpy(V))
    for tensor in (o, lse):
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().resizable()


def test_torch_packed_with_all_options(binding):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    q, k, v = Q[0], K[0], V[0]
    tensors = {
        "cu_seqlens_q": np.array([0, 5, 17], np.int32),
        "cu_seqlens_k": np.array([0, 9, 19], np.int32),
        "seqused_q": np.array([5, 11], np.int32),
        "seqused_k": np.array([0, 10], np.int32),
        "alibi_slopes": np.array([0.1, 0.2, 0.3, 0.4], np.float32),
    }
    options = {"max_seqlen_q": 12, "max_seqlen_k": 10, "window": (4, 2), "softcap": 5.0}
    expected, expected_lse = anyflash.reference(q, k, v, **tensors, **options, return_lse=True)
    o, lse = anyflash.attention_varlen(
        *(torch.from_numpy(x) for x in (q, k, v)),
        **{name: torch.from_numpy(x) for name, x in tensors.items()},
        **options,
        return_lse=True,
    )
    np.testing.assert_allclose(o.numpy(), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(lse.numpy(), expected_lse, rtol=1e-4, atol=1e-4)


# JAX


def test_jax(binding):
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    o, lse = attend(*(jax.numpy.asarray(x) for x in (Q, K, V)))
    assert isinstance(o, jax.Array)
    assert isinstance(lse, jax.Array)
    check(o, lse)


def test_jax_bfloat16(binding):
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    o, lse = attend(*(jax.numpy.asarray(x, jax.numpy.bfloat16) for x in (Q, K, V)))
    assert o.dtype == jax.numpy.bfloat16
    check(o, lse, 1e-1)


def test_jax_refusals(binding):
    jax = pytest.importorskip("jax", reason="JAX is not installed")
    q, k, v = (jax.numpy.asarray(x) for x in (Q, K, V))
    with pytest.raises(NotImplementedError, match="asked: attention inside a JAX transformation"):
        jax.jit(anyflash.attention)(q, k, v)
    with pytest.raises(TypeError, match=r"^out is a JAX array, which is immutable; leave out away"):
        anyflash.attention(q, k, v, out=jax.numpy.zeros(O.shape))


# CuPy, as far as it can be tried without a GPU


@pytest.fixture
def cupy(monkeypatch):
    """A module that has what the adapter uses of CuPy; its memory is NumPy's."""
    module = types.ModuleType("cupy")
    current = types.SimpleNamespace(id=3, entered=[])

    class Device:
        def __init__(self, index):
            self.id = index

        def __enter__(self):
            current.entered.append(self.id)

        def __exit__(self, *error):
            pass

    class ndarray:
        __module__ = "cupy"

        def __init__(self, array):
            self.array = array
            self.shape, self.strides = array.shape, array.strides
            self.dtype, self.itemsize = array.dtype, array.itemsize
            self.data = types.SimpleNamespace(ptr=array.ctypes.data)
            self.device = Device(1)

    module.ndarray, module.float32 = ndarray, np.float32
    module.empty = lambda shape, dtype: ndarray(np.empty(shape, dtype))
    stream = types.SimpleNamespace(ptr=4242)
    module.cuda = types.SimpleNamespace(Device=Device, get_current_stream=lambda: stream)
    module.entered = current.entered
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_cupy(cupy):
    q = cupy.ndarray(Q.astype(np.float16))
    k, v = (cupy.ndarray(x.astype(np.float16)[:, ::2]) for x in (K, V))
    adapter = _tensors.adapter_of(q, "q")
    described = adapter.describe(k, "k")
    assert described.device == (2, 1)
    assert described.data == k.data.ptr
    assert described.strides == (19 * 64, 128, 32, 1)
    assert adapter.stream((2, 1)) == 4242
    out = adapter.empty(q, (2, 3), _library.FLOAT32)
    assert type(out) is cupy.ndarray
    assert out.dtype == np.float32
    assert cupy.entered == [1, 1]  # the stream and the memory of q's device
    answer = anyflash.supports(q, k, v, device="sm_90")
    assert answer, answer.reason
    with pytest.raises(TypeError, match=r"^q is on cuda:1 but k is on cpu; all tensors must be"):
        anyflash.attention(q, K.astype(np.float16), V.astype(np.float16))


# The fast way is really taken


def test_fast_takes_the_usual_calls_itself(monkeypatch):
    fast = pytest.importorskip("anyflash._fast", reason="the extension _fast is not built")

    def complete(*arguments):
        raise AssertionError("handed to the complete way")

    fast.bind(_library.find(), *[complete] * 4, _library.show_notice)
    for name in _backend.FUNCTIONS:
        monkeypatch.setattr(_backend, name, getattr(fast, name))
    try:
        check(*attend(Q, K, V, window=(None, 3), scale=None, softcap=0.0, deterministic=True))
        anyflash.attention(Q, K, V, out=np.zeros(O.shape, np.float32), scale=0.3, softcap=2.0)
        lengths = np.array([0, 17], np.int32)
        anyflash.attention_varlen(Q[0], K[0], V[0], lengths, lengths, 17, 19)
        try:
            import torch
        except ImportError:
            return
        if hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
            q, k, v = (torch.from_numpy(x).bfloat16() for x in (Q, K, V))
            attend(q, k, v, out=torch.zeros(O.shape, dtype=torch.bfloat16))
            tensors = [x.requires_grad_() for x in (q, k, v)]
            o, lse = anyflash.attention(*tensors, causal=True, return_lse=True)
            torch.autograd.grad(o.sum() + lse.sum(), tensors)
            slopes = torch.ones(4)
            torch.autograd.grad(anyflash.attention(q, k, v, alibi_slopes=slopes).sum(), tensors)
            with torch.no_grad():
                anyflash.attention_backward(o, *tensors, o, lse)
            with torch.autocast("cpu", torch.bfloat16):
                anyflash.attention(q, k, v)
    finally:
        _backend.choose()


def test_references_are_given_back(binding):
    # From 3.12 on None and dtypes are immortal: their counts mean nothing.
    objects = (Q, K, V) if sys.version_info >= (3, 12) else (Q, K, V, None, Q.dtype)
    gc.collect()
    before = [sys.getrefcount(x) for x in objects]
    for _ in range(1000):
        attend(Q[:, :1], K, V)
        with contextlib.suppress(ValueError):
            anyflash.attention(Q, K[:1], V)
    gc.collect()
    after = [sys.getrefcount(x) for x in objects]
    assert max(abs(a - b) for a, b in zip(after, before)) < 500
