"""What only a real GPU shows: graphs, streams, several devices, and that nothing waits for the GPU."""

import time

import pytest
import torch
from conftest import LAYERS, case_of, moved

import sparseops
from sparseops.ops import REGISTRY, cuda, derived
from sparseops.testing import assert_close, expect

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

every_layer = pytest.mark.parametrize("op", LAYERS, ids=lambda op: op.name)


def inputs(op, case="gt_tile", device="cuda"):
    """Arguments that lie on the CPU and those that lie on a GPU; the kernels are loaded."""
    args, kwargs = case_of(op, case).make(torch.float16)
    op.fn(*(moved(arg, device) for arg in args), **kwargs)
    torch.cuda.synchronize()
    return args, [moved(arg, device) for arg in args], kwargs


def check(op, y, args, kwargs):
    assert_close(y.cpu(), expect(op, args, kwargs))


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "cold"])
@pytest.mark.parametrize("case", ["gt_tile", "deep", "tail"])
@every_layer
def test_graph(op, case, warm):
    args, (x, *rest), kwargs = inputs(op, case)
    meta = rest[1]
    if warm:
        op.fn(x, *rest, **kwargs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op.fn(x, *rest, **kwargs)
    assert (derived._entries.get(meta) is not None) == warm, "a capture keeps nothing"
    for factor in (1, -2):
        given = (args[0] * factor, *args[1:])
        x.copy_(given[0])
        graph.replay()
        check(op, y, given, kwargs)
        check(op, op.fn(x, *rest, **kwargs), given, kwargs)


@every_layer
def test_a_graph_sees_a_weight_that_was_changed_and_used(op):
    args, there, kwargs = inputs(op)
    op.fn(*there, **kwargs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op.fn(*there, **kwargs)
    other = [args[0], args[1].roll(1, 0), args[2].roll(1, 0), *args[3:]]
    there[1].copy_(other[1])
    there[2].copy_(other[2])
    check(op, op.fn(*there, **kwargs), other, kwargs)
    graph.replay()
    check(op, y, other, kwargs)


@every_layer
def test_side_stream(op):
    args, there, kwargs = inputs(op)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        there[0] = there[0] * 1
        y = op.fn(*there, **kwargs)
    torch.cuda.current_stream().wait_stream(stream)
    check(op, y, args, kwargs)


@every_layer
def test_a_weight_packed_on_another_stream_is_waited_for(op):
    args, there, kwargs = inputs(op)
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        torch.cuda._sleep(50_000_000)
        op.fn(*there, **kwargs)
    with torch.cuda.stream(second):
        y = op.fn(*there, **kwargs)
    torch.cuda.synchronize()
    check(op, y, args, kwargs)


@pytest.mark.parametrize("op", REGISTRY.values(), ids=lambda op: op.name)
def test_nothing_waits_for_the_gpu(op):
    _, there, kwargs = inputs(op)
    leaves = [
        arg.requires_grad_() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg
        for arg in there
    ]
    cotangent = None
    if op.differentiable:
        cotangent = torch.ones_like(op.fn(*leaves, **kwargs))
        op.fn(*leaves, **kwargs).backward(cotangent)
        leaves = [leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in leaves]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = op.fn(*leaves, **kwargs)
        if op.differentiable:
            y.backward(cotangent)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_layer
def test_another_device_than_the_current_one(op):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    args, there, kwargs = inputs(op, device="cuda:1")
    assert torch.cuda.current_device() == 0
    y = op.fn(*there, **kwargs)
    assert y.device == torch.device("cuda:1")
    check(op, y, args, kwargs)


@every_layer
def test_a_call_takes_little_of_the_processor(op):
    """Not a measurement: a call that does what only a first one should takes many times as long."""
    _, there, kwargs = inputs(op)
    with torch.inference_mode():
        for _ in range(10):
            op.fn(*there, **kwargs)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(50):
            op.fn(*there, **kwargs)
        seconds = (time.perf_counter() - start) / 50
        torch.cuda.synchronize()
    assert seconds < 1e-3


@every_layer
def test_autocast(op):
    args, kwargs = case_of(op).make(torch.float32)
    there = [moved(arg, "cuda") for arg in args]
    with torch.autocast("cuda", torch.float16):
        y = op.fn(*there, **kwargs)
    low = [arg.half() if arg.is_floating_point() else arg for arg in args]
    assert y.dtype is torch.float16
    check(op, y, low, kwargs)


def test_compiled_to_graphs():
    """Through torch's own CUDA graphs, which run the layer once before they capture it."""
    layer = sparseops.SparseLinear(256, 192).half().cuda().requires_grad_(False)
    compiled = torch.compile(layer, backend="cudagraphs")
    dense = layer.to_dense()
    for i in range(5):
        x = torch.randn(24, 256, device="cuda", dtype=torch.float16)
        if i == 3:
            other = sparseops.SparseLinear(256, 192).half()
            layer.load_state_dict(other.state_dict())
            dense = other.to_dense().cuda()
        torch.testing.assert_close(compiled(x), dense(x), rtol=2e-3, atol=2e-3)


def test_doctor_finds_every_kernel():
    found = {kernel.op: kernel for kernel in sparseops.doctor().kernels if kernel.device == "cuda"}
    assert found.keys() == REGISTRY.keys()
    off = {"nm24_linear_f8"} if cuda.no_sm90_reason(torch.device("cuda", 0)) else set()
    assert {op for op, kernel in found.items() if not kernel.on} == off, found
