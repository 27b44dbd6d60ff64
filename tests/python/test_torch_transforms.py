"""torch.func, modes, subclasses and tensors without memory: what goes through the dispatcher."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
anyflash = pytest.importorskip("anyflash", reason="anyflash is not installed")
if not hasattr(torch.library, "register_vmap"):
    pytest.skip("the operators need torch 2.5 or newer", allow_module_level=True)

from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch_device import DEVICE, ON_GPU, qkv
from torch_formula import int32

SLOPES = torch.tensor([[0.5, 0.25, 0.125, 0.0625], [0.4, 0.3, 0.2, 0.1]])
OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window, softcap": {"window": (3, 1), "softcap": 2.0, "scale": 0.3},
    "alibi": {"alibi_slopes": SLOPES},
}


def options_of(name):
    options = OPTIONS[name]
    return {k: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for k, x in options.items()}


def detached(**shape):
    return qkv(requires_grad=False, **shape)


def operator_arguments(tensors, options):
    """Those of torch.ops.anyflash.attention."""
    left, right = options.get("window", (None, None))
    return (
        *tensors,
        *(None, None, 0, 0, None, None),
        options.get("causal", False),
        left,
        right,
        options.get("scale"),
        options.get("softcap", 0.0),
        options.get("alibi_slopes"),
        ON_GPU,  # deterministic: opcheck compares runs
    )


# The operators themselves


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_opcheck(name, requires_grad):
    anyflash.attention(*detached(dtype=torch.bfloat16), **OPTIONS["plain"])
    from anyflash.torch import _ops  # noqa: F401  registers

    tensors = qkv(requires_grad=requires_grad)
    arguments = operator_arguments(tensors, options_of(name))
    torch.library.opcheck(torch.ops.anyflash.attention.default, arguments)


def test_opcheck_of_strided_tensors():
    from anyflash.torch import _ops  # noqa: F401

    tensors = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in qkv()]
    arguments = operator_arguments([x.requires_grad_() for x in tensors], {})
    torch.library.opcheck(torch.ops.anyflash.attention.default, arguments)


@pytest.mark.parametrize("name", OPTIONS)
def test_opcheck_of_the_backward(name):
    from anyflash.torch import _ops  # noqa: F401

    options = options_of(name)
    tensors = detached()
    o, lse = anyflash.attention(*tensors, **options, return_lse=True)
    arguments = (o, *tensors, o, lse, lse, *operator_arguments(tensors, options)[3:])
    torch.library.opcheck(torch.ops.anyflash.attention_backward.default, arguments)


def test_opcheck_of_packed_sequences():
    from anyflash.torch import _ops  # noqa: F401

    tensors = [x[0].detach().requires_grad_() for x in qkv(batch=1, n=9, m=9)]
    lengths = int32([0, 4, 9], tensors[0])
    arguments = (*tensors, lengths, lengths, 5, 5, *operator_arguments((), {})[4:])
    torch.library.opcheck(torch.ops.anyflash.attention.default, arguments)


# torch.func


@pytest.mark.parametrize("name", OPTIONS)
def test_grad(binding, name):
    options = options_of(name)

    def loss(q, k, v):
        o, lse = anyflash.attention(q, k, v, **options, return_lse=True)
        return o.square().sum() + lse.sin().sum()

    tensors = qkv()
    expected = torch.autograd.grad(loss(*tensors), tensors)
    ours = grad(loss, argnums=(0, 1, 2))(*detached())
    for a, b in zip(ours, expected):
        assert torch.equal(a, b)


def test_vjp_and_jacrev(binding):
    q, k, v = detached(n=2, m=3, heads=1, heads_k=1, d=4)
    o, pull = vjp(lambda q: anyflash.attention(q, k, v), q)
    jacobian = jacrev(lambda q: anyflash.attention(q, k, v))(q)
    assert jacobian.shape == (*o.shape, *q.shape)
    cotangent = torch.randn(o.shape, generator=torch.Generator().manual_seed(3)).to(o)
    expected = (cotangent.flatten().float() @ jacobian.float().flatten(4).flatten(0, 3)).view(
        q.shape
    )
    torch.testing.assert_close(pull(cotangent)[0].float(), expected, rtol=2e-2, atol=1e-2)


def test_functional_call(binding):
    class Attend(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.k = torch.nn.Parameter(detached()[1])
            self.v = torch.nn.Parameter(detached()[2])

        def forward(self, q):
            return anyflash.attention(q, self.k, self.v)

    module = Attend()
    q, k, v = detached(seed=5)
    assert torch.equal(functional_call(module, {"k": k, "v": v}, (q,)), anyflash.attention(q, k, v))
    gradients = grad(lambda p: functional_call(module, p, (q,)).square().sum())({"k": k, "v": v})
    leaves = [x.clone().requires_grad_() for x in (k, v)]
    anyflash.attention(q, *leaves).square().sum().backward()
    assert torch.equal(gradients["k"], leaves[0].grad)
    assert torch.equal(gradients["v"], leaves[1].grad)


def one_by_one(function, in_dims, *tensors):
    size = next(x.shape[d] for x, d in zip(tensors, in_dims) if d is not None)
    calls = [
        function(*(x if d is None else x.select(d, i) for x, d in zip(tensors, in_dims)))
        for i in range(size)
    ]
    return [torch.stack(parts) for parts in zip(*calls)]


def many(size=3):
    """q, k, v with one more dimension in front."""
    parts = [detached(seed=seed) for seed in range(size)]
    return [torch.stack(x) for x in zip(*parts)]


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, 0, 2), (0, None, None), (None, 0, 0)])
@pytest.mark.parametrize("name", OPTIONS)
def test_vmap(binding, name, in_dims):
    options = options_of(name)

    def function(q, k, v):
        return anyflash.attention(q, k, v, **options, return_lse=True)

    tensors = [x[0] if d is None else x.movedim(0, d).contiguous() for x, d in zip(many(), in_dims)]
    ours = vmap(function, in_dims)(*tensors)
    for a, b in zip(ours, one_by_one(function, in_dims, *tensors)):
        assert torch.equal(a, b)


def test_vmap_of_slopes(binding):
    q, k, v = detached()

    def function(slopes):
        return (anyflash.attention(q, k, v, alibi_slopes=slopes),)

    for slopes in (SLOPES, torch.stack([SLOPES, 2 * SLOPES, 3 * SLOPES])):
        slopes = slopes.to(DEVICE)
        (ours,) = vmap(function)(slopes)
        assert torch.equal(ours, one_by_one(function, (0,), slopes)[0])


def test_vmap_of_packed_sequences(binding):
    q, k, v = (x[:, 0] for x in many())
    lengths = int32([0, 2, 5], q)
    more = torch.stack([lengths, lengths, int32([0, 4, 5], q)])

    def function(q, k, v, lengths):
        keys = lengths + int32([0, 1, 2], q)
        return (anyflash.attention_varlen(q, k, v, lengths, keys, 5, 7),)

    in_dims = (0, 0, 0, 0)
    (ours,) = vmap(function, in_dims)(q, k, v, more)
    assert torch.equal(ours, one_by_one(function, in_dims, q, k, v, more)[0])


def test_gradients_of_each_sample(binding):
    def loss(q, k, v):
        return anyflash.attention(q, k, v, causal=True).square().sum()

    tensors = many()
    each = vmap(grad(loss, argnums=(0, 1, 2)), (0, 0, None))(*tensors[:2], tensors[2][0])
    for i in range(3):
        one = grad(loss, argnums=(0, 1, 2))(tensors[0][i], tensors[1][i], tensors[2][0])
        for a, b in zip(each, one):
            assert torch.equal(a[i], b)


def test_gradient_of_a_vmap(binding):
    def loss(q, k, v):
        return vmap(anyflash.attention, (0, 0, None))(q, k, v).square().sum()

    q, k, v = many()
    ours = grad(loss, argnums=(0, 1, 2))(q, k, v[0])

    def plain(q, k, v):
        return sum(anyflash.attention(q[i], k[i], v).square().sum() for i in range(3))

    leaves = [x.clone().requires_grad_() for x in (q, k, v[0])]
    plain(*leaves).backward()
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if q.dtype is torch.bfloat16 else {}
    for a, b in zip(ours, leaves):
        torch.testing.assert_close(a, b.grad, **tolerance)


def test_batched_gradients(binding):
    """is_grads_batched: vmap over a backward whose forward was a plain call."""
    q, k, v = qkv()
    o = anyflash.attention(q, k, v)
    generator = torch.Generator().manual_seed(4)
    cotangents = torch.randn((3, *o.shape), generator=generator).to(o)
    ours = torch.autograd.grad(o, (q, k, v), cotangents, retain_graph=True, is_grads_batched=True)
    for i in range(3):
        one = torch.autograd.grad(o, (q, k, v), cotangents[i], retain_graph=True)
        for a, b in zip(ours, one):
            assert torch.equal(a[i], b)


def test_what_has_no_formula(binding):
    q, k, v = detached()

    def loss(q):
        return anyflash.attention(q, k, v).square().sum()

    with pytest.raises(NotImplementedError, match="asked: second derivatives of attention"):
        grad(lambda q: grad(loss)(q).square().sum())(q)
    with pytest.raises((NotImplementedError, RuntimeError), match="jvp|forward"):
        jvp(loss, (q,), (q,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises((NotImplementedError, RuntimeError), match="jvp|forward AD"):
            anyflash.attention(dual, k, v)
    with pytest.raises(NotImplementedError, match="asked: out= inside a transformation of torch"):
        vmap(lambda q: anyflash.attention(q, k, v, out=torch.empty_like(q)))(torch.stack([q, q]))


# Modes and subclasses


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_operators(binding):
    q, k, v = qkv()
    expected = anyflash.attention(q, k, v)
    with Recorder() as recorder:
        o = anyflash.attention(q, k, v)
        torch.autograd.grad(o.sum(), (q, k, v))
    ours = [name for name in recorder.names if name.startswith("anyflash")]
    assert ours == ["anyflash.attention.default", "anyflash.attention_backward.default"]
    assert torch.equal(o, expected)
    with Recorder() as recorder:
        expected.sum().backward()
    assert "anyflash.attention_backward.default" in recorder.names


def test_a_function_mode_sees_the_operator(binding):
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Mode():
        anyflash.attention(*qkv())
    assert torch.ops.anyflash.attention.default in seen


def test_a_subclass_keeps_its_type(binding):
    class Tagged(torch.Tensor):
        pass

    q, k, v = detached()
    o = anyflash.attention(q.as_subclass(Tagged), k, v)
    assert type(o) is Tagged
    assert torch.equal(o.as_subclass(torch.Tensor), anyflash.attention(q, k, v))


def test_fake_and_meta_tensors(binding):
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = detached(dv=8)
    o, lse = anyflash.attention(*real, return_lse=True)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in real]
        results = anyflash.attention(*fake, return_lse=True)
    meta = anyflash.attention(*(x.to("meta") for x in real), return_lse=True)
    for a, b, expected in zip(results, meta, (o, lse)):
        for x in (a, b):
            assert (x.shape, x.dtype, x.stride()) == (
                expected.shape,
                expected.dtype,
                expected.stride(),
            )
        assert a.device == expected.device
        assert b.device.type == "meta"


def test_make_fx_and_jit_trace(binding):
    from torch.fx.experimental.proxy_tensor import make_fx

    q, k, v = detached()
    graph = make_fx(lambda q, k, v: anyflash.attention(q, k, v))(q, k, v)
    assert any("anyflash" in str(node.target) for node in graph.graph.nodes)
    assert torch.equal(graph(q, k, v), anyflash.attention(q, k, v))
    traced = torch.jit.trace(lambda q, k, v: anyflash.attention(q, k, v), (q, k, v))
    q, k, v = detached(seed=1)
    assert torch.equal(traced(q, k, v), anyflash.attention(q, k, v))
