"""Gradients of torch tensors in eager mode, held against torch's autograd of the plain formula."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
anyflash = pytest.importorskip("anyflash", reason="anyflash is not installed")

from torch_device import DEVICE, DTYPE, EPS, ON_GPU, qkv
from torch_formula import Problem, assert_close, gradients, worst

SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])
DENSE = {
    "plain": {},
    "causal": {"causal": True},
    "causal, rows without a key": {"causal": True, "n": 9, "m": 6},
    "window": {"window": (2, 1)},
    "window to the left": {"window": (3, 0), "n": 20, "m": 20},
    "window off the keys": {"window": (None, 0), "causal": True, "n": 12, "m": 3},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": SLOPES},
    "alibi of each sequence": {"alibi_slopes": torch.stack([SLOPES, 2 * SLOPES]), "causal": True},
    "mqa": {"heads_k": 1, "causal": True},
    "one head each": {"heads_k": 4},
    "dv is not d": {"d": 24, "dv": 40},
    "long": {"n": 70, "m": 150, "d": 64, "causal": True},
    "all together": {
        "n": 33,
        "m": 65,
        "window": (20, 3),
        "softcap": 5.0,
        "alibi_slopes": SLOPES,
        "scale": 0.2,
    },
    "one row": {"n": 1, "m": 1, "d": 8},
    "no key": {"m": 0},
    "no query": {"n": 0},
    "no sequence": {"batch": 0},
}
SHAPE = ("batch", "n", "m", "heads", "heads_k", "d", "dv")


def dense(name, dtype=None):
    settings = dict(DENSE[name])
    shape = {key: settings.pop(key) for key in SHAPE if key in settings}
    if "alibi_slopes" in settings:
        settings["alibi_slopes"] = settings["alibi_slopes"].to(DEVICE)
    return Problem(*qkv(**shape, dtype=dtype), settings)


def packed(name):
    lengths = {
        "packed": ([0, 5, 5, 17], [0, 9, 12, 20]),
        "packed, used": ([0, 5, 9, 17], [0, 9, 12, 20]),
        "packed, tail": ([0, 5, 9, 14], [0, 9, 9, 16]),
    }[name]
    tensors = (x.detach()[0].requires_grad_() for x in qkv(batch=1, n=17, m=20))
    used = ([5, 2, 0], [0, 3, 7]) if name == "packed, used" else (None, None)
    return Problem(*tensors, {"causal": True, "softcap": 3.0}, lengths, used)


def check_gradients(problem, use_lse):
    ours = gradients(problem, problem.call(anyflash), use_lse)
    exact, peer = problem.to(torch.float64), problem.to(problem.q.dtype)
    expected = gradients(exact, exact.formula(), use_lse)
    plain = gradients(peer, peer.formula(), use_lse)
    assert worst(ours, expected, plain) is None
    assert all(a.dtype is b.dtype for a, b in zip(ours, problem.tensors()))


@pytest.mark.parametrize("use_lse", [False, True])
@pytest.mark.parametrize("name", DENSE)
def test_dense(binding, name, use_lse):
    check_gradients(dense(name), use_lse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["causal", "all together"])
def test_half_precision(binding, name, dtype):
    check_gradients(dense(name, dtype), True)


@pytest.mark.parametrize("use_lse", [False, True])
@pytest.mark.parametrize("name", ["packed", "packed, used"])
def test_packed(binding, name, use_lse):
    check_gradients(packed(name), use_lse)


def test_rows_past_the_last_sequence_take_no_part(binding):
    problem = packed("packed, tail")
    o, lse = problem.call(anyflash)
    q, k, v = torch.autograd.grad(o[:14].sum() + lse[:, :14].sum(), problem.tensors())
    with torch.no_grad():
        problem.q[14:], problem.k[16:], problem.v[16:] = 7, float("nan"), float("nan")
    o, lse = problem.call(anyflash)
    again = torch.autograd.grad(o[:14].sum() + lse[:, :14].sum(), problem.tensors())
    assert torch.equal(again[0][:14], q[:14])
    assert torch.equal(again[1][:16], k[:16])
    assert torch.equal(again[2][:16], v[:16])


def test_results_are_those_without_gradients(binding):
    q, k, v = qkv()
    o, lse = anyflash.attention(q, k, v, return_lse=True)
    with torch.no_grad():
        plain, plain_lse = anyflash.attention(q, k, v, return_lse=True)
    assert torch.equal(o, plain)
    assert torch.equal(lse, plain_lse)
    assert o.grad_fn is not None
    assert not o.is_leaf
    assert plain.grad_fn is None
    assert torch.equal(anyflash.attention(q, k, v), plain)


def test_only_the_log_sum_exp(binding):
    problem = dense("causal")
    _, lse = problem.call(anyflash)
    ours = torch.autograd.grad(lse.sum(), problem.tensors())
    exact = problem.to(torch.float64)
    expected = torch.autograd.grad(exact.formula()[1].sum(), (exact.q, exact.k))
    peer = problem.to(DTYPE)
    plain = torch.autograd.grad(peer.formula()[1].sum(), (peer.q, peer.k))
    assert worst(ours[:2], expected, plain) is None
    assert not ours[2].any()


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "qv", "kv"])
def test_a_subset_of_the_inputs(binding, wanted):
    full = qkv()
    everything = torch.autograd.grad(anyflash.attention(*full).square().sum(), full)
    tensors = [x.detach().requires_grad_(name in wanted) for name, x in zip("qkv", full)]
    anyflash.attention(*tensors).square().sum().backward()
    for name, tensor, gradient in zip("qkv", tensors, everything):
        if name in wanted:
            assert torch.equal(tensor.grad, gradient)
        else:
            assert tensor.grad is None


def test_no_gradient_where_none_is_wanted(binding):
    q, k, v = qkv()
    with torch.no_grad():
        assert anyflash.attention(q, k, v).grad_fn is None
    with torch.inference_mode():
        o = anyflash.attention(q, k, v)
        assert o.is_inference()
    assert anyflash.attention(*(x.detach() for x in (q, k, v))).grad_fn is None
    assert torch.equal(o.clone(), anyflash.attention(q, k, v))


def test_inference_tensors_cannot_be_saved(binding):
    with torch.inference_mode():
        q = qkv(requires_grad=False)[0]
    _, k, v = qkv()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        anyflash.attention(q, k, v)


def broadcast(x):
    return x[..., :1].expand(x.shape)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda g: g.transpose(1, 2).contiguous().transpose(1, 2), id="transposed"),
        pytest.param(lambda g: g[:1, :1].expand(g.shape), id="rows expanded"),
        pytest.param(broadcast, id="last dimension expanded"),
        pytest.param(lambda g: g.mT.contiguous().mT, id="last dimension strided"),
        pytest.param(lambda g: torch.ones((), device=g.device).expand(g.shape), id="scalar"),
        pytest.param(lambda g: torch.cat([g, g], -1)[..., 1::2], id="every second element"),
    ],
)
def test_any_strides_of_the_incoming_gradient(binding, change):
    q, k, v = qkv()
    o, lse = anyflash.attention(q, k, v, return_lse=True)
    dout = change(torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o))
    dlse = (
        torch.randn(lse.shape[::-1], generator=torch.Generator().manual_seed(2))
        .to(lse)
        .permute(2, 1, 0)
    )
    dout = dout.to(o.dtype)
    ours = torch.autograd.grad((o, lse), (q, k, v), (dout, dlse), retain_graph=True)
    expected = torch.autograd.grad((o, lse), (q, k, v), (dout.contiguous(), dlse.contiguous()))
    if ON_GPU and 0 in dout.stride() and dout.stride(-1) == 1:
        # Hopper's copy engine takes no strides of 0: not the kernels of the contiguous one.
        return assert_close(ours, expected, 4 * EPS)
    for a, b in zip(ours, expected):
        assert torch.equal(a, b)


def test_strided_inputs(binding):
    q, k, v = qkv()
    expected = torch.autograd.grad(anyflash.attention(q, k, v).sum(), (q, k, v))
    views = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]
    o = anyflash.attention(*(x.transpose(1, 2) for x in views))
    for a, b in zip(torch.autograd.grad(o.sum(), views), expected):
        assert torch.equal(a.transpose(1, 2), b)


def test_one_packed_projection(binding):
    """q, k, v as views of one tensor, as models make them."""
    x = torch.randn(2, 6, 3, 4, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE, DTYPE)
    x.requires_grad_()
    anyflash.attention(*x.unbind(2), causal=True).sum().backward()
    parts = [part.detach().clone().requires_grad_() for part in x.unbind(2)]
    anyflash.attention(*parts, causal=True).sum().backward()
    assert torch.equal(x.grad, torch.stack([part.grad for part in parts], 2))


# Refusals


def test_out_and_gradients(binding):
    q, k, v = qkv()
    out = torch.empty_like(q, requires_grad=False)
    with pytest.raises(ValueError, match=r"^out is given and a gradient is wanted; .* leave out"):
        anyflash.attention(q, k, v, out=out)
    with torch.no_grad():
        assert anyflash.attention(q, k, v, out=out) is out
    plain = [x.detach() for x in (q, k, v)]
    with pytest.raises(NotImplementedError, match=r"out\.requires_grad is True"):
        anyflash.attention(*plain, out=out.requires_grad_())


def test_slopes_have_no_gradient(binding):
    slopes = SLOPES.to(DEVICE).requires_grad_()
    for tensors in (qkv(), qkv(requires_grad=False)):
        with pytest.raises(NotImplementedError, match=r"alibi_slopes\.requires_grad is True"):
            anyflash.attention(*tensors, alibi_slopes=slopes)
    with torch.no_grad():
        anyflash.attention(*qkv(), alibi_slopes=slopes)


def test_second_derivatives(binding):
    q, k, v = qkv()
    o = anyflash.attention(q, k, v)
    (dq,) = torch.autograd.grad(o.sum(), q, create_graph=True)
    assert torch.equal(dq, torch.autograd.grad(anyflash.attention(q, k, v).sum(), q)[0])
    with pytest.raises(NotImplementedError, match="asked: second derivatives of attention"):
        torch.autograd.grad(dq.square().sum(), q)


def test_gradients_through_the_backward_function(binding):
    q, k, v = qkv()
    with torch.no_grad():
        o, lse = anyflash.attention(q, k, v, return_lse=True)
    with pytest.raises(NotImplementedError, match=r"q\.requires_grad is True"):
        anyflash.attention_backward(o, q, k, v, o, lse)


def test_changed_in_place(binding):
    q, k, v = qkv()
    scaled = q * 1
    o = anyflash.attention(scaled, k, v)
    scaled.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()
    o = anyflash.attention(q, k, v)
    changed = o.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changed.sum().backward()


def test_second_backward_needs_retain_graph(binding):
    q, k, v = qkv()
    o = anyflash.attention(q, k, v)
    o.sum().backward(retain_graph=True)
    o.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        o.sum().backward()


# What else torch's autograd offers


def test_deterministic_is_read_at_the_forward(binding, monkeypatch):
    from anyflash import _backend, _call

    seen = []

    def recorded(*arguments):
        seen.append(_call.BackwardArguments.of(*arguments).options.deterministic)
        return _call.backward(*arguments)

    monkeypatch.setattr(_backend, "backward", recorded)
    q, k, v = qkv()
    torch.use_deterministic_algorithms(True)
    try:
        outputs = [anyflash.attention(q, k, v), anyflash.attention(q, k, v, deterministic=False)]
    finally:
        torch.use_deterministic_algorithms(False)
    outputs += [anyflash.attention(q, k, v), anyflash.attention(q, k, v, deterministic=True)]
    for o in outputs:
        o.sum().backward()
    assert seen == [True, False, False, True]


def test_saved_tensor_hooks(binding):
    packed_shapes = []

    def pack(x):
        packed_shapes.append(tuple(x.shape))
        return x.cpu().numpy() if x.dtype is torch.float32 else x.cpu()

    def unpack(x):
        return torch.as_tensor(x).to(DEVICE)

    q, k, v = qkv()
    expected = torch.autograd.grad(anyflash.attention(q, k, v).sum(), (q, k, v))
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        o = anyflash.attention(q, k, v)
    assert packed_shapes == [(2, 5, 4, 16), (2, 7, 2, 16), (2, 7, 2, 16), (2, 5, 4, 16), (2, 4, 5)]
    for a, b in zip(torch.autograd.grad(o.sum(), (q, k, v)), expected):
        assert torch.equal(a, b)


def test_tensor_hooks_and_retain_grad(binding):
    q, k, v = qkv()
    o = anyflash.attention(q, k, v)
    o.retain_grad()
    seen = []
    q.register_hook(lambda gradient: seen.append(gradient) or 2 * gradient)
    o.sum().backward()
    assert torch.equal(o.grad, torch.ones_like(o))
    assert torch.equal(q.grad, 2 * seen[0])


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected in Attention")
def test_anomaly_mode(binding):
    q, k, v = qkv()
    with torch.autograd.detect_anomaly(check_nan=True):
        anyflash.attention(q, k, v, causal=True).sum().backward()
    assert q.grad.isfinite().all()
    with torch.no_grad():
        q[0, 0] = float("nan")
    with torch.autograd.detect_anomaly(check_nan=True):
        o = anyflash.attention(q, k, v)
        with pytest.raises(RuntimeError, match=r"'AttentionBackward' returned nan values"):
            o.sum().backward()


class Block(torch.nn.Module):
    """A module that keeps the function itself, as models do."""

    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(16, 3 * 16, bias=False)
        self.attend = anyflash.attention

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).unbind(-3)
        return self.attend(q, k, v, causal=True).flatten(-2)


def test_modules_copy_and_pickle(binding):
    torch.manual_seed(0)
    block = Block().to(DEVICE, DTYPE)
    x = torch.randn(2, 5, 16, device=DEVICE, dtype=DTYPE)
    block(x).sum().backward()
    expected = block.project.weight.grad
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        other.zero_grad()
        other(x).sum().backward()
        assert other.attend is anyflash.attention
        assert torch.equal(other.project.weight.grad, expected)


def test_parameters_as_inputs(binding):
    q, k, v = (torch.nn.Parameter(x.detach()) for x in qkv())
    anyflash.attention(q, k, v).sum().backward()
    plain = qkv()
    expected = torch.autograd.grad(anyflash.attention(*plain).sum(), plain)
    for a, b in zip((q, k, v), expected):
        assert torch.equal(a.grad, b)


def test_nothing_is_kept(binding):
    """The graph dies with the output: no cycles, which would wait for the collector."""
    q, k, v = qkv()
    gc.collect()
    gc.disable()
    try:
        o, lse = anyflash.attention(q, k, v, return_lse=True)
        dead = [weakref.ref(o), weakref.ref(lse), weakref.ref(o.grad_fn)]
        (o.sum() + lse.sum()).backward()
        del o, lse
        assert [ref() for ref in dead] == [None] * 3
    finally:
        gc.enable()


def test_no_leak(binding):
    """Many calls leave no objects and no tensors behind."""
    q, k, v = qkv()

    def step():
        o, lse = anyflash.attention(q, k, v, return_lse=True)
        torch.autograd.grad(o.sum() + lse.sum(), (q, k, v))
        del o, lse
        gc.collect()
        return len(gc.get_objects()), torch.cuda.memory_allocated() if ON_GPU else 0

    for _ in range(3):
        before = step()
    gc.collect()
    for _ in range(200):
        torch.autograd.grad(anyflash.attention(q, k, v).sum(), (q, k, v))
    after = step()
    assert after[0] - before[0] < 50
    assert after[1] == before[1]


def test_importing_anyflash_does_not_import_torch():
    import subprocess
    import sys

    code = "import sys, anyflash; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_module_for_torch():
    import anyflash.torch

    assert anyflash.torch.attention is anyflash.attention
    assert anyflash.torch.attention_varlen is anyflash.attention_varlen
