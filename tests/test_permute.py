"""``permute_channels``: the same function, and more energy kept by 2:4, whatever goes along."""

import pytest
import torch
from permuted import (
    NOTHING,
    TOKENS,
    Language,
    RMSNorm,
    assert_same,
    checked,
    codes,
    image,
    stack,
    uneven,
)
from pruned import Net
from torch import nn

from benchmarks.networks import NETWORKS, randomise_batch_norm
from sparseops.convert import convert, explain
from sparseops.train.permute import explain_permutation, permute_channels
from sparseops.train.permute_report import Code

# layers that 2:4 prunes as they are: over a flattened grid, or beside the model's input
KEPT = {"vgg16": ["classifier.0"], "vgg16_bn": ["classifier.0"], "transformer_mlp": ["0.up", "1.up"]}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    model = randomise_batch_norm(NETWORKS[name].small())
    new, report = checked(model, NETWORKS[name].small_example(2))
    assert report.by == "torch.export"
    assert report.energy[1] > report.energy[0] + 0.005
    assert [row.name for row in report.layers if row.code is Code.KEPT] == KEPT.get(name, [])
    assert_same(new, model, NETWORKS[name].small_example(3, seed=5))


@pytest.mark.parametrize(
    "layers",
    [
        (),
        (nn.BatchNorm2d(32), nn.ReLU(inplace=True)),
        (nn.BatchNorm2d(32, affine=False), nn.Hardswish()),
        (nn.PReLU(32), nn.MaxPool2d(2)),
        (nn.PReLU(), nn.AvgPool2d(2)),
        (nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.BatchNorm2d(32)),
        (nn.ConvTranspose2d(32, 32, 2, stride=2), nn.GELU()),
        (nn.LayerNorm([32, 7, 5]),),
        (nn.Softmax(1),),
        (nn.Dropout2d(0.3), nn.Upsample(scale_factor=2)),
    ],
)
def test_what_goes_along(layers):
    model = stack(*layers)
    _, report = checked(model, image())
    found = codes(report)
    assert found["0"] is Code.DENSE
    assert all(code is Code.PERMUTED for name, code in found.items() if report[name].energy is not None)


def test_several_outputs_of_a_depthwise_channel_go_together():
    def forward(net, x):
        x = net.first(x)
        return net.last(net.depth(x)) + net.other(x)

    net = Net(
        forward,
        first=nn.Conv2d(3, 32, 1),
        depth=nn.Conv2d(32, 64, 3, padding=1, groups=32),
        last=nn.Conv2d(64, 16, 1),
        other=nn.Conv2d(32, 16, 1),
    )
    uneven(net).other.weight.data.mul_(10)
    new, report = checked(net, image())
    assert report["last"].code is report["other"].code is Code.PERMUTED
    order = [int((net.first.bias == value).nonzero()) for value in new.first.bias]
    assert torch.equal(new.depth.weight.view(32, -1), net.depth.weight.view(32, -1)[order])
    assert torch.equal(new.last.weight.view(16, 32, 2), net.last.weight.view(16, 32, 2)[:, order])


@NOTHING
def test_one_dimension_and_the_reader_of_a_flattened_norm():
    net = nn.Sequential(nn.Conv1d(3, 32, 3), nn.Flatten(), nn.BatchNorm1d(32 * 5), nn.Linear(32 * 5, 16))
    _, report = checked(stacked := uneven(net), image(4, 3, 7))
    assert codes(report)["3"] is Code.KEPT
    assert (
        report["3"].reason
        == "its groups of four are not whole channels of one tensor, so other layers decide"
    )
    assert report["0"].code is Code.DENSE
    assert len(stacked) == 4


@pytest.mark.parametrize("places", [(1, 1), (2, 2), (3, 1), (1, 5)])
def test_flattening(places):
    """A convolution decides on the order, and the linear layer's features follow in blocks."""

    def forward(net, x):
        x = net.first(x)
        return net.linear(x.flatten(1)).sum(1) + net.conv(x).flatten(1).sum(1)

    count = places[0] * places[1]
    net = Net(forward, first=nn.Conv2d(3, 32, 1), conv=nn.Conv2d(32, 64, 1), linear=nn.Linear(32 * count, 8))
    _, report = checked(uneven(net), image(2, 3, *places))
    assert report["conv"].code is Code.PERMUTED
    assert report["linear"].code is Code.PERMUTED
    assert ("so other layers decide" in report["linear"].reason) == (count > 1)


def test_a_transposed_convolution_follows():
    def forward(net, x):
        x = net.first(x)
        return net.up(x).mean((2, 3)) + net.other(x).mean((2, 3))

    layers = {"up": nn.ConvTranspose2d(32, 16, 3), "other": nn.Conv2d(32, 16, 1)}
    net = uneven(Net(forward, first=nn.Conv2d(3, 32, 1), **layers))
    new, report = checked(net, image())
    assert report["other"].code is Code.PERMUTED
    assert not torch.equal(new.up.weight, net.up.weight)


def test_a_tensor_joined_with_itself_leaves_the_order_to_others():
    def forward(net, x):
        x = net.first(x)
        return net.twice(torch.cat([x, x], 1)) + net.other(x)

    layers = {"twice": nn.Conv2d(64, 16, 1), "other": nn.Conv2d(32, 16, 1)}
    net = uneven(Net(forward, first=nn.Conv2d(3, 32, 1), **layers))
    net.other.weight.data.mul_(10)
    _, report = checked(net, image())
    assert report["other"].code is report["twice"].code is Code.PERMUTED
    assert report["twice"].reason.endswith("so other layers decide")


def test_residual_additions_share_one_order():
    def forward(net, x):
        x = net.stem(x)
        for block in (net.a, net.b):
            x = x + block(x)
        return net.head(x.mean((2, 3)))

    def block():
        return nn.Sequential(nn.Conv2d(32, 16, 1), nn.ReLU(), nn.Conv2d(16, 32, 1))

    net = uneven(Net(forward, stem=nn.Conv2d(3, 32, 1), a=block(), b=block(), head=nn.Linear(32, 8)))
    new, report = checked(net, image())
    for name in ("a.0", "a.2", "b.0", "b.2", "head"):
        assert report[name].code is Code.PERMUTED
    order = [int((net.stem.bias == value).nonzero()) for value in new.stem.bias]
    assert order != list(range(32))
    assert torch.equal(new.head.weight, net.head.weight[:, order])
    assert torch.equal(new.b[2].bias, net.b[2].bias[order])


def test_concatenation_keeps_its_parts_apart():
    def forward(net, x):
        a, b = net.a(x), net.b(x)
        return net.head(torch.cat([a, net.middle(b), b], 1).mean((2, 3)))

    net = Net(
        forward,
        a=nn.Conv2d(3, 16, 1),
        b=nn.Conv2d(3, 32, 1),
        middle=nn.Conv2d(32, 24, 1),
        head=nn.Linear(72, 8),
    )
    new, report = checked(uneven(net), image())
    assert report["head"].code is Code.PERMUTED
    assert report["middle"].code is Code.PERMUTED
    for name in ("a", "b", "middle"):
        assert sorted(new.get_submodule(name).bias.tolist()) == sorted(net.get_submodule(name).bias.tolist())
        assert new.get_submodule(name).bias.tolist() != net.get_submodule(name).bias.tolist()


def test_parts_that_lie_across_groups_of_four_follow_other_layers():
    def forward(net, x):
        a = net.a(x)
        return net.head(torch.cat([net.b(x), a], 1)).sum(1) + net.other(a).sum(1)

    net = Net(
        forward,
        a=nn.Conv2d(3, 16, 1),
        b=nn.Conv2d(3, 18, 1),
        head=nn.Conv2d(34, 8, 1),
        other=nn.Conv2d(16, 8, 1),
    )
    _, report = checked(uneven(net), image())
    assert report["other"].code is Code.PERMUTED
    assert report["head"].code is Code.PERMUTED
    assert report["head"].reason.endswith("so other layers decide")


def test_a_layer_that_follows_does_not_lose_more_than_the_others_gain():
    """``head`` reads the same channels two places further on, and alone it would be better off as it is."""

    def forward(net, x):
        a = net.a(x)
        return net.head(torch.cat([net.b(x), a], 1)).sum(1) + net.other(a).sum(1)

    net = Net(
        forward,
        a=nn.Conv2d(3, 16, 1),
        b=nn.Conv2d(3, 18, 1),
        head=nn.Conv2d(34, 8, 1),
        other=nn.Conv2d(16, 8, 1),
    )
    uneven(net)
    with torch.no_grad():
        net.other.weight.mul_(1e-4)
        net.head.weight.zero_()
        net.head.weight[:, 20::4] = 1
        net.head.weight[:, 21::4] = 1
    with pytest.warns(UserWarning, match="nothing was permuted"):
        report = explain_permutation(permute_channels(net, image()))
    assert report["other"].code is Code.BEST
    assert report["head"].energy == (1.0, 1.0)


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.LayerNorm(32),
        lambda: nn.LayerNorm(32, elementwise_affine=False),
        RMSNorm,
        lambda: nn.RMSNorm(32),
    ],
)
def test_the_stream_of_a_transformer(norm):
    _, report = checked(uneven(Language(norm, heads=4)), TOKENS)
    assert report["embed"].code is Code.DENSE
    found = {row.name: row.code for row in report.layers if row.energy is not None}
    assert found.pop("out") is Code.KEPT
    assert report["out"].reason == "a reshape divides its channels"
    assert set(found.values()) == {Code.PERMUTED}


def test_memory_format_and_dtype():
    model = stack(nn.BatchNorm2d(32)).to(memory_format=torch.channels_last).to(torch.bfloat16)
    model[0].requires_grad_(False)
    new, report = checked(model, image().bfloat16())
    assert report["2"].code is Code.PERMUTED
    assert new[2].weight.is_contiguous(memory_format=torch.channels_last)


def test_channels_that_do_not_divide_by_four():
    net = uneven(nn.Sequential(nn.Linear(5, 38), nn.ReLU(), nn.Linear(38, 8)))
    _, report = checked(net, image(3, 5))
    assert report["2"].code is Code.PERMUTED


def test_large_channels_side_by_side_are_spread():
    model = uneven(nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 16)))
    with torch.no_grad():
        model[2].weight[:, 32:] = 1e-4
        model[2].weight[:, :32] = 1.0
    new, report = checked(model, image(3, 5))
    assert report["2"].energy[0] == pytest.approx(0.5, abs=1e-6)
    assert report["2"].energy[1] == pytest.approx(1.0, abs=1e-6)
    assert ((new[2].weight == 1).view(16, -1, 4).sum(2) == 2).all()
    assert (
        report["2"].reason
        == f"{sum(a != b for a, b in zip(new[0].bias, model[0].bias, strict=True))} of 64 moved"
    )


def test_convert_keeps_what_the_report_says():
    model = uneven(nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 16)))
    new = permute_channels(model, image(3, 5))
    energy = explain_permutation(new)["2"].energy
    for its, expected in ((model, energy[0]), (new, energy[1])):
        assert explain(convert(its))["2"].energy_kept == pytest.approx(expected, abs=1e-6)


@NOTHING
def test_it_is_the_same_each_time_and_once_is_enough():
    model, x = stack(nn.BatchNorm2d(32)), image()
    first, second = (permute_channels(model, x) for _ in range(2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    before = explain_permutation(first).energy
    again = explain_permutation(permute_channels(first, x)).energy
    assert again[0] == pytest.approx(before[1])
    assert again[1] < before[1] + 0.2 * (before[1] - before[0])
