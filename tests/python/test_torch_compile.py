"""torch.compile and torch.export: the same numbers, one graph, no storm of recompilations."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
anyflash = pytest.importorskip("anyflash", reason="anyflash is not installed")
if not hasattr(torch.library, "register_autograd"):
    pytest.skip("torch.compile needs torch 2.4 or newer", allow_module_level=True)

from torch._dynamo.testing import CompileCounterWithBackend
from torch_device import DEVICE, DTYPE, ON_GPU, qkv
from torch_formula import attention as formula
from torch_formula import int32, loss_of, worst

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
OPTIONS = {
    "plain": {},
    "causal, lse": {"causal": True, "return_lse": True},
    "window": {"window": (3, None), "scale": 0.2},
    "softcap, alibi": {"softcap": 4.0, "alibi_slopes": SLOPES, "return_lse": True},
    "deterministic": {"deterministic": True},
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def results(function, tensors, *more):
    """O and, if there is one, L; and the gradients of all tensors."""
    out = function(*tensors, *more)
    o, lse = out if isinstance(out, tuple) else (out, None)
    gradients = torch.autograd.grad(loss_of(o, lse), tensors)
    return [o.detach(), *(() if lse is None else (lse.detach(),)), *gradients]


def assert_same(ours, expected):
    assert len(ours) == len(expected)
    for a, b in zip(ours, expected):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
        assert a.dtype is b.dtype


@pytest.mark.parametrize("name", OPTIONS)
def test_dense(name):
    options = {
        key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value
        for key, value in OPTIONS[name].items()
    }

    def function(q, k, v):
        return anyflash.attention(q, k, v, **options)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    tensors = qkv()
    assert_same(results(compiled, tensors), results(function, tensors))
    for _ in range(3):
        results(compiled, qkv(seed=1))
    assert counter.frame_count == 1


def test_packed():
    def function(q, k, v, lengths_q, lengths_k):
        return anyflash.attention_varlen(
            q, k, v, lengths_q, lengths_k, 9, 12, causal=True, return_lse=True
        )

    tensors = tuple(x.detach()[0].requires_grad_() for x in qkv(batch=1, n=17, m=20))
    lengths = int32([0, 8, 8, 17], tensors[0]), int32([0, 5, 8, 20], tensors[0])
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_same(results(compiled, tensors, *lengths), results(function, tensors, *lengths))


class Block(torch.nn.Module):
    """Projections, attention, and something after it that a compiler may want to move."""

    def __init__(self, attention=anyflash.attention):
        super().__init__()
        self.project = torch.nn.Linear(32, 3 * 32)
        self.out = torch.nn.Linear(32, 32)
        self.attention = attention

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 2, 16)).unbind(-3)
        return x + self.out(self.attention(q, k, v, causal=True).flatten(-2)).tanh()


def block(attention=anyflash.attention, dtype=DTYPE):
    """All have the same weights, numbers of DTYPE."""
    torch.manual_seed(0)
    return Block(attention).to(DEVICE, DTYPE).to(dtype)


def module_results(module, function, x):
    module.zero_grad()
    y = function(x)
    loss_of(y, None).backward()
    return [y.detach(), *(parameter.grad.clone() for parameter in module.parameters())]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_module(backend):
    if backend == "inductor":
        pytest.importorskip(
            "torch.utils.cpp_extension", reason="inductor needs setuptools", exc_type=ImportError
        )
        if ON_GPU:
            pytest.importorskip("triton", reason="inductor needs triton for a GPU")
        elif shutil.which("c++") is None and shutil.which("g++") is None:
            pytest.skip("inductor needs a C++ compiler")
    module, exact, peer = block(), block(formula, torch.float64), block(formula)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE, DTYPE)
    ours = module_results(module, compiled, x)
    expected = module_results(exact, exact, x.double())
    assert worst(ours, expected, module_results(peer, peer, x)) is None


def test_dynamic_shapes():
    def function(q, k, v):
        return anyflash.attention(q, k, v, causal=True)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    graphs = set()  # how many there were after each call
    for batch, n, m in ((3, 5, 7), (5, 6, 9), (7, 11, 8), (9, 30, 40)):
        tensors = qkv(batch=batch, n=n, m=m)
        assert_same(results(compiled, tensors), results(function, tensors))
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


def test_shapes_become_dynamic_by_themselves():
    """Without being asked: one graph for the first length, one for all the others."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(anyflash.attention, backend=counter, fullgraph=True)
    for n in (5, 6, 7, 9, 12, 20):
        tensors = qkv(n=n, m=n)
        assert_same(results(compiled, tensors), results(anyflash.attention, tensors))
    assert counter.frame_count == 2


def test_lengths_of_packed_sequences_are_dynamic():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def compiled(q, k, v, lengths, longest):
        return anyflash.attention_varlen(q, k, v, lengths, lengths, longest, longest)

    graphs = set()
    for lengths in ([0, 5, 11], [0, 3, 12], [0, 7, 16]):
        longest = max(b - a for a, b in zip(lengths, lengths[1:]))
        total = lengths[-1]
        tensors = [x[0] for x in qkv(batch=1, n=total, m=total, requires_grad=False)]
        cu_seqlens = int32(lengths, tensors[0])
        ours = compiled(*tensors, cu_seqlens, longest)
        plain = anyflash.attention_varlen(*tensors, cu_seqlens, cu_seqlens, longest, longest)
        assert torch.equal(ours, plain)
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


def test_autocast_inside():
    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(q, k, v):
        with torch.autocast(DEVICE, torch.bfloat16):
            return anyflash.attention(q, k, v)

    tensors = qkv(dtype=torch.float32)
    o = compiled(*tensors)
    assert o.dtype is torch.bfloat16
    expected = anyflash.attention(*(x.bfloat16() for x in tensors))
    assert torch.equal(o, expected)
    assert torch.autograd.grad(o.float().sum(), tensors)[0].dtype is torch.float32


def test_deterministic_follows_torch():
    """A change of the switch is a new graph, not a stale one."""
    seen = []

    def backend(module, inputs):
        seen.extend(node.args[-1] for node in module.graph.nodes if "anyflash" in str(node.target))
        return module

    compiled = torch.compile(anyflash.attention, backend=backend, fullgraph=True)
    tensors = qkv(requires_grad=False)
    torch.use_deterministic_algorithms(False)
    compiled(*tensors)
    torch.use_deterministic_algorithms(True)
    try:
        compiled(*tensors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [False, True]


def test_the_backward_function():
    tensors = qkv(requires_grad=False)
    o, lse = anyflash.attention(*tensors, return_lse=True)
    compiled = torch.compile(anyflash.attention_backward, backend="aot_eager", fullgraph=True)
    ours = compiled(o, *tensors, o, lse)
    assert_same(ours, anyflash.attention_backward(o, *tensors, o, lse))


def test_out_is_refused():
    q, k, v = qkv(requires_grad=False)
    compiled = torch.compile(anyflash.attention, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="asked: out= inside a transformation of torch"):
        compiled(q, k, v, out=torch.empty_like(q))


def test_export():
    if not hasattr(torch, "export"):
        pytest.skip("this torch has no torch.export")
    module = block()
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE, DTYPE)
    program = torch.export.export(module, (x,))
    assert any("anyflash" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), module(x))


def test_vmap_inside():
    def function(q, k, v):
        return torch.func.vmap(lambda *x: anyflash.attention(*(y[None] for y in x))[0])(q, k, v)

    tensors = qkv()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*tensors), anyflash.attention(*tensors))


def test_the_first_torch_call_may_be_compiled():
    """Also where torch came after anyflash had chosen its way for another library."""
    code = (
        "import numpy, anyflash\n"
        "x = numpy.ones((1, 2, 1, 8), 'f')\n"
        "anyflash.attention(x, x, x)\n"
        "import torch\n"
        f"q = torch.ones(1, 4, 2, 8, device={DEVICE!r}, dtype={DTYPE}, requires_grad=True)\n"
        "f = torch.compile(anyflash.attention, backend='eager', fullgraph=True)\n"
        "f(q, q, q).sum().backward()\n"
        "assert q.grad.isfinite().all()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
