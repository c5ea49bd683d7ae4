"""The CUDA kernels from Python: every case of every op, every tile and number of splits, who is called when.

On a GPU, or on the CPU under SPARSEOPS_EMULATE (``tests/test_emulated_ops.py`` runs this file so).
"""

import warnings

import pytest
import torch
from conftest import (
    CASES,
    CONV,
    DTYPES,
    F8,
    GPU,
    INT8,
    LINEAR,
    PRODUCTS,
    RUNS_SM90,
    SMOOTH_CASES,
    Dispatched,
    assert_gpu_result,
    byte_inputs,
    call_on_gpu,
    case_of,
    cut,
    every_half,
    host,
    layout,
    linear_inputs,
    moved,
)

from sparseops import SparseConv2d, SparseLinear, _native
from sparseops.formats import NM24
from sparseops.formats.nm24 import pack_columns
from sparseops.ops import REGISTRY, cuda, derived, registry
from sparseops.ops.common import make_bias, make_weight
from sparseops.testing import Expected, assert_close, expect, expect_grads, grads

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.usefixtures("whole_f32"),
    pytest.mark.skipif(GPU is None, reason="there is no GPU"),
]

FEW = [c for c in CASES if c.values[0] in PRODUCTS and c.values[1].name in ("tail", "vector", "gelu")]


@pytest.mark.filterwarnings("ignore:.*plain torch reference")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_forward(op, case, dtype):
    args, kwargs = case.make(dtype)
    y = call_on_gpu(op, args, kwargs)
    assert_gpu_result(op, y, args, kwargs)
    if not isinstance(y, tuple):
        assert layout(y) == layout(op.fn(*(moved(arg, "meta") for arg in args), **kwargs))


@pytest.mark.filterwarnings("ignore:.*plain torch reference")
@every_half
@pytest.mark.parametrize(("op", "case"), SMOOTH_CASES)
def test_gradients(op, case, dtype):
    args, kwargs = case.make(dtype)
    y = op.reference(*args, **kwargs)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = grads(op.fn, [moved(arg, GPU) for arg in args], kwargs, cotangent.to(GPU))
    for position, expected in expect_grads(op, args, kwargs, cotangent).items():
        assert_close(found[position].cpu(), expected)


@every_half
@pytest.mark.parametrize("splits", [1, 3, 6])
@pytest.mark.parametrize(
    ("tile", "tokens"), [("few8", 5), ("few8", 19), ("few16", 13), ("small", 70), ("large", 131)]
)
def test_every_tile_of_nm24_linear(tile, tokens, splits, dtype, monkeypatch):
    plans = cut(monkeypatch, tile, splits)
    args, kwargs = linear_inputs(137, tokens, dtype), {"activation": "gelu"}
    assert_gpu_result(LINEAR, call_on_gpu(LINEAR, args, kwargs), args, kwargs)
    assert [plan.splits for plan in plans] == [splits]


@pytest.mark.parametrize("out_dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("splits", [1, 2, 6])
@pytest.mark.parametrize(("tile", "tokens"), [("small", 70), ("large", 131)])
def test_every_tile_of_nm24_linear_i8(tile, tokens, splits, out_dtype, monkeypatch):
    cut(monkeypatch, tile, splits)
    args = byte_inputs(137, tokens, torch.int8, out_dtype)
    kwargs = {"out_dtype": out_dtype, "activation": "silu"}
    assert_gpu_result(INT8, call_on_gpu(INT8, args, kwargs), args, kwargs)


@every_half
@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize(
    ("tile", "channels", "groups"),
    [("small", 24, 1), ("small", 20, 1), ("small", 36, 2), ("large", 40, 1), ("large", 48, 2)],
)
def test_every_tile_of_nm24_conv(tile, channels, groups, splits, dtype, monkeypatch):
    plans = cut(monkeypatch, tile, splits)
    generator = torch.Generator().manual_seed(channels)
    weight = make_weight((70 * groups, channels // groups, 3, 3), dtype, generator)
    x = torch.randn((2, channels, 9, 11), generator=generator).to(dtype)
    residual = torch.randn((2, 70 * groups, 9, 6), generator=generator).to(dtype)
    args = (x, weight.values, weight.meta, make_bias(70 * groups, dtype, generator), residual)
    kwargs = {"kernel_size": 3, "padding": 1, "stride": (1, 2), "groups": groups, "activation": "relu"}
    assert_gpu_result(CONV, call_on_gpu(CONV, args, kwargs), args, kwargs)
    assert [plan.splits for plan in plans] == [splits]


@pytest.mark.parametrize("op", [LINEAR, CONV], ids=lambda op: op.name)
def test_f32_where_torch_allows_bf16(op, native):
    args, kwargs = case_of(op, "residual").make(torch.float32)
    rounded = [arg.bfloat16().float() if i < 2 else arg for i, arg in enumerate(args)]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        y = call_on_gpu(op, args, kwargs)
        kernels = [cuda.kernel_name(moved(args[1], GPU), reason) for reason in ("a reason", None)]
    finally:
        torch.set_float32_matmul_precision(before)
    assert f"{op.name}_cuda" in native.taken()
    for kernel, instruction in zip(kernels, ("mma.sp", "wgmma.sp"), strict=True):
        assert kernel.startswith(f"cuda {instruction}, in bfloat16")
    assert y.dtype is torch.float32
    assert_close(host(y), expect(op, rounded, kwargs))


@pytest.mark.filterwarnings("ignore:.*plain torch reference")
@pytest.mark.parametrize(
    ("op", "case", "dtype", "forward", "backward"),
    [
        (LINEAR, "tail", torch.float16, ["linear"], ["grad_values", "to_dense"]),
        (LINEAR, "tail", torch.float32, ["to_dense"], ["to_dense"]),
        (LINEAR, "tail", torch.float64, [], []),
        (LINEAR, "empty", torch.float16, [], ["to_dense"]),
        (LINEAR, "no_rows", torch.float16, [], []),
        (LINEAR, "no_features", torch.float16, [], []),
        (CONV, "tail", torch.float16, ["conv"], ["to_dense"]),
        (CONV, "depthwise", torch.float16, ["to_dense"], ["to_dense"]),
        (CONV, "empty", torch.float16, [], ["to_dense"]),
        (INT8, "tail", torch.float16, ["linear"], None),
        (F8, "tail", torch.float16, ["to_dense"], None),
        (F8, "one_scale", torch.float16, ["linear"] if RUNS_SM90 else ["to_dense"], None),
        (REGISTRY["nm24_compress"], "tail", torch.float16, ["compress"], None),
        (REGISTRY["nm24_to_dense"], "tail", torch.float16, ["to_dense"], []),
        (REGISTRY["nm24_grad_values"], "tail", torch.float16, ["grad_values"], ["linear", "to_dense"]),
    ],
)
def test_who_is_called(op, case, dtype, forward, backward, native):
    def called():
        return sorted(name.removeprefix("nm24_").removesuffix("_cuda") for name in native.taken())

    args, kwargs = case_of(op, case).make(dtype)
    args = [moved(arg, GPU) for arg in args]
    native.taken()
    if backward is None:
        op.fn(*args, **kwargs)
        assert called() == forward
        return
    y = op.fn(*(a.requires_grad_() if a is not None and a.is_floating_point() else a for a in args), **kwargs)
    assert called() == forward
    y.sum().backward()
    assert called() == backward


def test_dense_can_be_asked_for(native, monkeypatch):
    monkeypatch.setattr(_native, "impl", "dense")
    monkeypatch.setattr(registry, "_warned", set())
    for op in PRODUCTS if RUNS_SM90 else PRODUCTS[:3]:
        with pytest.warns(UserWarning, match=f"^{op.name}: SPARSEOPS_IMPL=dense asks for the dense exp"):
            args, kwargs = case_of(op).make(torch.float16)
            native.taken()
            assert_gpu_result(op, call_on_gpu(op, args, kwargs), args, kwargs)
        assert native.taken() == ["nm24_to_dense_cuda"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call_on_gpu(op, args, kwargs)


def test_a_tile_can_be_asked_for(native, monkeypatch):
    (args, kwargs), (image, options) = (case_of(op, "tail").make(torch.float16) for op in (LINEAR, CONV))
    for tile in ("few8", "few16", "small", "large"):
        monkeypatch.setattr(_native, "impl", tile)
        assert_gpu_result(LINEAR, call_on_gpu(LINEAR, args, kwargs), args, kwargs)
    monkeypatch.setattr(_native, "impl", "few8")
    with pytest.raises(ValueError, match="^nm24_conv: SPARSEOPS_IMPL must be auto, dense or one of small, l"):
        call_on_gpu(CONV, image, options)


def test_a_weight_packed_on_the_gpu(native):
    w = torch.randn(40, 20, 3, 3).half()
    there = NM24.from_dense(w.to(GPU), prune="magnitude")
    assert native.taken() == ["nm24_compress_cuda"]
    native_values, native_meta = there.values.cpu(), there.meta.cpu()
    values, meta = REGISTRY["nm24_compress"].reference(pack_columns(w))
    assert torch.equal(native_values, values) and torch.equal(native_meta, meta)
    assert torch.equal(NM24.from_dense(w.double().to(GPU), prune="magnitude").meta.cpu(), meta)
    assert native.taken() == []


def slabs_of(layer):
    return {key: entry.tensor for key, entry in (derived._entries.get(layer.meta) or {}).items()}


@pytest.mark.parametrize(
    ("make", "wgmma"), [(lambda: SparseLinear(40, 24), True), (lambda: SparseConv2d(16, 24, 3), False)]
)
def test_a_layer_is_ready_where_it_comes_to_the_gpu(make, wgmma, monkeypatch):
    layer = make().half().to(GPU)
    assert layer.kernel.startswith("cuda wgmma.sp" if wgmma and RUNS_SM90 else "cuda mma.sp")
    ((key, slabs),) = slabs_of(layer).items()
    assert key == (16, 1)
    other = make().half()
    layer.load_state_dict(other.state_dict())
    assert slabs_of(layer)[key] is slabs, "at the same address"
    x = torch.randn(3, 16, 5, 6) if isinstance(layer, SparseConv2d) else torch.randn(3, 40)
    with torch.no_grad():
        y = layer(x.half().to(GPU)).cpu()
    torch.testing.assert_close(y, other.to_dense()(x.half()), rtol=1e-2, atol=1e-2)
    assert layer.float().kernel.startswith("reference: no tensor core multiplies a float32 weight of 2:4")
    grouped = SparseConv2d(16, 32, 3, groups=4).half().to(GPU)
    assert grouped.kernel == "reference: the CUDA kernel needs 16 channels in each group, got 4"


def test_a_layer_in_float32_is_ready_too(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    layer = SparseLinear(40, 24).to(GPU)
    rounded = derived._entries[layer.values][torch.bfloat16].tensor
    assert torch.equal(rounded, layer.values.bfloat16())


@pytest.mark.parametrize("op", [LINEAR, CONV], ids=lambda op: op.name)
def test_a_changed_weight_is_seen(op):
    args, kwargs = case_of(op).make(torch.float16)
    there = [moved(arg, GPU) for arg in args]
    op.fn(*there, **kwargs)
    other = list(args)
    other[1], other[2] = args[1].roll(1, 0), args[2].roll(1, 0)
    there[1].copy_(other[1])
    there[2].copy_(other[2])
    assert_gpu_result(op, op.fn(*there, **kwargs), other, kwargs)


@pytest.mark.parametrize(("op", "case"), FEW)
def test_with_and_without_the_dispatcher(op, case, monkeypatch):
    args, kwargs = case.make(torch.float16)
    there = [moved(arg, GPU) for arg in args]
    straight = op.fn(*there, **kwargs)
    with Dispatched() as record:
        watched = op.fn(*there, **kwargs)
    assert [overload for overload, _ in record.calls] == [getattr(torch.ops.sparseops, op.name).default]
    monkeypatch.setattr(registry, "FAST_ON_GPU", False)
    for y in (watched, op.fn(*there, **kwargs)):
        assert layout(y) == layout(straight) and torch.equal(y, straight)


@pytest.mark.parametrize("op", [LINEAR, CONV], ids=lambda op: op.name)
def test_the_dispatcher_serves_all_that_watches(op, monkeypatch):
    args, kwargs = case_of(op, "residual").make(torch.float16)
    there = [moved(arg, GPU) for arg in args]
    answers = []
    guard = registry.fast_on_gpu
    monkeypatch.setattr(registry, "fast_on_gpu", lambda *args: answers.append(guard(*args)) or answers[-1])
    y = op.fn(*there, **kwargs)
    assert answers.pop() is True
    for position in (0, 1, 3, 4):
        given = list(there)
        given[position] = given[position].clone().requires_grad_()
        assert op.fn(*given, **kwargs).requires_grad
        assert answers.pop() is False
        with torch.no_grad():
            assert torch.equal(op.fn(*given, **kwargs), y)
        assert answers.pop() is True
        given[position] = torch._neg_view(-there[position])
        assert torch.equal(op.fn(*given, **kwargs), y)
        assert answers.pop() is False
    with torch.autocast(GPU, torch.bfloat16):
        assert op.fn(*there, **kwargs).dtype is torch.bfloat16
    assert answers.pop() is False
    torch.vmap(lambda x: op.fn(x, *there[1:], **kwargs))(torch.stack([there[0]] * 2))
    assert answers.pop(0) is False


def test_one_rounding():
    """y of f16 is rounded once from the sum in f32, bias, residual and activation included."""
    weight = NM24.from_dense(torch.eye(64)[:32].half())
    x = torch.full((4, 64), 1.0).half()
    bias = torch.full((32,), 2.0**-11).half()
    residual = torch.full((4, 32), 2.0**-11).half()
    y = call_on_gpu(LINEAR, (x, weight.values, weight.meta, bias, residual), {})
    assert (host(y) == 1 + 2.0**-10).all()


def test_the_harness_sees_a_wrong_result():
    args, kwargs = case_of(LINEAR).make(torch.float16)
    y = host(call_on_gpu(LINEAR, args, kwargs))
    y[3, 4] += 0.1
    expected = expect(LINEAR, args, kwargs)
    assert isinstance(expected, Expected)
    with pytest.raises(AssertionError, match="1 of 133 elements are off"):
        assert_close(y, expected)
