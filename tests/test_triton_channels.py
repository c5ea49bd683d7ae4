"""``channel_linear`` and ``channel_conv`` by their Triton kernels: every case in every dtype, and every way
channels are listed.

In Triton's interpreter, where ``test_in_the_interpreter`` runs this file in processes of its own, or on a GPU
under SPARSEOPS_IMPL=triton.
"""

from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import pytest
import torch
from conftest import DTYPES, assert_gpu_result, host, layout, moved
from triton_interpreter import run_tests

from sparseops import Channels, _native, convert, to_dense
from sparseops.ops import REGISTRY, channels
from sparseops.ops.common import behind_one, blocks, make_bias, make_pruned, to_channels_last
from sparseops.testing import assert_close, expect_grads, grads

pytest.importorskip("triton", reason="Triton is not installed")

PLACE = "cpu" if _native.interpreted else "cuda" if torch.cuda.is_available() else None
by_triton = pytest.mark.skipif(
    _native.impl != "triton" or PLACE is None, reason="no kernel of Triton serves this process"
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
LINEAR, CONV = REGISTRY["channel_linear"], REGISTRY["channel_conv"]
LINEAR_CASES = pytest.mark.parametrize("case", LINEAR.cases, ids=lambda case: case.name)
CONV_CASES = pytest.mark.parametrize("case", CONV.cases, ids=lambda case: case.name)
GENERIC = (
    "(test_opcheck or test_fake_tensors or test_stored_buffers or test_inference_mode or test_vmap_over or "
    "test_asking) and channel and not avx and not neon"
)
MODES = {"all": 0, "16": 16, "8": 8, "1": 1}
# of 80 channels: all, whole blocks of 16 and of 8, single ones
KEPT = {"all": None, "16": blocks(16, 0, 3), "8": blocks(8, 1, 2, 7), "1": [0, 3, 4, 9, 40, 41, 78]}
# The same of 96 in two groups of 48, which keep unlike numbers of them.
GROUPS_KEPT = {
    "all": None,
    "16": blocks(16, 0, 1, 4),
    "8": blocks(8, 1, 7, 9, 10),
    "1": [0, 3, 4, 9, 47, 49, 60, 78],
}


@pytest.fixture(autouse=True)
def exact(whole_f32):
    """float32 as it is, in convolutions too."""


@pytest.fixture
def always_kernels(monkeypatch):
    """Let kernels serve small products too."""
    monkeypatch.setattr(channels, "_FEW_ROWS", 0)
    monkeypatch.setattr(channels, "_FEW_CHANNELS", 0)


@pytest.fixture
def launches(monkeypatch):
    """The name and the arguments of every launch."""
    made = []

    def watch(module, name):
        module = import_module(f"sparseops.triton.{module}")
        launch = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: made.append((name, args)) or launch(*args))

    watch("channel_linear", "linear")
    watch("channel_conv", "conv")
    watch("channel_conv", "input_gradient")
    watch("channel_grads", "weight_gradient")
    return made


def there(args):
    return [moved(arg, PLACE) for arg in args]


def check(op, args, kwargs):
    """The result, its memory format, and every gradient."""
    y = op.fn(*there(args), **kwargs)
    assert_gpu_result(op, y, args, kwargs)
    assert layout(y) == layout(op.fn(*(moved(arg, "meta") for arg in args), **kwargs))
    expected = op.reference(*args, **kwargs)
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    found = grads(op.fn, there(args), kwargs, cotangent.to(PLACE))
    for position, expected in expect_grads(op, args, kwargs, cotangent).items():
        assert_close(found[position].cpu(), expected)


def modes_of(launch):
    """The modes of the two sides in the arguments of a launch."""
    return [arg.mode for arg in launch[1] if isinstance(arg, tuple) and hasattr(arg, "mode")]


def conv_args(image, out_channels, kernel_size, dtype, inputs, outputs, groups=1, view=to_channels_last):
    generator = torch.Generator().manual_seed(0)
    shape = (out_channels, image[1] // groups, kernel_size, kernel_size)
    weight = make_pruned(shape, dtype, generator, inputs, outputs, groups)
    x = view(torch.randn(image, generator=generator).to(dtype))
    bias = make_bias(out_channels, dtype, generator)
    options = {"outputs": out_channels, "kernel_size": kernel_size, "groups": groups}
    return (x, weight.values, weight.in_index, weight.out_index, bias), options


@pytest.mark.skipif(_native.interpreted, reason="this is the interpreter")
def test_in_the_interpreter():
    """This file in parts, and of test_ops.py what does not depend on how a kernel computes."""
    parts = [
        ("tests/test_triton_channels.py", "-k", "conv_cases"),
        ("tests/test_triton_channels.py", "-k", "conv and not conv_cases"),
        ("tests/test_triton_channels.py", "-k", "linear and not conv"),
        ("tests/test_ops.py", "-k", GENERIC),
    ]
    with ThreadPoolExecutor(2) as pool:
        passed = [tests for tests, _ in pool.map(lambda part: run_tests(*part), parts)]
    assert all(tests >= least for tests, least in zip(passed, (150, 80, 150, 150), strict=True)), passed


@by_triton
@every_dtype
@LINEAR_CASES
def test_channel_linear_cases(case, dtype, always_kernels):
    args, kwargs = case.make(dtype)
    assert LINEAR.supports(*there(args)) is None
    check(LINEAR, args, kwargs)


@by_triton
@every_dtype
@CONV_CASES
def test_channel_conv_cases(case, dtype, always_kernels):
    args, kwargs = case.make(dtype)
    assert CONV.supports(*there(args)) is None
    check(CONV, args, kwargs)


@by_triton
@every_dtype
@pytest.mark.parametrize("outputs", KEPT)
@pytest.mark.parametrize("inputs", KEPT)
def test_every_two_modes_of_channel_linear(inputs, outputs, dtype, launches):
    generator = torch.Generator().manual_seed(0)
    weight = make_pruned((80, 80), dtype, generator, KEPT[inputs], KEPT[outputs])
    # enough rows for a kernel, more than a tile, and no multiple of one
    x = torch.randn((131, 80), generator=generator).to(dtype)
    args = (x, weight.values, weight.in_index, weight.out_index, make_bias(80, dtype, generator))
    check(LINEAR, args, {"outputs": 80})
    # the result, again for its gradients, and the gradients of x and of the weight
    assert [name for name, _ in launches] == ["linear", "linear", "linear", "weight_gradient"]
    assert modes_of(launches[0]) == [MODES[inputs], MODES[outputs]]


@by_triton
@pytest.mark.parametrize(
    ("groups", "dtype"),
    [(1, dtype) for dtype in DTYPES.values()] + [(2, torch.float16)],
    ids=[*DTYPES, "groups_f16"],
)
@pytest.mark.parametrize("outputs", KEPT)
@pytest.mark.parametrize("inputs", KEPT)
def test_every_two_modes_of_channel_conv(inputs, outputs, groups, dtype, launches, always_kernels):
    kept = KEPT if groups == 1 else GROUPS_KEPT
    width = 80 if groups == 1 else 96
    # enough rows for a kernel, more than a tile, and no multiple of one
    args, kwargs = conv_args((2, width, 9, 8), width, 3, dtype, kept[inputs], kept[outputs], groups)
    check(CONV, args, kwargs | {"padding": 1})
    assert [name for name, _ in launches] == ["conv", "conv", "input_gradient", "weight_gradient"]
    assert modes_of(launches[0]) == [MODES[inputs], MODES[outputs]]


@by_triton
@every_dtype
def test_channel_linear_off_a_multiple_of_16_bytes(dtype):
    """And many rows, which the gradient of the weight splits."""
    generator = torch.Generator().manual_seed(0)
    weight = make_pruned((37, 75), dtype, generator, blocks(8, 0, 9), blocks(8, 1, 4))
    x = behind_one(torch.randn((1100, 75), generator=generator).to(dtype))
    args = (x, weight.values, weight.in_index, weight.out_index)
    check(LINEAR, args, {"outputs": 37, "activation": "silu"})


@by_triton
@every_dtype
@pytest.mark.parametrize("groups", [1, 2])
def test_channel_conv_off_a_multiple_of_16_bytes(groups, dtype, always_kernels):
    """And many pixels, which the gradient of the weight splits."""
    kept = [0, 3, 20, 36, 37], [1, 2, 12, 21]
    args, kwargs = conv_args((2, 38, 24, 23), 22, 2, dtype, *kept, groups, behind_one)
    check(CONV, args, kwargs | {"stride": (2, 1), "padding": "valid", "activation": "silu"})


CONFIGS = pytest.mark.parametrize("config", ["large", "narrow", "small"])


def take(monkeypatch, config, *modules):
    """Let kernels always take this configuration, if they have it, or the large one."""
    for name in modules:
        module = import_module(f"sparseops.triton.{name}")
        taken = module.CONFIGS.get(config, module.CONFIGS["large"])
        monkeypatch.setattr(module, "CONFIGS", dict.fromkeys(module.CONFIGS, taken))


@by_triton
@CONFIGS
def test_every_configuration_of_channel_linear(config, monkeypatch):
    take(monkeypatch, config, "channel_linear", "channel_grads")
    generator = torch.Generator().manual_seed(0)
    for block in (1, 8):  # more than a tile on every side
        inputs, outputs = blocks(block, *range(0, 176 // block, 2)), blocks(block, *range(0, 320 // block, 2))
        weight = make_pruned((320, 176), torch.float16, generator, inputs, outputs)
        x = torch.randn((300, 176), generator=generator).half()
        check(LINEAR, (x, weight.values, weight.in_index, weight.out_index), {"outputs": 320})


@by_triton
@CONFIGS
def test_every_configuration_of_channel_conv(config, monkeypatch):
    take(monkeypatch, config, "channel_conv", "channel_grads")
    for block in (1, 8):  # more than a tile on every side
        inputs, outputs = blocks(block, *range(0, 144 // block, 2)), blocks(block, *range(0, 272 // block, 2))
        args, kwargs = conv_args((1, 144, 13, 12), 272, 2, torch.float16, inputs, outputs)
        check(CONV, args, kwargs | {"padding": 1})


@by_triton
def test_configuration_by_what_linear_and_conv_are_given():
    tiles = import_module("sparseops.triton.channel_tiles")
    half = torch.zeros(64, dtype=torch.float16, device=PLACE)

    def chosen(rows=128 * 1000, dtype=torch.float16, mode=8, kept=128, units=(8, 8), tensors=(half, None)):
        side = tiles.Side(mode, kept, 1024, None, None, kept, True)
        return tiles.product_config(rows, dtype, (side, side), units, *tensors)

    assert chosen() == "large"
    assert chosen(kept=192) == chosen(kept=64) == "narrow"  # a third or a half of a tile would be empty
    assert chosen(rows=128 * (tiles.multiprocessors(half.device) - 1)) == "narrow"
    assert chosen(mode=1) == chosen(units=(8, 1)) == chosen(tensors=(half, half[1:])) == "small"
    assert chosen(dtype=torch.float32) == chosen(dtype=torch.float32, mode=1) == "float32"


@by_triton
def test_a_dropped_input_of_channel_linear_may_be_nan():
    weight = make_pruned(
        (40, 64), torch.float16, torch.Generator().manual_seed(0), blocks(8, 1), blocks(8, 2)
    )
    x = torch.randn(70, 64).half()
    x[:, 16:] = torch.nan
    y = LINEAR.fn(*there((x, weight.values, weight.in_index, weight.out_index)), outputs=40)
    assert y.isfinite().all() and (y[:, :16] == 0).all()


@by_triton
def test_a_dropped_input_of_channel_conv_may_be_nan():
    args, kwargs = conv_args((2, 64, 9, 8), 40, 3, torch.float16, blocks(8, 1), blocks(8, 2))
    args[0][:, :8] = args[0][:, 16:] = torch.nan
    y = host(CONV.fn(*there(args), **kwargs))
    assert y.isfinite().all() and (y[:, :16] == args[-1][:16, None, None]).all()


@by_triton
def test_channel_conv_reads_nothing_of_another_image():
    args, kwargs = conv_args((3, 16, 9, 8), 16, 3, torch.float16, None, None)
    args[0][::2] = torch.nan
    y = host(CONV.fn(*there(args), **kwargs, padding=2, dilation=2))
    assert y[1].isfinite().all() and y[0].isnan().any()


@by_triton
@pytest.mark.parametrize("allowed", [False, True])
def test_channel_conv_of_f32_by_the_switch_of_cudnn(allowed, monkeypatch):
    """Operands rounded to 10 bits give other results than whole ones, and near ones."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    args, kwargs = conv_args((2, 32, 9, 8), 24, 3, torch.float32, blocks(8, 0, 2), blocks(8, 1))
    double = [arg.double() if arg.is_floating_point() else arg for arg in args]
    exact = CONV.reference(*double, **kwargs)
    cotangent = torch.randn(exact.shape)
    found = grads(CONV.fn, there(args), kwargs, cotangent.to(PLACE))
    expected = grads(CONV.reference, double, kwargs, cotangent.double())
    pairs = [(CONV.fn(*there(args), **kwargs), exact), *((found[i], expected[i]) for i in (0, 1))]
    for one, other in pairs:
        error = (host(one) - other).abs().max()
        assert (1e-4 < error < 1e-1) if allowed else error < 1e-4


@by_triton
@pytest.mark.parametrize("groups", [1, 2])
def test_offsets_of_channel_conv_that_may_not_fit_32_bits(groups, monkeypatch, always_kernels):
    for module in ("channel_conv", "channel_grads"):
        monkeypatch.setattr(import_module(f"sparseops.triton.{module}"), "INDEX_LIMIT", 1)
    kept = [0, 3, 4, 17, 30]
    args, kwargs = conv_args((2, 32, 9, 8), 32, 3, torch.float16, kept, kept, groups)
    check(CONV, args, kwargs | {"padding": 1})


@by_triton
def test_offsets_of_channel_linear_that_may_not_fit_32_bits(monkeypatch):
    for module in ("channel_linear", "channel_grads"):
        monkeypatch.setattr(import_module(f"sparseops.triton.{module}"), "INDEX_LIMIT", 1)
    generator = torch.Generator().manual_seed(0)
    weight = make_pruned((40, 64), torch.float16, generator, blocks(8, 1), blocks(8, 2))
    args = (torch.randn(70, 64).half(), weight.values, weight.in_index, weight.out_index)
    check(LINEAR, args, {"outputs": 40})


@by_triton
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_what_of_channel_conv_is_left_to_torch(groups, stride, launches):
    """The gradient of x where there is a stride, unless there are groups; narrow groups."""
    kept = blocks(8, 0, 2, 4, 5, 7)
    args, kwargs = conv_args((2, 64, 12, 12), 64, 3, torch.float16, kept, kept, groups)
    check(CONV, args, kwargs | {"stride": stride})
    composed = groups == 1 and stride == 2
    expected = ["conv", "conv", *([] if composed else ["input_gradient"]), "weight_gradient"]
    assert [name for name, _ in launches] == expected
    launches.clear()
    args, kwargs = conv_args((2, 64, 12, 12), 64, 3, torch.float16, blocks(8, 0, 4), kept, 2)
    check(CONV, args, kwargs)
    assert launches == []


@by_triton
@pytest.mark.parametrize("rows", [63, 64])
def test_what_of_channel_linear_is_left_to_torch(rows, launches):
    generator = torch.Generator().manual_seed(0)
    weight = make_pruned((40, 64), torch.float16, generator, [0, 5], blocks(8, 2))
    x = torch.randn(rows, 64).half()
    check(LINEAR, (x, weight.values, weight.in_index, weight.out_index), {"outputs": 40})
    assert bool(launches) == (rows == 64)


def seconds(fn, *tensors):
    """Second derivatives of a function of x and values, by them and by the cotangent."""
    *leaves, c = (t.detach().to(PLACE).requires_grad_() for t in tensors)
    first = torch.autograd.grad(fn(*leaves), leaves, c, create_graph=True)
    return torch.autograd.grad(sum((g**2).sum() for g in first), (*leaves, c))


@by_triton
def test_second_derivatives_of_channel_linear():
    generator = torch.Generator().manual_seed(0)
    weight = make_pruned((16, 24), torch.float32, generator, blocks(8, 1), blocks(8, 1))
    lists = there((weight.in_index, weight.out_index))
    found, expected = (
        seconds(
            lambda x, values, fn=fn: fn(x, values, *lists, outputs=16),
            torch.randn(5, 24, generator=torch.Generator().manual_seed(1)),
            weight.values,
            torch.ones(5, 16),
        )
        for fn in (LINEAR.fn, LINEAR.reference)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@by_triton
@pytest.mark.parametrize("groups", [1, 2])
def test_second_derivatives_of_channel_conv(groups, launches, always_kernels):
    kept = blocks(8, 0, 3)
    (x, values, *lists, _), kwargs = conv_args((2, 32, 7, 6), 32, 3, torch.float32, kept, kept, groups)
    lists = there(lists)
    found, expected = (
        seconds(
            lambda x, values, fn=fn: fn(x, values, *lists, **kwargs, padding=1),
            x,
            values,
            torch.randn(2, 32, 7, 6, generator=torch.Generator().manual_seed(1)),
        )
        for fn in (CONV.fn, CONV.reference)
    )
    # y and two gradients; each of these again for the second derivatives of what it is linear in
    assert {name for name, _ in launches} == {"conv", "input_gradient", "weight_gradient"}
    assert len(launches) == 7
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@by_triton
def test_layers_of_channel_conv_and_channel_linear_are_trained(launches):
    """A step of SGD changes them as it changes the dense layers of the same weights."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(32, 64, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(64, 64, 3, padding=1, groups=2),
        torch.nn.Flatten(),
        torch.nn.Linear(64 * 64, 16),
    ).to(PLACE)
    sparse = convert(model, pattern=Channels(ratio=0.5, keep_last=False))
    layers = sparse[0], sparse[2], sparse[4]
    assert all(layer.kernel.startswith("triton, gather and scatter in it") for layer in layers)
    dense = to_dense(sparse)
    x, target = torch.randn(2, 32, 8, 8, device=PLACE), torch.randn(2, 16, device=PLACE)
    for net in (sparse, dense):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        torch.nn.functional.mse_loss(net(x), target).backward()
        optimizer.step()
    assert {name for name, _ in launches} == {"conv", "input_gradient", "linear", "weight_gradient"}
    for layer, other in zip(layers, (dense[0], dense[2], dense[4]), strict=True):
        mine = layer.to_dense().weight
        kept = mine != 0  # the dense layer's dropped weights are trained too
        torch.testing.assert_close(mine[kept], other.weight[kept])
        torch.testing.assert_close(layer.bias, other.bias)
