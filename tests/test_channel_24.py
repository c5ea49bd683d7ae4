"""Channel-pruned layers whose compact weight is 2:4."""

import pytest
import torch
from conftest import Wrapper, layout
from torch.nn.functional import conv2d, linear

from sparseops import _native
from sparseops.formats import NM24, ChannelPruned, Keep
from sparseops.ops import REGISTRY, registry
from sparseops.ops.common import activate

OPS = LINEAR, CONV = [REGISTRY["channel_linear"], REGISTRY["channel_conv"]]
every_channel_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
pytestmark = pytest.mark.skipif(_native.emulated is not None, reason="the CPU stands for a GPU")


def of_24(op, dtype, groups=1, **options):
    """Arguments of a layer of 70 inputs and 40 outputs, and its dense weight in float64."""
    generator = torch.Generator().manual_seed(groups)
    shape = (40, 70) if op is LINEAR else (40, 72 // groups, 3, 3)
    keep = Keep(torch.arange(4, 60), torch.tensor([i for i in range(40) if i // 8 in (0, 2, 3)]), nm24=True)
    w = (torch.randn(shape, generator=generator) / 20).to(dtype)
    packed = ChannelPruned.from_dense(w, prune=keep, groups=groups)
    bias = torch.randn(40, generator=generator).to(dtype)
    x = torch.randn((5, 70) if op is LINEAR else (2, 72, 6, 7), generator=generator).to(dtype)
    options |= {"outputs": 40, "meta": packed.meta}
    if op is CONV:
        options |= {"kernel_size": 3, "padding": 1, "groups": groups}
    return [x, packed.values, packed.in_index, packed.out_index, bias], options, packed.to_dense().double()


def dense_of(op, args, weight, kwargs, residual=None):
    x, bias = args[0].double(), args[4].double()
    z = (
        linear(x, weight, bias)
        if op is LINEAR
        else conv2d(x, weight, bias, padding=1, groups=kwargs["groups"])
    )
    return activate(z if residual is None else z + residual.double(), kwargs.get("activation", "none"))


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-10}


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("op", "groups"), [(LINEAR, 1), (CONV, 1), (CONV, 2)], ids=["linear", "conv", "groups"]
)
@pytest.mark.filterwarnings("ignore:.*plain torch reference")
def test_of_24(op, groups, dtype, with_residual, activation, monkeypatch):
    args, kwargs, weight = of_24(op, dtype, groups, activation=activation)
    y = op.reference(*args, **kwargs)
    residual = torch.randn(y.shape).to(dtype) if with_residual else None
    expected = dense_of(op, args, weight, kwargs, residual)
    results = [op.fn(*args, residual, **kwargs)]
    monkeypatch.setattr(registry, "FAST", False)
    results += [op.fn(*args, residual, **kwargs), op.reference(*args, residual, **kwargs)]
    for result in results:
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
        assert layout(result) == layout(y)


@pytest.mark.parametrize(
    ("op", "groups"), [(LINEAR, 1), (CONV, 1), (CONV, 2)], ids=["linear", "conv", "groups"]
)
@pytest.mark.filterwarnings("ignore:.*plain torch reference")
def test_gradients_of_24(op, groups):
    args, kwargs, _ = of_24(op, torch.float64, groups, activation="gelu")
    leaves = [arg.requires_grad_() if arg.is_floating_point() else arg for arg in args]

    def fn(x, values, bias):
        return op.fn(x, values, *args[2:4], bias, **kwargs)

    given = [leaf for leaf in leaves if leaf.requires_grad]
    assert torch.autograd.gradcheck(fn, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(fn, given, fast_mode=True)
    grads = torch.autograd.grad(fn(*given).square().sum(), given)
    wanted = torch.autograd.grad(op.reference(*leaves, **kwargs).square().sum(), given)
    for grad, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, expected)


@every_channel_op
def test_of_24_compiled_exported_and_cast(op):
    args, kwargs, _ = of_24(op, torch.float32)
    layer = Wrapper(op, args, kwargs)
    y = layer(args[0])
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(args[0]), y)
    program = torch.export.export(layer, (args[0],)).module()
    torch.testing.assert_close(program(args[0]), y)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(args[0])
    assert low.dtype is torch.bfloat16
    torch.testing.assert_close(low.float(), y, rtol=3e-2, atol=3e-2)
    each = torch.vmap(lambda x: op.fn(x, *args[1:], **kwargs))(torch.stack([args[0], -args[0]]))
    torch.testing.assert_close(each[0], y)


def test_of_24_is_nm24():
    """Of the same values."""
    args, kwargs, _ = of_24(LINEAR, torch.float32)
    x, values, in_index, out_index, bias = args
    z = NM24(values, kwargs["meta"], (len(out_index), len(in_index))).to_dense()
    y = LINEAR.fn(*args, **kwargs)
    torch.testing.assert_close(
        y[:, out_index.long()], linear(x[:, in_index.long()], z, bias[out_index.long()])
    )
    others = [i for i in range(40) if i not in out_index.tolist()]
    assert torch.equal(y[:, others], bias[others].expand(5, -1))


@every_channel_op
def test_empty_of_24(op):
    args, kwargs, _ = of_24(op, torch.float32)
    assert op.fn(args[0][:0], *args[1:], **kwargs).shape[0] == 0
