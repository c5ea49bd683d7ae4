"""One test per message of the channel-pruned ops: a bad argument is one sentence, on any path."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparseops.formats import ChannelPruned, Keep
from sparseops.ops import channel_conv, channel_linear, registry

LISTS = Keep(torch.tensor([0, 3, 4, 9]), torch.tensor([1, 2, 5]))
WEIGHT = ChannelPruned.from_dense(torch.randn(6, 10), prune=LISTS)
KERNEL = ChannelPruned.from_dense(torch.randn(6, 10, 3, 2), prune=LISTS)
PACKED = ChannelPruned.from_dense(torch.randn(6, 10), prune=Keep(LISTS.inputs, LISTS.outputs, nm24=True))
X, IMAGE, BIAS = torch.randn(3, 10), torch.randn(2, 10, 7, 8), torch.randn(6)


def int32(*channels):
    return torch.tensor(channels, dtype=torch.int32)


def linear(x=X, values=WEIGHT.values, in_index=WEIGHT.in_index, out_index=WEIGHT.out_index, **options):
    options = {"bias": BIAS, "outputs": 6} | options
    return channel_linear(x, values, in_index, out_index, **options)


def conv(x=IMAGE, values=KERNEL.values, in_index=KERNEL.in_index, out_index=KERNEL.out_index, **options):
    options = {"bias": BIAS, "outputs": 6, "kernel_size": (3, 2)} | options
    return channel_conv(x, values, in_index, out_index, **options)


def of_24(x=X, values=PACKED.values, in_index=PACKED.in_index, out_index=PACKED.out_index, **options):
    options = {"bias": BIAS, "outputs": 6, "meta": PACKED.meta} | options
    return channel_linear(x, values, in_index, out_index, **options)


@pytest.fixture(params=["fast", "dispatcher", "fake"])
def path(request, monkeypatch):
    """Every way a call can take must say the same."""
    if request.param != "fast":
        monkeypatch.setattr(registry, "FAST", False)
    if request.param != "fake":
        yield request.param
        return
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield request.param


SHARED = [
    (
        {"in_index": int32(0, 3, 4, 9).long()},
        TypeError,
        "in_index must have dtype torch.int32, got torch.int64",
    ),
    ({"out_index": torch.ones(3)}, TypeError, "out_index must have dtype torch.int32, got torch.float32"),
    (
        {"in_index": int32(0, 3, 4, 9)[None]},
        ValueError,
        r"in_index must have shape \[n\], n from 1 .* got \(1, 4\)",
    ),
    ({"in_index": int32(*range(11))}, ValueError, r"n from 1 to the 10 channels, got \(11,\)"),
    ({"out_index": int32()}, ValueError, r"out_index must have shape \[n\], n from 1 to the 6 .* got \(0,\)"),
    ({"out_index": int32(1, 2)}, ValueError, r"as many rows as out_index has channels \(2\), got 3"),
    ({"bias": torch.randn(3)}, ValueError, r"bias must have shape \(6,\), got \(3,\)"),
    ({"bias": BIAS.half()}, TypeError, r"bias must have the dtype of x \(torch.float32\), got torch.float16"),
    ({"activation": "tanh"}, ValueError, "activation must be one of none, relu, silu, gelu, got 'tanh'"),
]
LINEAR = [
    *SHARED,
    ({"x": X.int()}, TypeError, "x must be a floating-point tensor .*, got torch.int32"),
    ({"values": WEIGHT.values.half()}, TypeError, r"values must have the dtype of x \(torch.float32\)"),
    ({"x": X[0, 0]}, ValueError, "x must have at least one dimension, got a scalar"),
    ({"values": WEIGHT.values[0]}, ValueError, r"values must have shape \[O', K'\], got \(4,\)"),
    ({"residual": torch.randn(3, 3)}, ValueError, r"residual must have shape \(3, 6\), got \(3, 3\)"),
    ({"residual": torch.randn(3, 6).half()}, TypeError, "residual must have the dtype of x"),
]
CONV = [
    *SHARED,
    ({"x": IMAGE[0, 0]}, ValueError, r"x must have shape \[N, C, H, W\] or \[C, H, W\], got \(7, 8\)"),
    (
        {"kernel_size": 3},
        ValueError,
        r"with a kernel_size of \(3, 3\) and at most 10 channels, got \(3, 3, 2, 4\)",
    ),
    (
        {"values": torch.randn(3, 5, 4)},
        ValueError,
        r"\[O', R \* S, C'\] with .* \(3, 2\) .*, got \(3, 5, 4\)",
    ),
    ({"values": torch.randn(3, 3, 2, 11)}, ValueError, r"at most 10 channels, got \(3, 3, 2, 11\)"),
    ({"groups": 4}, ValueError, "groups must be at least 1 and divide .* got 4 for 10 and 6"),
    ({"stride": 0}, ValueError, r"stride must be at least 1, got \(0, 0\)"),
    ({"padding": 1.5}, TypeError, "padding must be an int or a pair of ints, got 1.5"),
    ({"padding": "full"}, ValueError, 'padding must be an int, a pair of ints, "same" or "valid"'),
    ({"x": IMAGE[:, :, :2]}, ValueError, "x must have a height .* got 2 padded to 2 for an extent of 3"),
    ({"residual": torch.randn(2, 6, 5, 6)}, ValueError, r"residual must have shape \(2, 6, 5, 7\), got"),
]
OF_24 = [
    *SHARED,
    ({"meta": PACKED.meta.int()}, TypeError, "meta must have dtype torch.uint8, got torch.int32"),
    ({"values": PACKED.values[:, :8]}, ValueError, r"values must have shape \[O, P/2\], P divisible by 32"),
    (
        {"values": torch.randn(3, 32), "meta": torch.full((3, 8), 0x44, dtype=torch.uint8)},
        ValueError,
        "values must have 32 packed columns for the 4 channels of in_index, got 64",
    ),
    ({"x": X[0, 0]}, ValueError, "x must have at least one dimension, got a scalar"),
    ({"residual": torch.randn(6)}, ValueError, r"residual must have shape \(3, 6\), got \(6,\)"),
]


@pytest.mark.parametrize(("arguments", "error", "match"), LINEAR)
def test_channel_linear(arguments, error, match, path):
    with pytest.raises(error, match=f"^channel_linear: .*{match}"):
        linear(**arguments)


@pytest.mark.parametrize(("arguments", "error", "match"), CONV)
def test_channel_conv(arguments, error, match, path):
    with pytest.raises(error, match=f"^channel_conv: .*{match}"):
        conv(**arguments)


@pytest.mark.parametrize(("arguments", "error", "match"), OF_24)
def test_of_24(arguments, error, match, path):
    with pytest.raises(error, match=f"^channel_linear: .*{match}"):
        of_24(**arguments)


def test_a_convolution_of_24_of_another_width(path):
    values, meta = torch.randn(3, 16), torch.full((3, 4), 0x44, dtype=torch.uint8)
    match = r"^channel_conv: values must have 96 packed columns .* kernel_size of \(3, 3\), got 32"
    with pytest.raises(ValueError, match=match):
        conv(values=values, meta=meta, kernel_size=3, in_index=int32(0, 2, 4, 6, 8))


CONTENTS = [
    ({"in_index": int32(0, 4, 3, 9)}, "in_index must be ascending without repetition, got 4 before 3"),
    ({"in_index": int32(0, 3, 3, 9)}, "in_index must be ascending without repetition, got 3 before 3"),
    ({"in_index": int32(0, 3, 4, 10)}, "in_index must hold channels from 0 to 9, got 10"),
    ({"out_index": int32(-1, 2, 5)}, "out_index must hold channels from 0 to 5, got -1"),
    ({"out_index": int32(1, 2, 6)}, "out_index must hold channels from 0 to 5, got 6"),
]


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("fn", [linear, conv, of_24])
@pytest.mark.parametrize(("arguments", "match"), CONTENTS)
def test_what_the_lists_hold(fn, arguments, match, is_fast, monkeypatch):
    """Which a fake tensor does not say."""
    monkeypatch.setattr(registry, "FAST", registry.FAST and is_fast)
    with pytest.raises(ValueError, match=f"^channel_.*: {match}$"):
        fn(**arguments)


@pytest.mark.parametrize("fn", [linear, conv])
def test_a_weight_of_another_width(fn):
    with pytest.raises(ValueError, match="in_index has channels in its largest group, got 4 for 3$"):
        fn(in_index=int32(0, 3, 4))
    with pytest.raises(ValueError, match="got 4 for 3$"):
        conv(groups=2)


@pytest.mark.parametrize("name", ["values", "in_index", "out_index", "bias", "residual", "meta"])
@pytest.mark.parametrize("fn", [linear, conv, of_24])
def test_every_tensor_on_one_device(fn, name, path):
    shape = (2, 6, 5, 7) if fn is conv else (3, 6)
    given = {"values": KERNEL.values, "in_index": KERNEL.in_index, "out_index": KERNEL.out_index}
    given |= {"bias": BIAS, "residual": torch.ones(shape)}
    if fn is not conv:
        given["values"] = (WEIGHT if fn is linear else PACKED).values
    if name == "meta":
        given["meta"] = PACKED.meta
        if fn is not of_24:
            return
    with pytest.raises(
        ValueError, match=rf"^channel_.*: {name} must be on the device of x \(cpu\), got meta"
    ):
        fn(**{name: given[name].to("meta")})
