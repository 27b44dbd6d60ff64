"""What training programs put around attention: autocast, checkpointing, DDP, graphs, streams."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
import tempfile

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
anyflash = pytest.importorskip("anyflash", reason="anyflash is not installed")

from torch.utils.checkpoint import checkpoint
from torch_device import DEVICE, DTYPE, ON_GPU, needs_gpu, qkv
from torch_formula import attention as formula
from torch_formula import int32, loss_of, worst

# Autocast


@pytest.mark.parametrize("inputs", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(binding, dtype, inputs):
    tensors = qkv(dtype=inputs)
    with torch.autocast(DEVICE, dtype):
        o, lse = anyflash.attention(*tensors, causal=True, return_lse=True)
    assert o.dtype is dtype
    assert lse.dtype is torch.float32
    gradients = torch.autograd.grad(loss_of(o, lse), tensors)
    cast = [x.detach().to(dtype).requires_grad_() for x in tensors]
    expected = anyflash.attention(*cast, causal=True, return_lse=True)
    assert torch.equal(o, expected[0])
    assert torch.equal(lse, expected[1])
    for a, b in zip(gradients, torch.autograd.grad(loss_of(*expected), cast)):
        assert a.dtype is inputs
        assert torch.equal(a, b.to(inputs))


def test_autocast_casts_only_what_attention_multiplies(binding):
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=DEVICE)
    tensors = qkv(requires_grad=False, dtype=torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        o = anyflash.attention(*tensors, alibi_slopes=slopes)
    cast = [x.bfloat16() for x in tensors]
    assert torch.equal(o, anyflash.attention(*cast, alibi_slopes=slopes))


def test_autocast_of_the_other_device_changes_nothing(binding):
    q, k, v = qkv(requires_grad=False)
    with torch.autocast("cpu" if ON_GPU else "cuda", torch.float16, enabled=ON_GPU):
        o = anyflash.attention(q, k, v)
    with torch.autocast(DEVICE, torch.bfloat16), torch.autocast(DEVICE, enabled=False):
        again = anyflash.attention(q, k, v)
    assert o.dtype is again.dtype is DTYPE
    assert torch.equal(o, again)


# Checkpointing


class Block(torch.nn.Module):
    def __init__(self, attention=anyflash.attention):
        super().__init__()
        self.project = torch.nn.Linear(32, 3 * 32)
        self.out = torch.nn.Linear(32, 32)
        self.attention = attention

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 2, 16)).unbind(-3)
        return x + self.out(self.attention(q, k, v, causal=True).flatten(-2))


def block_and_input():
    torch.manual_seed(0)
    block = Block().to(DEVICE, DTYPE)
    return block, torch.randn(2, 9, 32, device=DEVICE, dtype=DTYPE, requires_grad=True)


def gradients(block, x, run):
    block.zero_grad()
    x.grad = None
    y = run(block, x)
    loss_of(y, None).backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in block.parameters())]


def plain(block, x):
    return block(x)


def violation_of(ours, block, x):
    """What the rule says of y and all gradients of this block."""
    standard = copy.deepcopy(block)
    standard.attention = formula
    exact = gradients(copy.deepcopy(standard).double(), x.detach().double().requires_grad_(), plain)
    return worst(ours, exact, gradients(standard, x.detach().requires_grad_(), plain))


def test_a_block(binding):
    block, x = block_and_input()
    assert violation_of(gradients(block, x, plain), block, x) is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(binding, use_reentrant):
    block, x = block_and_input()
    expected = gradients(block, x, plain)
    run = functools.partial(checkpoint, use_reentrant=use_reentrant)
    for a, b in zip(gradients(block, x, run), expected):
        assert torch.equal(a, b)


def test_selective_checkpoint(binding):
    """The policy sees the operator: what it says must be saved is not computed again."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    counts = {"attention": 0, "linear": 0}

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            counts["attention"] += str(function) == "anyflash.attention.default"
            counts["linear"] += "addmm" in str(function) or "linear" in str(function)
            return function(*args, **(kwargs or {}))

    def policy(context, function, *args, **kwargs):
        save = str(function) == "anyflash.attention.default"
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    block, x = block_and_input()
    expected = gradients(block, x, plain)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    run = functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)
    with Counter():
        ours = gradients(block, x, run)
    for a, b in zip(ours, expected):
        assert torch.equal(a, b)
    assert counts["attention"] == 1
    assert counts["linear"] > 2  # two layers forward, at least one of them again


# Data parallel

# On a GPU both processes share it. What is reduced is float32 there, too: attention is autocast.
TRAIN = """
import os, sys
import torch, torch.distributed as dist
sys.path[:0] = {path!r}
from test_torch_training import Block
from torch_device import DEVICE, ON_GPU
rank = int(sys.argv[1])
torch.set_num_threads(1)
store = dist.FileStore({store!r}, 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
torch.manual_seed(0)
module = torch.nn.parallel.DistributedDataParallel(Block().to(DEVICE))
inputs = torch.randn(4, 9, 32).to(DEVICE)
single = Block().to(DEVICE)
single.load_state_dict(module.module.state_dict())
with torch.autocast(DEVICE, torch.bfloat16, enabled=ON_GPU):
    parts = module(inputs[2 * rank : 2 * rank + 2]), single(inputs)
parts[0].square().sum().backward()
parts[1].square().sum().div(2).backward()
for a, b in zip(module.parameters(), single.parameters()):
    error = (a.grad - b.grad).abs().max() / b.grad.abs().max()
    assert error < (2e-2 if ON_GPU else 1e-5), float(error)
dist.destroy_process_group()
os._exit(0)  # a thread of gloo may want the interpreter's lock while it ends, and aborts then
"""


def test_ddp_on_two_processes():
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    here = os.path.dirname(__file__)
    with tempfile.TemporaryDirectory() as folder:
        code = TRAIN.format(path=[here, os.path.dirname(here)], store=os.path.join(folder, "store"))
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(rank)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            for process in processes:
                output, _ = process.communicate(timeout=300)
                assert process.returncode == 0, output
        finally:
            for process in processes:
                process.kill()


# GPUs: CUDA graphs


def captured(step):
    """A graph of step, and its results, which every replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def assert_replay_computes(graph, results, step):
    """What the graph writes now is what the calls themselves give now."""
    for x in results:
        x.fill_(float("nan"))
    graph.replay()
    replayed = [x.clone() for x in results]
    for a, b in zip(replayed, step()):
        assert torch.equal(a, b)


@needs_gpu
def test_cuda_graph_of_forward_and_backward(binding):
    tensors = qkv(n=65, m=129, d=64)
    dout = torch.randn_like(tensors[0])

    def step():
        o, lse = anyflash.attention(*tensors, causal=True, return_lse=True)
        made = torch.autograd.grad((o, lse), tensors, (dout, torch.ones_like(lse)))
        return o.detach(), lse.detach(), *made

    graph, results = captured(step)
    for seed in (1, 2):
        with torch.no_grad():
            for x, y in zip(tensors, qkv(n=65, m=129, d=64, seed=seed)):
                x.copy_(y)
            dout.copy_(torch.randn(dout.shape, generator=torch.Generator().manual_seed(seed)))
        assert_replay_computes(graph, results, step)


@needs_gpu
def test_cuda_graph_of_packed_sequences(binding):
    """Replayed with other lengths under the same bound."""
    q, k, v = (x.detach()[0].requires_grad_() for x in qkv(batch=1, n=200, m=200, d=64))
    lengths = int32([0, 90, 200], q)
    dout = torch.randn_like(q)

    def step():
        o = anyflash.attention_varlen(q, k, v, lengths, lengths, 128, 128, causal=True)
        return o.detach(), *torch.autograd.grad(o, (q, k, v), dout)

    graph, results = captured(step)
    for first in (100, 128, 72):
        lengths.copy_(int32([0, first, 200], q))
        assert_replay_computes(graph, results, step)


@needs_gpu
def test_graphed_callables(binding):
    """torch's own way to train through graphs: one of the forward, one of the backward."""
    block, x = block_and_input()
    sample = torch.randn_like(x).requires_grad_()
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(block), (sample,))
    assert violation_of(gradients(graphed, x, plain), block, x) is None


CAPTURE_FIRST = """
import torch, anyflash
q, k, v, dout = (torch.randn(1, 65, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(4))
anyflash.warm_up(q, k, v, causal=True, backward=True)
def step():
    o, lse = anyflash.attention(q, k, v, causal=True, return_lse=True)
    return o, *anyflash.attention_backward(dout, q, k, v, o, lse, causal=True, deterministic=True)
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    results = step()
graph.replay()
for a, b in zip(results, step()):
    assert torch.equal(a, b)
"""


@needs_gpu
def test_a_first_call_is_captured_after_warm_up():
    subprocess.run([sys.executable, "-c", CAPTURE_FIRST], check=True, timeout=300)


@needs_gpu
def test_cuda_graphs_of_a_compiled_module():
    pytest.importorskip("triton", reason="inductor needs triton for a GPU")
    from torch._dynamo.utils import counters

    block, x = block_and_input()
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(block, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        ours = gradients(block, x, lambda block, x: compiled(x))
        ours = [y.clone() for y in ours]  # the next step writes there
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert violation_of(ours, block, x) is None


# GPUs: streams and devices


@needs_gpu
def test_the_current_stream_is_used(binding):
    """The inputs become right only after a long wait on a stream of our own: a kernel launched on
    any other stream would see what was there before."""
    stream = torch.cuda.Stream()
    right = qkv(n=256, m=256, d=64, requires_grad=False)
    expected = anyflash.attention(*right)
    q, k, v = (torch.zeros_like(x) for x in right)
    anyflash.attention(q, k, v)  # loads the kernel
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for x, y in zip((q, k, v), right):
            x.copy_(y)
        o = anyflash.attention(q, k, v)
    stream.synchronize()
    assert torch.equal(o, expected)


@needs_gpu
@pytest.mark.parametrize("asked_from", ["the stream of the forward", "another stream"])
def test_the_backward_uses_the_stream_of_the_forward(binding, asked_from):
    """Wherever it is asked for; the inputs become right as above."""
    stream = torch.cuda.Stream()
    right = qkv(n=256, m=256, d=64)
    dout = torch.randn_like(right[0])
    expected = torch.autograd.grad(anyflash.attention(*right, deterministic=True), right, dout)
    tensors = [torch.zeros_like(x).requires_grad_() for x in right]
    late = torch.zeros_like(dout)
    torch.autograd.grad(anyflash.attention(*tensors, deterministic=True), tensors, late)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            for x, y in zip(tensors, right):
                x.copy_(y)
            late.copy_(dout)
        o = anyflash.attention(*tensors, deterministic=True)
    same = asked_from == "the stream of the forward"
    with torch.cuda.stream(stream if same else torch.cuda.current_stream()):
        ours = torch.autograd.grad(o, tensors, late)
    torch.cuda.synchronize()
    for a, b in zip(ours, expected):
        assert torch.equal(a, b)


@needs_gpu
def test_the_second_of_two_gpus(binding):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    expected = qkv(n=33, m=65, d=64)
    o = anyflash.attention(*expected, deterministic=True)
    gradients = torch.autograd.grad(o.sum(), expected)
    tensors = [x.detach().to("cuda:1").requires_grad_() for x in expected]
    with torch.cuda.device(0):  # not the device of the tensors
        other = anyflash.attention(*tensors, deterministic=True)
        others = torch.autograd.grad(other.sum(), tensors)
    assert other.device == torch.device("cuda:1")
    for a, b in zip((o, *gradients), (other, *others)):
        assert torch.equal(a.cpu(), b.cpu())
