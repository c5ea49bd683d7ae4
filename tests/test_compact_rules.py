"""How channels go through each kind of op: exactness at the edges of each rule, and what is left."""

import pytest
import torch
from pruned import HALF, Fn, Net, assert_same, check, conv, drop, image, outputs_of, randomise
from torch import nn

from sparseops.compact import compact
from sparseops.compact.report import Code
from sparseops.nn import SparseConv2d, SparseEmbedding

# What lies between a layer and the next, channel by channel: None where its constants are not known.
BETWEEN = {
    "nothing": nn.Identity(),
    "relu": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(),
    "leaky relu": nn.LeakyReLU(0.3),
    "elu": nn.ELU(),
    "celu": nn.CELU(),
    "selu": nn.SELU(),
    "gelu": nn.GELU(),
    "gelu by tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    "hard swish": nn.Hardswish(),
    "hard sigmoid": nn.Hardsigmoid(),
    "hard tanh": nn.Hardtanh(-0.3, 0.4),
    "sigmoid": nn.Sigmoid(),
    "log sigmoid": nn.LogSigmoid(),
    "softplus": nn.Softplus(),
    "softsign": nn.Softsign(),
    "tanh": nn.Tanh(),
    "tanh shrink": nn.Tanhshrink(),
    "soft shrink": nn.Softshrink(0.1),
    "hard shrink": nn.Hardshrink(0.1),
    "threshold": nn.Threshold(0.1, 0.7),
    "clamp": Fn(lambda x: x.clamp(-0.2, 0.3)),
    "round": Fn(lambda x: (x * 3).round()),
    "arithmetic": Fn(lambda x: 1 - (x * 2 + 3) / 5 - x**2),
    "abs, exp, sqrt": Fn(lambda x: x.abs().exp().sqrt() - (1 + x.square()).rsqrt()),
    "log, sin, cos, erf": Fn(lambda x: (2 + x.abs()).log() + x.sin() - x.cos() + x.erf()),
    "floor, ceil, negative": Fn(lambda x: -x.floor() + (2 * x).ceil()),
    "reciprocal": Fn(lambda x: (3 + x.abs()).reciprocal()),
    "batch norm": nn.BatchNorm2d(16),
    "batch norm without scale": nn.BatchNorm2d(16, affine=False),
    "prelu": nn.PReLU(16),
    "prelu of one slope": nn.PReLU(),
    "dropout": nn.Dropout(),
    "dropout of channels": nn.Dropout2d(),
    "alpha dropout": nn.AlphaDropout(),
    "max pool": nn.MaxPool2d(3, 2, 1),
    "average pool": nn.AvgPool2d(2),
    "average pool with uneven border": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "average pool, ceil mode": nn.AvgPool2d(2, ceil_mode=True),
    "adaptive pool": nn.AdaptiveAvgPool2d(3),
    "nearest": nn.Upsample(scale_factor=2),
    "bilinear": nn.Upsample(scale_factor=2, mode="bilinear"),
    "bicubic": nn.Upsample(scale_factor=2, mode="bicubic", align_corners=True),
    "reflection": nn.ReflectionPad2d(1),
    "replication": nn.ReplicationPad2d((1, 0, 2, 1)),
    "clone": Fn(lambda x: x.clone().contiguous().detach()),
    "cast": Fn(lambda x: x.float().double()),
    "flatten and back": Fn(lambda x: x.flatten(2).view(x.shape)),
    "channels last": Fn(lambda x: x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2)),
    "transposed": Fn(lambda x: x.transpose(1, 3).transpose(-1, 1)),
    "sliced image": Fn(lambda x: x[:, :, 1:, ::2]),
    "picture by picture": Fn(lambda x: x.select(0, 1).unsqueeze(0)),
    "side by side": Fn(lambda x: torch.cat([x, x], 3)),
    "with itself": Fn(lambda x: torch.maximum(x, x.sigmoid()) * x - torch.minimum(x.tanh(), x)),
}


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
@pytest.mark.parametrize("padding", [0, 1])
def test_between(between, padding):
    model = nn.Sequential(conv(), between, nn.Conv2d(16, 8, 3, padding=padding))
    small, report = check(model, image(2, 3, 13, 11))
    assert outputs_of(report, "0") == (16, 8)
    assert type(small[0]) is nn.Conv2d
    assert report.edge("0", "2").code is Code.COMPACTED
    padded = getattr(small[2], "layer", small[2])
    assert padded.weight.shape == (8, 8, 3, 3)


def test_constants_are_folded():
    model = randomise(nn.Sequential(conv(), nn.Conv2d(16, 8, 3, bias=False), nn.Conv2d(8, 8, 3, padding=2)))
    small, report = check(model, image())
    assert small[1].bias is not None
    assert "8 constant inputs folded" in report["1"].reason
    assert type(small[2]) is nn.Conv2d, "nothing to fold"


def test_constants_that_are_zero_ask_for_no_bias():
    model = nn.Sequential(conv(bias=False), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1, bias=False))
    small, _ = check(model, image())
    assert small[2].bias is None
    assert type(small[2]) is nn.Conv2d


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 2, "dilation": 2},
        {"padding": (0, 2), "kernel_size": (1, 5), "stride": (1, 2)},
        {"padding": "same", "kernel_size": 4},
        {"padding": "valid"},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": "same", "padding_mode": "replicate"},
        {"padding": 5},
    ],
    ids=str,
)
def test_folding_at_the_border(options):
    last = nn.Conv2d(16, 8, **{"kernel_size": 3, **options})
    _, report = check(nn.Sequential(conv(), nn.Sigmoid(), last), image())
    if options.get("padding_mode") != "circular":
        assert outputs_of(report, "0") == (16, 8)


def test_unbatched_image():
    small, _ = check(nn.Sequential(conv(), nn.Conv2d(16, 8, 3, padding=1)), image(3, 9, 7))
    assert small[0].weight.shape[0] == 8
    assert small[1](image(8, 5, 5)).shape == (8, 5, 5)


def test_sound():
    first = drop(nn.Conv1d(4, 16, 3, padding=1), HALF)
    model = nn.Sequential(
        first, nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(2), nn.Conv1d(16, 8, 5, padding=2)
    )
    _, report = check(model, image(2, 4, 20))
    assert report.edge("0", "4").code is Code.COMPACTED


def test_volume():
    first = nn.Conv3d(2, 16, 3)
    with torch.no_grad():
        randomise(first).weight[:8] = 0
    model = (
        nn.Sequential(first, nn.BatchNorm3d(16), nn.ReLU(), nn.Conv3d(16, 4, 3, padding=1)).double().eval()
    )
    small = compact(model, x := image(1, 2, 5, 5, 5))
    assert_same(small, model, x)
    assert small[0].weight.shape[0] == 8


def test_linear_layers_over_three_dimensions():
    model = nn.Sequential(drop(nn.Linear(12, 32), range(8, 24)), nn.GELU(), nn.Dropout(), nn.Linear(32, 5))
    small, report = check(model, image(2, 7, 12))
    assert small[3].weight.shape == (5, 16)
    assert report.edge("0", "3").channels == (32, 16)


def test_flattened_channels_are_blocks_of_features():
    model = nn.Sequential(conv(), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 35, 6))
    small, _ = check(model, image())
    assert small[3].weight.shape == (6, 8 * 35)


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: x.view(x.shape[0], -1),
        lambda x: x.reshape(len(x), -1),
        lambda x: x.mean((2, 3)),
        lambda x: x.amax((-1, -2)),
        lambda x: x.mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1),
        lambda x: x.mean(3)[:, :, 0],
        lambda x: x.permute(0, 2, 3, 1),
        lambda x: x.flatten(2).transpose(1, 2),
    ],
    ids=range(8),
)
def test_from_convolution_to_linear(flatten):
    x = image()
    features = flatten(nn.Conv2d(3, 16, 3)(x.float())).shape[-1]
    _, report = check(nn.Sequential(conv(), Fn(flatten), nn.Linear(features, 6)), x)
    assert report.edge("0", "2").code is Code.COMPACTED


def test_embedding_columns_that_nobody_reads():
    table = nn.Embedding(10, 32)
    model = randomise(nn.Sequential(table, drop(nn.Linear(32, 8), inputs=range(16))))
    words = torch.tensor([[1, 5, 9], [0, 0, 3]])
    small = compact(model, words)
    assert_same(small, model, words)
    assert small[0].weight.shape == (10, 16)
    assert small[0].embedding_dim == 16
    assert type(small[1]) is nn.Linear


def test_sparse_embedding():
    words = torch.tensor([[1, 5, 9], [0, 0, 3]])
    model = randomise(nn.Sequential(drop(nn.Embedding(10, 32), range(8, 24)), nn.Sigmoid(), nn.Linear(32, 8)))
    small = compact(model, words)
    assert_same(small, model, words)
    assert type(small[0]) is nn.Embedding
    assert small[2].weight.shape == (8, 16)
    other = nn.Embedding(10, 32)
    both = Net(
        lambda net, x: net.out(net.a(x) + net.b(x)),
        a=drop(nn.Embedding(10, 32), range(8)),
        b=drop(other, range(4, 12)),
        out=nn.Linear(32, 4),
    )
    randomise(both)
    small = compact(both, words)
    assert_same(small, both, words)
    assert type(small.a) is SparseEmbedding
    assert small.a.weight_shape == (10, 12)


def test_outputs_that_nobody_reads_are_cut():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), drop(nn.Conv2d(16, 8, 3), inputs=range(4, 12))
    )
    small, report = check(model, image())
    assert small[0].weight.shape == (8, 3, 3, 3)
    assert small[1].num_features == 8
    assert report.edge("0", "2").code is Code.COMPACTED


def test_several_readers():
    def forward(net, x):
        y = net.first(x)
        return net.a(y).relu() + net.b(y.tanh())

    first = nn.Conv2d(3, 16, 3)
    a, b = (drop(nn.Conv2d(16, 8, 3), inputs=index) for index in (range(4), range(2, 8)))
    small, report = check(Net(forward, first=first, a=a, b=b), image())
    assert small.first.weight.shape[0] == 8
    assert report.edge("first", "a").reason == "a reads 4 of 8"


def residual(a, b, **layers):
    return Net(lambda net, x: net.out(net.a(x) + net.b(x)), a=a, b=b, out=nn.Conv2d(16, 4, 3), **layers)


def test_a_join_brings_the_channels_of_both():
    model = residual(conv(kept=range(4)), conv(kept=range(2, 8)))
    small, report = check(model, image())
    assert small.a(image()).shape[1] == small.b(image()).shape[1] == 8
    assert report["a"].code is report["b"].code is Code.JOINED
    assert report.edge("a", "out").reason == "another tensor that it meets has them"


def test_a_join_keeps_or_unites():
    """A scatter of many outputs that cost much is kept; zeros are computed where they are few and cheap."""
    cheap = residual(conv(inputs=3, kernel=1, kept=range(14)), conv(kernel=1, kept=range(1, 15)))
    small, report = check(cheap, image())
    assert type(small.a) is nn.Conv2d
    assert "united with zeros" in report["a"].reason
    dear = residual(conv(inputs=96, kernel=5, kept=range(2)), conv(inputs=96, kernel=5, kept=range(1, 16)))
    small, report = check(dear, image(1, 96, 9, 9))
    assert type(small.a) is SparseConv2d
    assert small.a.weight_shape == (16, 96, 5, 5)
    assert report["a"].reason == "keeps its scatter: 2 of 16 outputs"


def test_a_join_of_equal_channels_compacts():
    small, report = check(residual(conv(), conv()), image())
    assert type(small.a) is type(small.b) is nn.Conv2d
    assert report.edge("a", "out").code is report.edge("b", "out").code is Code.COMPACTED


def test_a_join_with_the_input_keeps_all():
    model = Net(lambda net, x: net.out(x + net.a(x)), a=conv(16, padding=1), out=nn.Conv2d(16, 4, 3))
    small, report = check(model, image(2, 16, 9, 9))
    assert outputs_of(report, "a") == (16, 16)
    assert type(small.a) is SparseConv2d
    assert report.edge("a", "(add)").code is Code.KEPT
    assert report.edge("a", "(add)").reason == "add meets a tensor whose channels are not known"


def test_squeeze_and_excite():
    def forward(net, x):
        y = net.first(x)
        return net.out(y * net.up(net.down(y.mean((2, 3), keepdim=True)).relu()).sigmoid())

    layers = {
        "first": conv(),
        "down": nn.Conv2d(16, 4, 1),
        "up": nn.Conv2d(4, 16, 1),
        "out": nn.Conv2d(16, 4, 3),
    }
    _, report = check(Net(forward, **layers), image())
    assert outputs_of(report, "first") == (16, 16), "the scale varies, so the product does"
    layers["first"] = conv(bias=False)
    small, report = check(Net(forward, **layers), image())
    assert outputs_of(report, "first") == outputs_of(report, "up") == (16, 8), "zero times anything is zero"
    assert small.up.weight.shape == (8, 4, 1, 1)


def test_one_map_for_all_channels():
    model = Net(
        lambda net, x: net.out(net.first(x) * net.map(x).sigmoid()),
        first=conv(bias=False),
        map=nn.Conv2d(3, 1, 3),
        out=nn.Conv2d(16, 4, 3),
    )
    small, _ = check(model, image())
    assert small.first.weight.shape[0] == 8
    model.first = conv()
    _, report = check(model, image())
    assert outputs_of(report, "first") == (16, 16)


def test_concatenation_of_different_blocks():
    model = Net(
        lambda net, x: net.out(torch.cat([net.a(x), net.b(x), x[:, :, 1:-1, 1:-1]], 1)),
        a=conv(kept=range(4)),
        b=conv(kept=range(8, 16)),
        out=nn.Conv2d(35, 4, 3),
    )
    small, report = check(model, image())
    assert small.out.weight.shape[1] == 4 + 8 + 3
    assert report.edge("a", "out").code is report.edge("b", "out").code is Code.COMPACTED


def test_stacking_where_constants_differ():
    model = Net(
        lambda net, x: net.out(torch.cat([net.a(x), net.b(x)], 2)),
        a=conv(),
        b=conv(),
        out=nn.Conv2d(16, 4, 3),
    )
    _, report = check(model, image())
    assert outputs_of(report, "a") == (16, 16)
    model.b = model.a
    _, report = check(
        Net(lambda net, x: net.out(torch.cat([net.a(x)] * 2, 2)), a=conv(), out=model.out), image()
    )
    assert outputs_of(report, "a") == (16, 8)
