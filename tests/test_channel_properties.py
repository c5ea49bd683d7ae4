"""Channel-pruned layers over generated lists, shapes, groups and formats: each draw is another layer."""

import pytest
import torch
from conftest import ISAS, layout
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparseops import _native
from sparseops.formats import ChannelPruned, Keep
from sparseops.ops import REGISTRY, onednn
from sparseops.testing import assert_close, expect, expect_grads, grads

LINEAR, CONV = REGISTRY["channel_linear"], REGISTRY["channel_conv"]
SEEDS = st.integers(0, 2**31)
pytestmark = pytest.mark.skipif(_native.emulated is not None, reason="the CPU stands for a GPU")


@st.composite
def lists(draw, total):
    """Some of ``total`` channels: single ones, or blocks of them; at least one."""
    block = draw(st.sampled_from([1, 1, 8, 16]))
    count = -(-total // block)
    chosen = draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=count))
    return torch.tensor([i for i in range(total) if i // block in chosen])


@st.composite
def dense(draw):
    """What both layers take: dtype, activation, whether there are bias and residual, a generator."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    activation = draw(st.sampled_from(["none", "relu", "silu", "gelu"]))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    return dtype, activation, draw(st.booleans()), draw(st.booleans()), generator


def arguments(x, shape, keep, groups, options, drawn, op):
    dtype, activation, has_bias, has_residual, generator = drawn
    fan_in = max(1, len(keep.inputs) // groups * shape[2:].numel())
    w = torch.randn(shape, generator=generator) * fan_in**-0.5
    weight = ChannelPruned.from_dense(w.to(dtype), prune=keep, groups=groups)
    bias = torch.randn(shape[0], generator=generator).to(dtype) if has_bias else None
    args = [x, weight.values, weight.in_index, weight.out_index, bias]
    options |= {"outputs": shape[0], "activation": activation}
    if has_residual:
        y = op.reference(*args, **options)
        args.append(torch.randn(y.shape, generator=generator).to(dtype))
    return args, options


@st.composite
def linears(draw):
    drawn = draw(dense())
    inputs, outputs = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    lead = draw(st.one_of(st.tuples(st.integers(1, 70)), st.just(()), st.just((2, 3))))
    x = torch.randn((*lead, inputs), generator=drawn[-1]).to(drawn[0])
    keep = Keep(draw(lists(inputs)), draw(lists(outputs)))
    return arguments(x, torch.Size((outputs, inputs)), keep, 1, {}, drawn, LINEAR)


@st.composite
def convs(draw):
    drawn = draw(dense())
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 7]))
    in_group, out_group = draw(st.integers(1, 40 // groups + 1)), draw(st.integers(1, 40 // groups + 1))
    inputs, outputs = groups * in_group, groups * out_group
    taps = draw(st.tuples(st.integers(1, 3), st.integers(1, 4)))
    options = {"kernel_size": taps, "groups": groups, "dilation": draw(st.integers(1, 2))}
    options["padding"] = draw(st.sampled_from([0, 1, (2, 0), "same"]))
    options["stride"] = 1 if options["padding"] == "same" else draw(st.integers(1, 3))
    size = draw(st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12)))
    x = torch.randn((size[0], inputs, *size[1:]), generator=drawn[-1]).to(drawn[0])
    view = draw(st.sampled_from(["contiguous", "channels_last", "transposed"]))
    if view == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif view == "transposed":
        x = x.mT.contiguous().mT
    padding = (0, 0) if options["padding"] == 0 else (2, 0) if options["padding"] == (2, 0) else (1, 1)
    for n, tap, pad in zip(size[1:], taps, padding, strict=True):
        assume(options["padding"] == "same" or n + 2 * pad > options["dilation"] * (tap - 1))
    keep = Keep(draw(lists(inputs)), draw(lists(outputs)))
    live = {int(channel) // out_group for channel in keep.outputs}
    assume(any(int(channel) // in_group in live for channel in keep.inputs))
    return arguments(x, torch.Size((outputs, in_group, *taps)), keep, groups, options, drawn, CONV)


def check(op, args, kwargs, isa, large):
    before = _native.C.cpu_isa(), onednn._LEAST_LINEAR, onednn._LEAST_CONV
    try:
        _native.C.cpu_use_isa(isa)
        if large:
            onednn._LEAST_LINEAR = onednn._LEAST_CONV = 1
        y = op.fn(*args, **kwargs)
        expected = expect(op, args, kwargs)
        assert_close(y, expected)
        assert layout(y) == layout(op.fn(*(a if a is None else a.to("meta") for a in args), **kwargs))
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype)
        if args[0].dtype is torch.float32:
            found = grads(op.fn, args, kwargs, cotangent)
            for position, grad in expect_grads(op, args, kwargs, cotangent).items():
                assert_close(found[position], grad)
    finally:
        _native.C.cpu_use_isa(before[0])
        onednn._LEAST_LINEAR, onednn._LEAST_CONV = before[1:]


@settings(max_examples=150)
@given(linears(), st.sampled_from(ISAS), st.booleans())
def test_channel_linear(layer, isa, large):
    check(LINEAR, *layer, isa, large)


@settings(max_examples=300)
@given(convs(), st.sampled_from(ISAS), st.booleans())
def test_channel_conv(layer, isa, large):
    check(CONV, *layer, isa, large)
