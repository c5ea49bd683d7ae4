"""Every op of the registry in every case, dtype and instruction set, against float64 and plain torch."""

import warnings
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from conftest import (
    CASES,
    DEVICE,
    DTYPES,
    ISAS,
    KERNEL_DTYPE,
    SMOOTH_CASES,
    Dispatched,
    Wrapper,
    assert_result,
    case_of,
    every_case,
    every_dtype,
    every_layer,
    every_smooth_case,
    is_same,
    layout,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from sparseops import _native, ops
from sparseops.formats import NM24, ChannelPruned, Keep
from sparseops.ops import REGISTRY, common
from sparseops.ops.nm24_conv import nm24_conv_reference
from sparseops.ops.nm24_linear import nm24_linear_reference
from sparseops.testing import assert_close, expect_grads, grads

PLAIN_ACTIVATIONS = {
    "none": lambda z: z,
    "relu": torch.relu,
    "silu": lambda z: z * torch.sigmoid(z),
    "gelu": lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2,
}
OPS = list(REGISTRY.values())


HELPERS = {"__init__", "registry", "common", "conv_geometry", "cuda", "derived", "dispatch"}
HELPERS |= {"cuda_conv", "dispatch_sm90", "scaled_linear", "tiles"}
HELPERS |= {"channel_conv_cases", "channel_grads", "channels", "channel_plain", "onednn"}


def some_cases(*names):
    return pytest.mark.parametrize(("op", "case"), [c for c in SMOOTH_CASES if c.values[1].name in names])


# cases that differ from others in sizes alone, which say nothing new about how an op is registered
SIZES_ONLY = {
    *("lt_tile", "eq_tile", "gt_tile", "deep", "wide", "many_tokens", "one_row", "one_feature", "wide_image"),
    *("rgb_7x7_stride_2", "depthwise", "groups", "valid", "huge_padding", "column_kernel", "kernel_is_image"),
    *("pointwise_stride", "strided_one_token", "relu_no_bias_tail", "channels_last_groups", "many_rows"),
    "nonfinite",  # NaN equals nothing
}

every_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
every_smooth_op = pytest.mark.parametrize(
    "op", [op for op in OPS if op.differentiable], ids=lambda op: op.name
)


def tensors(args):
    return [arg for arg in args if isinstance(arg, torch.Tensor)]


def is_floating(arg):
    return isinstance(arg, torch.Tensor) and arg.is_floating_point()


def another(t):
    """Something like ``t``; an index list, which has to ascend, is the same."""
    return t if t.dtype is torch.int32 else t.roll(1, 0)


def as_leaves(args):
    """``args`` with a gradient asked for wherever there can be one."""
    return [arg.detach().requires_grad_() if is_floating(arg) else arg for arg in args]


def dispatched(op, args, kwargs):
    """The overload and the raw arguments that the public function calls it with."""
    with Dispatched() as record:
        op.fn(*args, **kwargs)
    ((overload, raw),) = record.calls
    return overload, raw


def test_the_native_module_is_built():
    assert _native.error is None, _native.error
    assert "portable" in ISAS


def test_the_registry_is_complete():
    files = {path.stem for path in Path(ops.__file__).parent.glob("*.py")}
    assert set(REGISTRY) == files - HELPERS
    for op in OPS:
        assert getattr(ops, op.name) is op.fn
        assert {"lt_tile", "eq_tile", "gt_tile", "tail"} <= {case.name for case in op.cases}
        assert len({case.name for case in op.cases}) == len(op.cases)


@every_dtype
@every_case
def test_forward(op, case, dtype, isa):
    args, kwargs = case.make(dtype)
    assert (op.supports(*args) is None) == op.runs_on(DEVICE)
    before = [t.clone() for t in tensors(args)]
    y = op.fn(*args, **kwargs)
    assert_result(op, y, args, kwargs)
    for t, copy in zip(tensors(args), before, strict=True):
        torch.testing.assert_close(t, copy, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("op", "case"), [c for c in CASES if c.values[0].dtype.itemsize > 1])
def test_forward_f64_is_the_reference(op, case):
    args, kwargs = case.make(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = op.fn(*args, **kwargs)
    assert_result(op, y, args, kwargs)


@pytest.mark.parametrize("case", REGISTRY["nm24_linear"].cases, ids=lambda case: case.name)
def test_linear_reference_is_torch(case):
    (x, values, meta, bias, *residual), kwargs = case.make(torch.float64)
    dense = NM24(values, meta, (values.shape[0], x.shape[-1])).to_dense()
    z = sum(residual, torch.nn.functional.linear(x, dense, bias))
    expected = PLAIN_ACTIVATIONS[kwargs["activation"]](z)
    torch.testing.assert_close(nm24_linear_reference(x, values, meta, bias, *residual, **kwargs), expected)


@pytest.mark.parametrize("case", REGISTRY["nm24_conv"].cases, ids=lambda case: case.name)
def test_conv_reference_is_torch(case):
    """Which settles what the paddings mean: torch is given them as they are."""
    (x, values, meta, bias, *residual), kwargs = case.make(torch.float64)
    kernel_size, activation = kwargs["kernel_size"], kwargs.get("activation", "none")
    taps = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
    shape = (values.shape[0], x.shape[-3] // kwargs["groups"], *taps)
    options = {name: value for name, value in kwargs.items() if name not in ("kernel_size", "activation")}
    dense = NM24(values, meta, shape).to_dense()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it pads a copy for even kernels
        z = sum(residual, torch.nn.functional.conv2d(x, dense, bias, **options))
    expected = PLAIN_ACTIVATIONS[activation](z)
    torch.testing.assert_close(nm24_conv_reference(x, values, meta, bias, *residual, **kwargs), expected)


@pytest.mark.parametrize(
    "order", ["contiguous", "channels_last", "cropped", "cropped_channels_last", "one_channel_repeated"]
)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(5, 4), (1, 1), (5, 1), (1, 5)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_conv_keeps_the_memory_format_as_torch_does(batch, channels, size, order):
    margin = 1 if "cropped" in order else 0
    x = torch.randn(batch, channels, size[0] + margin, size[1] + margin)
    if "channels_last" in order:
        x = x.to(memory_format=torch.channels_last)
    x = x[..., margin:, margin:]
    if order == "one_channel_repeated":
        x = x[:, :1].expand(-1, channels, -1, -1)
    weight = NM24.from_dense(torch.randn(4, channels, 3, 3), prune="magnitude")
    y = REGISTRY["nm24_conv"].fn(x, weight.values, weight.meta, kernel_size=3, padding=1)
    plain = torch.nn.functional.conv2d(x, weight.to_dense(), padding=1)
    keep = torch.arange(channels)[-2:], torch.tensor([0, 2])
    pruned = ChannelPruned.from_dense(torch.randn(4, channels, 3, 3), prune=Keep(*keep))
    given = (x, pruned.values, pruned.in_index, pruned.out_index)
    z = REGISTRY["channel_conv"].fn(*given, outputs=4, kernel_size=3, padding=1)
    torch.testing.assert_close(z, torch.nn.functional.conv2d(x, pruned.to_dense(), padding=1))
    assert layout(z) == layout(y)
    if margin and x[0].numel() == 1:  # one pixel of one channel cropped out: every order is the same one
        assert y.is_contiguous() and y.is_contiguous(memory_format=torch.channels_last)
    else:
        assert layout(y) == layout(plain)
    torch.testing.assert_close(y, plain)


def test_expanding_is_exact():
    op = REGISTRY["nm24_to_dense"]
    for case in op.cases:
        for dtype in (*DTYPES.values(), torch.float64):
            args, kwargs = case.make(dtype)
            assert torch.equal(op.fn(*args, **kwargs), op.reference(*args, **kwargs))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@every_op
def test_any_number_of_threads(op, threads, isa):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for name in ("gt_tile", "deep", "many_tokens", "channels_last"):
            for case in (case for case in op.cases if case.name == name):
                args, kwargs = case.make(torch.float32)
                assert_result(op, op.fn(*args, **kwargs), args, kwargs)
    finally:
        torch.set_num_threads(before)


@every_dtype
@every_smooth_case
def test_gradients(op, case, dtype):
    args, kwargs = case.make(dtype)
    generator = torch.Generator().manual_seed(1)
    cotangent = torch.randn(op.fn(*args, **kwargs).shape, generator=generator).to(dtype)
    found = grads(op.fn, args, kwargs, cotangent)
    for position, expected in expect_grads(op, args, kwargs, cotangent).items():
        assert_close(found[position], expected)


@pytest.mark.filterwarnings("ignore:.*plain torch reference")
@some_cases("tail", "relu", "silu", "gelu", "same_even_kernel", "stride", "groups_tail", "batched", "vector")
def test_gradcheck(op, case):
    args, kwargs = case.make(torch.float64)
    leaves = as_leaves(tensors(args))
    rest = [None] * (len(args) - len(leaves))

    def fn(*given):
        return op.fn(*given, *rest, **kwargs)

    assert torch.autograd.gradcheck(fn, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(fn, leaves, fast_mode=True)


@every_smooth_op
def test_gradients_only_where_asked(op):
    args, kwargs = case_of(op).make(torch.float32)
    floating = [i for i, arg in enumerate(args) if is_floating(arg)]
    full = grads(op.fn, args, kwargs, torch.ones_like(op.fn(*args, **kwargs)))
    for asked in floating:
        leaves = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
        leaves[asked].requires_grad_()
        op.fn(*leaves, **kwargs).sum().backward()
        assert [i for i in floating if leaves[i].grad is not None] == [asked]
        torch.testing.assert_close(leaves[asked].grad, full[asked])


@pytest.mark.parametrize(("op", "case"), [c for c in CASES if c.values[1].name not in SIZES_ONLY])
def test_opcheck(op, case):
    args, kwargs = case.make(KERNEL_DTYPE)
    overload, raw = dispatched(op, args, kwargs)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if op.dtype is torch.float8_e4m3fn:
        checks.remove("test_schema")  # compares in a way that torch does not have for float8
    given = tuple(as_leaves(raw) if op.differentiable else raw)
    results = torch.library.opcheck(overload, given, test_utils=checks)
    assert set(results.values()) == {"SUCCESS"}


@every_case
def test_fake_tensors(op, case):
    args, kwargs = case.make(torch.bfloat16)
    if any(t.is_neg() for t in tensors(args)):
        args = [t.resolve_neg() if isinstance(t, torch.Tensor) else t for t in args]
    y = op.fn(*args, **kwargs)
    with FakeTensorMode() as mode:
        fake_args = [mode.from_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
        fake = op.fn(*fake_args, **kwargs)
    assert layout(fake) == layout(y)


@every_op
def test_meta_tensors(op):
    args, kwargs = case_of(op).make(torch.float32)
    bare = op.fn(*(arg.to("meta") if isinstance(arg, torch.Tensor) else arg for arg in args), **kwargs)
    assert all(t.is_meta for t in (bare if isinstance(bare, tuple) else (bare,)))
    assert layout(bare) == layout(op.fn(*args, **kwargs))


def more_of(op, args):
    """Arguments like ``args`` with one more token, image or row."""
    longer = 2 if op.name in ("nm24_to_dense", "nm24_grad_values") else 1
    return [*(torch.cat([t, t[:1]]) for t in args[:longer]), *args[longer:]]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@some_cases("tail", "gelu", "channels_last_tail")
def test_compile_with_dynamic_batch(op, case):
    args, kwargs = case.make(torch.float32)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    def fn(first, *rest):
        return torch.sigmoid(op.fn(first * 2, *rest, **kwargs)).sum()

    compiled = torch.compile(fn, fullgraph=True, dynamic=True, backend=counter)
    for given in (args, more_of(op, args)):
        leaves = as_leaves(given)
        wanted = [leaf for leaf in tensors(leaves) if leaf.requires_grad]
        y, plain = compiled(*leaves), fn(*leaves)
        torch.testing.assert_close(y, plain)
        for a, b in zip(torch.autograd.grad(y, wanted), torch.autograd.grad(plain, wanted), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@every_layer
def test_export_with_dynamic_batch(op, tmp_path):
    args, kwargs = case_of(op, "gelu").make(torch.float32)
    x = torch.cat([args[0]] * 3)
    layer = Wrapper(op, args, kwargs)
    program = torch.export.export(layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    assert [n for n in program.graph.nodes if n.target is getattr(torch.ops.sparseops, op.name).default]
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for batch in (x, x[:2], torch.cat([x, x])):
        torch.testing.assert_close(loaded(batch), layer(batch))


@pytest.mark.parametrize("in_dim", [0, 1, -1])
@some_cases("tail", "relu", "vector", "channels_last_tail")
def test_vmap_over_the_first_argument(op, case, in_dim):
    (first, *rest), kwargs = case.make(KERNEL_DTYPE)
    each = torch.stack([first, first * 2 - 1, -first])
    batched = torch.vmap(lambda x: op.fn(x, *rest, **kwargs), in_dims=in_dim)
    for got, x in zip(batched(each.movedim(0, in_dim).contiguous()), each, strict=True):
        torch.testing.assert_close(got, op.fn(x, *rest, **kwargs))


@every_smooth_op
def test_vmap_over_every_argument(op):
    args, kwargs = case_of(op).make(KERNEL_DTYPE)
    stacks = [torch.stack([t, another(t)]) for t in tensors(args)]
    y = torch.vmap(lambda *each: op.fn(*each, **kwargs))(*stacks)
    for i, got in enumerate(y):
        torch.testing.assert_close(got, op.fn(*(stack[i] for stack in stacks), **kwargs))


@every_smooth_op
def test_vmap_over_the_last_tensors(op):
    args, kwargs = case_of(op).make(KERNEL_DTYPE)
    *shared, last = tensors(args)
    stack = torch.stack([last, another(last)])
    y = torch.vmap(lambda t: op.fn(*shared, t, **kwargs))(stack)
    for i, got in enumerate(y):
        torch.testing.assert_close(got, op.fn(*shared, stack[i], **kwargs))


@every_layer
def test_vmap_inside_autograd(op):
    args, kwargs = case_of(op, "silu").make(torch.float32)
    cotangent = torch.randn(2, *op.fn(*args, **kwargs).shape)

    def batched(x, *rest, **kwargs):
        return torch.vmap(lambda each: op.fn(each, *rest, **kwargs))(torch.stack([x, 2 * x]))

    def looped(x, *rest, **kwargs):
        return torch.stack([op.fn(x, *rest, **kwargs), op.fn(2 * x, *rest, **kwargs)])

    expected = grads(looped, args, kwargs, cotangent)
    for position, grad in grads(batched, args, kwargs, cotangent).items():
        torch.testing.assert_close(grad, expected[position])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_layer
def test_autocast(op, dtype):
    args, kwargs = case_of(op).make(torch.float32)
    leaves = as_leaves(args)
    with torch.autocast("cpu", dtype):
        y = op.fn(*leaves, **kwargs)
        assert y.dtype is dtype
        assert torch.equal(op.fn(*args, **kwargs), y)
    low = op.fn(*(arg.to(dtype) if is_floating(arg) else arg for arg in args), **kwargs)
    assert torch.equal(y, low)
    y.sum().backward()
    assert all(leaf.grad.dtype is torch.float32 for leaf in leaves if leaf.requires_grad)


@pytest.mark.filterwarnings("ignore:.*plain torch reference")
@every_layer
def test_autocast_leaves_f64_alone(op):
    args, kwargs = case_of(op).make(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert op.fn(*args, **kwargs).dtype is torch.float64


def test_autocast_does_not_touch_expanding():
    op = REGISTRY["nm24_to_dense"]
    args, _ = case_of(op).make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert op.fn(*args).dtype is torch.float32


@every_op
def test_stored_buffers_may_be_misaligned_and_strided(op, isa):
    def displaced(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    def strided(t):
        return t.t().contiguous().t() if t.ndim == 2 else torch.stack([t, t], -1)[..., 0]

    args, kwargs = case_of(op).make(KERNEL_DTYPE)
    first, buffers = (args[:1], args[1:]) if kwargs else ((), args)
    y = op.fn(*args, **kwargs)
    for change in (displaced, strided):
        assert is_same(op.fn(*first, *map(change, buffers), **kwargs), y)


@every_op
def test_inference_mode(op):
    args, kwargs = case_of(op).make(KERNEL_DTYPE)
    y = op.fn(*args, **kwargs)
    with torch.inference_mode():
        assert is_same(op.fn(*args, **kwargs), y)


@every_layer
def test_nan_and_infinity_reach_what_they_are_multiplied_with(op, isa):
    """And nothing else: a dropped weight is skipped, where a dense layer would multiply infinity by zero."""
    args, kwargs = case_of(op, "no_bias").make(KERNEL_DTYPE)
    x, values = args[:2]
    at = (0,) * x.ndim
    touched = torch.zeros_like(x)
    touched[at] = 1
    reached = op.reference(touched, values.abs(), *args[2:], **kwargs) != 0
    assert 0 < reached.sum() < reached.numel()
    for value in (torch.nan, torch.inf, -torch.inf):
        hit = x.clone()
        hit[at] = value
        assert torch.equal(~op.fn(hit, *args[1:], **kwargs).isfinite(), reached)


@pytest.mark.parametrize("op", [op for op in OPS if not op.differentiable], ids=lambda op: op.name)
def test_asking_for_a_gradient_that_there_is_not(op):
    args, kwargs = case_of(op).make(KERNEL_DTYPE)
    y = op.fn(*as_leaves(args), **kwargs)
    first = y[0] if isinstance(y, tuple) else y
    with pytest.raises(RuntimeError, match=f"^{op.name}: there is no gradient; call it under torch.no_grad"):
        first.sum().backward()


@pytest.mark.parametrize("op", [op for op in OPS if not op.differentiable], ids=lambda op: op.name)
def test_vmap_without_a_gradient(op):
    args, kwargs = case_of(op).make(KERNEL_DTYPE)
    each = torch.stack([args[0], args[0].roll(1, 0)])
    y = torch.vmap(lambda first: op.fn(first, *args[1:], **kwargs), in_dims=1)(each.movedim(0, 1))
    for i, first in enumerate(each):
        single = op.fn(first, *args[1:], **kwargs)
        assert is_same(tuple(t[i] for t in y) if isinstance(y, tuple) else y[i], single)


@every_layer
def test_vmap_over_a_residual(op):
    """Alone, with the first argument, and not while that is batched."""
    (x, *weight, residual), kwargs = case_of(op, "residual").make(KERNEL_DTYPE)
    pairs = torch.stack([x, 2 * x]), torch.stack([residual, -residual])
    for dims in ((0, 0), (None, 0), (0, None), (0, 1)):
        given = [
            pair[0] if dim is None else pair.movedim(0, dim) for pair, dim in zip(pairs, dims, strict=True)
        ]
        y = torch.vmap(lambda x, r: op.fn(x, *weight, r, **kwargs), in_dims=dims)(*given)
        for i, got in enumerate(y):
            x, r = (pair[0 if dim is None else i] for pair, dim in zip(pairs, dims, strict=True))
            torch.testing.assert_close(got, op.fn(x, *weight, r, **kwargs))


@every_smooth_op
def test_the_dense_gradient_is_bounded(op, monkeypatch):
    """With room for two rows at once, gradients are the same."""
    if op.name == "nm24_to_dense":
        return
    args, kwargs = case_of(op, "gt_tile").make(torch.float32)
    cotangent = torch.randn(op.fn(*args, **kwargs).shape)
    expected = grads(op.fn, args, kwargs, cotangent)
    weight = expected[1]
    monkeypatch.setattr(common, "_DENSE_GRAD_BYTES", 2 * 4 * 2 * weight[0].numel())
    for position, grad in grads(op.fn, args, kwargs, cotangent).items():
        torch.testing.assert_close(grad, expected[position])
