"""torch's scaled_dot_product_attention on anyflash: what runs there, what not, and the way back."""

from __future__ import annotations

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
F = torch.nn.functional

if not hasattr(torch.library, "get_kernel"):
    pytest.skip("this torch has no torch.library.get_kernel", allow_module_level=True)

from anyflash import _sdpa, api
from anyflash.torch import disable_sdpa, enable_sdpa, explain_sdpa, sdpa, sdpa_enabled
from torch_device import DEVICE, DTYPE, EPS, ON_GPU, needs_gpu
from torch_formula import assert_close

# Of results that share inputs and are of DTYPE: a few of its roundings.
TOLERANCE = 4 * EPS if ON_GPU else 2e-6


@pytest.fixture
def calls(monkeypatch):
    """What anyflash is asked for during the test: "forward" and "backward"."""
    made = []

    def counted(name, function):
        def call(*arguments, **options):
            made.append(name)
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(api, "attention", counted("forward", api.attention))
    monkeypatch.setattr(api, "attention_backward", counted("backward", api.attention_backward))
    yield made
    disable_sdpa()


def inputs(N, M, H=4, Hk=4, d=16, dtype=DTYPE):
    random = torch.Generator().manual_seed(N + M)
    shapes = ((2, H, N, d), (2, Hk, M, d), (2, Hk, M, d))
    tensors = [torch.randn(shape, generator=random).to(DEVICE, dtype) for shape in shapes]
    return [tensor.requires_grad_() for tensor in tensors]


def results(q, k, v, **options):
    """O and the gradients of a loss that weighs each number of O differently."""
    o = F.scaled_dot_product_attention(q, k, v, **options)
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(DTYPE).to(o)
    return [o.detach(), *torch.autograd.grad(o, (q, k, v), weights)]


def exact(q, k, v, **options):
    """The same in float64 by torch's plain formula."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return results(*(x.detach().double().requires_grad_() for x in (q, k, v)), **options)


CASES = {
    "square": ((33, 33), {}),
    "causal": ((33, 33), {"is_causal": True}),
    "more keys": ((5, 40), {}),
    "more keys, causal from the top left": ((5, 40), {"is_causal": True}),
    "more queries, causal from the top left": ((40, 5), {"is_causal": True}),
    "one query, causal": ((1, 9), {"is_causal": True}),
    "scale": ((17, 19), {"scale": 0.7}),
    "GQA": ((17, 19, 6, 2), {"enable_gqa": True}),
    "GQA, causal": ((19, 17, 6, 2), {"enable_gqa": True, "is_causal": True}),
    "MQA": ((8, 8, 4, 1), {"enable_gqa": True}),
    "widest head": ((9, 9, 1, 1, 256), {}),
}


# On GPUs torch brings no causal problem of different lengths to its flash kernel.
ALWAYS_OURS = ("square", "causal", "more keys", "scale", "widest head")


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(name, calls):
    shape, options = CASES[name]
    q, k, v = inputs(*shape)
    with sdpa():
        said = explain_sdpa(q, k, v, **options)
        ours = results(q, k, v, **options)
    assert said.startswith("anyflash") or (ON_GPU and name not in ALWAYS_OURS), said
    assert calls == (["forward", "backward"] if said.startswith("anyflash") else [])
    assert_close(ours, exact(q, k, v, **options), TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, calls):
    q, k, v = inputs(33, 33, dtype=dtype)
    with sdpa():
        ours = results(q, k, v, is_causal=True)
    assert calls == ["forward", "backward"] and ours[0].dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps
    assert_close(ours, exact(q, k, v, is_causal=True), tolerance)


def test_strided_inputs_and_an_expanded_gradient(calls):
    random = torch.Generator().manual_seed(2)
    qkv = torch.randn(2, 9, 3, 4, 16, generator=random).to(DEVICE, DTYPE).requires_grad_()
    q, k, v = qkv.transpose(1, 3).unbind(2)
    with sdpa():
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        (ours,) = torch.autograd.grad(o.sum(), qkv)
    assert calls == ["forward", "backward"]
    (theirs,) = torch.autograd.grad(
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum(), qkv
    )
    assert_close([ours], [theirs], TOLERANCE)


# What goes to torch's kernels, unchanged to the bit

FALLS_THROUGH = {
    "attn_mask": ({}, {"attn_mask": torch.ones(8, 8, device=DEVICE).tril().bool()}),
    "dropout_p": ({}, {"dropout_p": 0.5}),
    "float64": ({"dtype": torch.float64}, {}),
    "head dim is 300": ({"d": 300}, {}),
}


@pytest.mark.parametrize("says", FALLS_THROUGH)
def test_what_falls_through(says, calls):
    shape, options = FALLS_THROUGH[says]
    q, k, v = inputs(8, 8, **shape)

    def seeded():
        torch.manual_seed(0)
        return results(q, k, v, **options)

    expected = seeded()
    with sdpa():
        found = seeded()
        said = explain_sdpa(q, k, v, **options)
    assert not calls and all(torch.equal(x, y) for x, y in zip(found, expected))
    assert said.startswith("torch (") and says in said


@pytest.mark.parametrize(
    "shapes, options, says",
    [
        ([(4, 8, 16)] * 3, {}, "[batch, heads, seqlen, d]"),
        ([(1, 4, 8, 16), (1, 4, 8, 16), (1, 4, 8, 8)], {}, "different head dims"),
        ([(1, 4, 8, 16), (1, 2, 8, 16), (1, 2, 8, 16)], {}, "enable_gqa"),
        ([(1, 4, 8, 16), (1, 4, 0, 16), (1, 4, 0, 16)], {}, "empty"),
    ],
)
def test_explain_what_torch_does_not_bring_to_a_flash_kernel(shapes, options, says, calls):
    with sdpa():
        tensors = (torch.zeros(shape, device=DEVICE, dtype=DTYPE) for shape in shapes)
        said = explain_sdpa(*tensors, **options)
    assert said.startswith("torch (" if ON_GPU else "torch (MATH)") and says in said


def test_explain(calls):
    q = torch.zeros(1, 4, 8, 16, device=DEVICE, dtype=DTYPE)
    assert "enable_sdpa()" in explain_sdpa(q, q, q)
    with sdpa():
        said = explain_sdpa(q, q, q, is_causal=True)
    assert said.startswith("anyflash") and "seqlen_q 8" in said and "causal" in said
    assert not calls


def test_a_plan_that_is_refused_falls_through(calls, monkeypatch):
    def refuse(*arguments, **options):
        raise NotImplementedError("asked / available / missing")

    q, k, v = inputs(8, 8)
    expected = results(q, k, v)
    monkeypatch.setattr(api, "attention_backward", refuse)
    with sdpa():  # forward ours, backward torch's
        assert_close(results(q, k, v), expected, TOLERANCE)
    monkeypatch.setattr(api, "attention", refuse)
    with sdpa():
        assert all(torch.equal(x, y) for x, y in zip(results(q, k, v), expected))


# On and off


def test_import_enables_nothing():
    code = (
        "import torch, anyflash.torch as ours; assert not ours.sdpa_enabled();"
        "assert torch.nn.attention.current_flash_attention_impl() is None;"
        "assert 'anyflash' in torch.nn.attention.list_flash_attention_impls()"
    )
    if not _sdpa._HAS_REGISTRY:
        pytest.skip("this torch has no registry of flash kernels")
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("registry", [True, False])
def test_on_and_off(registry, calls, monkeypatch):
    if registry and not _sdpa._HAS_REGISTRY:
        pytest.skip("this torch has no registry of flash kernels")
    monkeypatch.setattr(_sdpa, "_HAS_REGISTRY", registry)
    q, k, v = inputs(4, 4)

    def ours():
        calls.clear()
        F.scaled_dot_product_attention(q, k, v)
        return calls == ["forward"]

    assert not ours()
    disable_sdpa()  # not enabled: nothing happens
    enable_sdpa()
    enable_sdpa()
    assert ours() and sdpa_enabled()
    with sdpa():
        assert ours()
    assert ours()
    disable_sdpa()
    assert not ours() and not sdpa_enabled()
    with pytest.raises(KeyError), sdpa():
        with sdpa():
            assert ours()
        assert ours()
        raise KeyError
    assert not ours()


def test_another_implementation_comes_back(calls):
    if not _sdpa._HAS_REGISTRY:
        pytest.skip("this torch has no registry of flash kernels")
    attention = torch.nn.attention

    class Handle:
        def remove(self):
            pass

    attention.register_flash_attention_impl("another", register_fn=Handle)
    attention.activate_flash_attention_impl("another")
    try:
        with sdpa():
            assert sdpa_enabled()
        assert attention.current_flash_attention_impl() == "another"
        attention.activate_flash_attention_impl("anyflash")  # by torch's own function
        assert sdpa_enabled()
    finally:
        attention.restore_flash_attention_impl()
    assert not sdpa_enabled()


def test_a_torch_that_cannot(monkeypatch):
    monkeypatch.delattr(torch.library, "get_kernel")
    with pytest.raises(NotImplementedError, match="get_kernel"):
        enable_sdpa()
    assert not sdpa_enabled()


# What stands above the kernels


def test_modules(calls):
    """MultiheadAttention and the layers made of it, in training."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True, dropout=0.0)
    layer.to(DEVICE, DTYPE)
    x = torch.randn(2, 6, 32).to(DEVICE, DTYPE)

    def gradients():
        layer.zero_grad()
        layer(x).square().sum().backward()
        return [parameter.grad.clone() for parameter in layer.parameters()]

    expected = gradients()
    with sdpa():
        found = gradients()
    assert calls == ["forward", "backward"]
    assert_close(found, expected, 2 * TOLERANCE)


def test_compiled_code_follows_without_compiling_again(calls):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: F.scaled_dot_product_attention(q * 2, k, v, is_causal=True).sin(),
        fullgraph=True,
        backend="aot_eager",
    )
    q, k, v = inputs(9, 9)

    def gradient():
        calls.clear()
        return torch.autograd.grad(compiled(q, k, v).sum(), q)[0]

    expected = gradient()
    assert not calls
    with sdpa():
        assert_close([gradient()], [expected], TOLERANCE)
        assert calls == ["forward", "backward"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(gradient(), expected) and not calls


def test_vmap_of_grad(calls):
    def gradient(q):
        return torch.func.grad(lambda q: F.scaled_dot_product_attention(q, q, q).square().sum())(q)

    x = torch.randn(3, 2, 4, 5, 16, generator=torch.Generator().manual_seed(3)).to(DEVICE, DTYPE)
    expected = torch.func.vmap(gradient)(x)
    with sdpa():
        found = torch.func.vmap(gradient)(x)
    assert "forward" in calls and "backward" in calls
    assert_close([found], [expected], 2 * TOLERANCE)


def test_autocast(calls):
    q, k, v = inputs(8, 8, dtype=torch.float32)
    with sdpa(), torch.autocast(DEVICE, torch.bfloat16):
        assert F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
    assert calls == ["forward"]


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant, calls):
    q, k, v = inputs(8, 8)
    expected = exact(q, k, v)[1]
    with sdpa():
        o = torch.utils.checkpoint.checkpoint(
            F.scaled_dot_product_attention, q, k, v, use_reentrant=reentrant
        )
        weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o)
        o.backward(weights)
    assert calls == ["forward", "forward", "backward"]
    assert_close([q.grad], [expected], TOLERANCE)


# Layouts: compiled code relies on those that torch's kernels give


def transposed(tensors):
    """The same numbers as [batch, seqlen, heads, d] in memory."""
    return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]


def of_flash_for_cpu(q, k, v):
    """O, L and the gradients, through torch's operators."""
    aten = torch.ops.aten
    o, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=0.3)
    return (
        o,
        lse,
        *aten._scaled_dot_product_flash_attention_for_cpu_backward(
            torch.ones_like(o), q, k, v, o, lse, 0.0, True, scale=0.3
        ),
    )


def of_flash(q, k, v):
    aten = torch.ops.aten
    made = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, scale=0.3)
    o, lse, cu_q, cu_k, max_q, max_k, seed, offset, mask = made
    assert (max_q, max_k) == (q.shape[2], k.shape[2]) and mask.numel() == 0
    return (
        o,
        lse,
        *aten._scaled_dot_product_flash_attention_backward(
            *(torch.ones_like(o), q, k, v, o, lse, cu_q, cu_k, max_q, max_k, 0.0, True),
            *(seed, offset),
            scale=0.3,
        ),
    )


def of_cudnn(q, k, v):
    aten = torch.ops.aten
    made = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, scale=0.3)
    o, lse, cu_q, cu_k, max_q, max_k, seed, offset, _ = made
    assert (max_q, max_k) == (q.shape[2], k.shape[2]) and lse.shape[3:] == (1,)
    return (
        o,
        lse,
        *aten._scaled_dot_product_cudnn_attention_backward(
            *(torch.ones_like(o), q, k, v, o, lse, seed, offset, None, cu_q, cu_k),
            *(max_q, max_k, 0.0, True),
            scale=0.3,
        ),
    )


def check_layouts(operators, shape, calls):
    plain = [x.detach() for x in inputs(*shape)]
    for tensors in (plain, transposed(plain)):
        expected = operators(*tensors)
        calls.clear()
        with sdpa():
            found = operators(*tensors)
        assert calls == ["forward", "backward"]
        for ours, theirs in zip(found, expected):
            assert (ours.stride(), ours.dtype) == (theirs.stride(), theirs.dtype)
        assert_close(found, expected, TOLERANCE)


@pytest.mark.skipif(ON_GPU, reason="the operator of CPUs; that of GPUs is tested there")
def test_layouts_are_those_of_torch(calls):
    check_layouts(of_flash_for_cpu, (5, 7), calls)


@needs_gpu
@pytest.mark.parametrize("operators", [of_flash, of_cudnn])
def test_layouts_are_those_of_torch_on_gpus(operators, calls):
    check_layouts(operators, (64, 64, 4, 4, 64), calls)


@pytest.mark.skipif(ON_GPU, reason="a stand-in on the CPU; GPUs run the operators themselves")
@pytest.mark.parametrize("operators", [of_flash, of_cudnn])
def test_the_operators_of_gpus(operators, calls):
    """Their arguments and results, with tensors of the CPU in place of a GPU's."""
    q, k, v = [x.detach() for x in inputs(5, 7, 4, 2)]
    library = torch.library.Library("aten", "IMPL")
    try:
        replaced = {of_flash: _sdpa._FLASH, of_cudnn: _sdpa._CUDNN}[operators]
        _sdpa._replace(library, replaced._replace(dispatch_key="CPU"), lambda *name: None)
        o, lse, *gradients = operators(q, k, v)
    finally:
        library._destroy()
    assert calls == ["forward", "backward"] and lse.shape[:3] == (2, 4, 5)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*leaves, is_causal=True, scale=0.3, enable_gqa=True)
    expected_gradients = torch.autograd.grad(expected.sum(), leaves)
    assert_close((o.detach(), *gradients), (expected.detach(), *expected_gradients), TOLERANCE)


@pytest.mark.skipif(ON_GPU, reason="a stand-in on the CPU")
def test_the_operators_of_gpus_hand_on_what_they_got(calls):
    """To torch's kernel, argument by argument, where ours does not take the call."""
    q, k, v = (x.detach() for x in inputs(5, 7))
    received = []

    class Original:
        def call_boxed(self, keys, *positional, **named):
            received.append((positional[3:], named))
            return (q, q, None, None, 0, 0, q, q, None)

    library = torch.library.Library("aten", "IMPL")
    try:
        for replaced in (_sdpa._FLASH, _sdpa._CUDNN):
            replaced = replaced._replace(dispatch_key="CPU")
            _sdpa._replace(library, replaced, lambda *name: Original())
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        flash(q, k, v, 0.5, True, scale=0.3)
        flash(q, k, v, return_debug_mask=True)
        torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, q, False)
    finally:
        library._destroy()
    assert not calls
    assert [len(positional) for positional, _ in received] == [2, 3, 2]
    assert received[0] == ((0.5, True), {"scale": 0.3})
    assert received[1][0][-1] is True
    assert received[2][0][0] is q


@needs_gpu
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "CUDNN_ATTENTION"])
def test_whichever_kernel_torch_chooses_on_a_gpu(backend, is_causal, calls):
    q, k, v = inputs(64, 64, d=64)
    chosen = getattr(torch.nn.attention.SDPBackend, backend)
    with sdpa(), torch.nn.attention.sdpa_kernel(chosen):
        said = explain_sdpa(q, k, v, is_causal=is_causal)
        ours = results(q, k, v, is_causal=is_causal)
    assert said.startswith("anyflash") and backend in said
    assert calls == ["forward", "backward"]
    assert_close(ours, exact(q, k, v, is_causal=is_causal), TOLERANCE)
