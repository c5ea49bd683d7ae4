"""Properties over generated shapes, strides, paddings, dilations and groups: each draw is another layer."""

import pytest
import torch
from conftest import ISAS
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparseops import _native
from sparseops.formats import NM24
from sparseops.formats.nm24 import is_24, pack_columns, unpack_columns
from sparseops.ops import REGISTRY
from sparseops.testing import assert_close, expect, expect_grads, grads

LINEAR, CONV = REGISTRY["nm24_linear"], REGISTRY["nm24_conv"]
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
ACTIVATIONS = st.sampled_from(["none", "relu", "silu", "gelu"])
SEEDS = st.integers(0, 2**31)


def size(most):
    """Sizes up to ``most``, half of them close to a multiple of 8, where tiles end."""
    near = st.builds(lambda n, by: 8 * n + by, st.integers(0, most // 8), st.integers(-1, 1))
    return st.one_of(st.integers(1, most), near.filter(lambda n: 0 < n <= most))


def pair(strategy):
    return st.tuples(strategy, strategy)


@st.composite
def layouts(draw, shape):
    """Values of ``shape`` with a drawn order of dimensions, somewhere inside a larger tensor of NaN."""
    order = draw(st.permutations(range(len(shape))))
    margins = [draw(st.sampled_from([(0, 0), (0, 0), (0, 1), (1, 2)])) for _ in shape]
    generator = torch.Generator().manual_seed(draw(SEEDS))
    dtype = draw(DTYPES)
    frame = [n + before + after for n, (before, after) in zip(shape, margins, strict=True)]
    outer = torch.full([frame[dim] for dim in order], torch.nan, dtype=dtype)
    x = outer.permute([order.index(dim) for dim in range(len(shape))])
    for dim, (n, (before, _)) in enumerate(zip(shape, margins, strict=True)):
        x = x.narrow(dim, before, n)
    return x.copy_(torch.randn(shape, generator=generator))


def weight_of(shape, dtype, seed, density):
    """A random 2:4 weight in which a share of the groups is emptied."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < density)
    return NM24.from_dense(w.to(dtype), prune="magnitude")


@st.composite
def linears(draw):
    in_features, out_features = draw(size(150)), draw(size(90))
    lead = draw(st.one_of(st.tuples(size(70)), st.just(()), st.tuples(st.integers(1, 3), st.integers(1, 9))))
    x = draw(layouts((*lead, in_features)))
    weight = weight_of((out_features, in_features), x.dtype, draw(SEEDS), draw(st.sampled_from([1.0, 0.3])))
    bias = torch.randn(out_features).to(x.dtype) if draw(st.booleans()) else None
    return (x, weight.values, weight.meta, bias), {"activation": draw(ACTIVATIONS)}


@st.composite
def convs(draw):
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    channels, out_channels = groups * draw(size(40)), groups * draw(size(24))
    kernel_size = draw(pair(st.integers(1, 4)))
    dilation = draw(pair(st.integers(1, 3)))
    padding = draw(st.one_of(pair(st.integers(0, 5)), st.sampled_from(["same", "valid"])))
    stride = (1, 1) if padding == "same" else draw(pair(st.integers(1, 3)))
    spatial = draw(pair(st.integers(1, 19)))
    extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel_size, strict=True)]
    if padding != "same":
        border = (0, 0) if padding == "valid" else padding
        assume(all(n + 2 * p >= e for n, p, e in zip(spatial, border, extent, strict=True)))
    x = draw(layouts((draw(st.integers(1, 3)), channels, *spatial)))
    shape = (out_channels, channels // groups, *kernel_size)
    weight = weight_of(shape, x.dtype, draw(SEEDS), draw(st.sampled_from([1.0, 0.3])))
    bias = torch.randn(out_channels).to(x.dtype) if draw(st.booleans()) else None
    return (x, weight.values, weight.meta, bias), {
        "kernel_size": kernel_size,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "activation": draw(ACTIVATIONS),
    }


def check(op, call, isa):
    args, kwargs = call
    before = _native.C.cpu_isa()
    _native.C.cpu_use_isa(isa)
    try:
        y = op.fn(*args, **kwargs)
    finally:
        _native.C.cpu_use_isa(before)
    assert_close(y, expect(op, args, kwargs))
    return y


def check_gradients(op, call):
    args, kwargs = call
    cotangent = torch.randn(op.fn(*args, **kwargs).shape).to(args[0].dtype)
    found = grads(op.fn, args, kwargs, cotangent)
    for position, expected in expect_grads(op, args, kwargs, cotangent).items():
        assert_close(found[position], expected)


@pytest.mark.parametrize("isa", ISAS)
@given(call=linears())
@settings(max_examples=200)
def test_linear(call, isa):
    check(LINEAR, call, isa)


@pytest.mark.parametrize("isa", ISAS)
@given(call=convs())
@settings(max_examples=250)
def test_conv(call, isa):
    y = check(CONV, call, isa)
    x = call[0][0]
    assert y.is_contiguous() or y.is_contiguous(memory_format=torch.channels_last)
    if x.is_contiguous():
        assert y.is_contiguous() or min(*x.shape[1:], *y.shape[1:]) == 1


@given(call=linears())
@settings(max_examples=60)
def test_linear_gradients(call):
    check_gradients(LINEAR, call)


@given(call=convs())
@settings(max_examples=50)
def test_conv_gradients(call):
    check_gradients(CONV, call)


@given(
    shape=st.one_of(
        st.tuples(st.integers(0, 20), st.integers(0, 140)),
        st.tuples(st.integers(0, 9), st.integers(1, 40), st.integers(1, 5)),
        st.tuples(st.integers(0, 9), st.integers(1, 40), st.integers(1, 4), st.integers(1, 4)),
    ),
    seed=SEEDS,
    density=st.sampled_from([1.0, 0.5, 0.1]),
)
@settings(max_examples=150)
def test_packing(shape, seed, density):
    packed = weight_of(shape, torch.float32, seed, density)
    packed.validate()
    dense = packed.to_dense()
    assert is_24(dense)
    again = NM24.from_dense(dense)
    assert torch.equal(again.to_dense(), dense)
    assert torch.equal(unpack_columns(pack_columns(dense), shape), dense)
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < density)
    kept, dropped = dense.double().square().sum(), (w - dense).double().square().sum()
    assert kept >= dropped
    assert packed.energy_kept == (pytest.approx(float(kept / (kept + dropped))) if dropped else 1.0)
