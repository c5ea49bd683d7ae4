"""``permute_channels``: the same function, more energy kept by 2:4, and why channels stay."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_untouched, state
from pruned import Net
from torch import nn
from torch.nn.utils import parametrize

from benchmarks.networks import NETWORKS, randomise_batch_norm
from sparseops.convert import convert, explain
from sparseops.prune import Channels, Plan
from sparseops.train import spaces
from sparseops.train.permute import explain_permutation, permute_channels
from sparseops.train.permute_report import Code


@torch.no_grad()
def uneven(model, seed=0):
    """``model`` itself in evaluation mode, every number of it random, and the channels of each weight of very
    different sizes: there is something to gain."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
            if tensor.ndim > 1:
                tensor.mul_(
                    torch.randn(tensor.shape[1], generator=generator)
                    .exp()
                    .view(1, -1, *[1] * (tensor.ndim - 2))
                )
                tensor.div_(tensor[0].numel() ** 0.5)
        if name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()


@torch.no_grad()
def assert_same(new, model, *args):
    """Element by element in float64."""
    wide = [x.double() if x.is_floating_point() else x for x in args]
    found, expected = (copy.deepcopy(m).double()(*wide) for m in (new, model))
    scale = float(expected.abs().max())
    assert scale > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * scale)


def share_kept(module):
    """Of the squared weight what 2:4 keeps, one four at a time, in float64."""
    kept = total = 0.0
    for weight in (p for p in module.parameters() if p.ndim >= 2):
        for row in weight.detach().double().movedim(1, -1).flatten(0, -2).square().tolist():
            total += sum(row)
            for start in range(0, len(row), 4):
                kept += sum(sorted(row[start : start + 4], reverse=True)[:2])
    return kept / total


def checked(model, *args, plan="2:4"):
    """The permuted model, after the checks that hold for any, and its report."""
    before = state(model)
    new = permute_channels(model, args, plan)
    assert_untouched(model, before)
    assert_same(new, model, *args)
    old_modules, new_modules = dict(model.named_modules()), dict(new.named_modules())
    assert {n: type(m) for n, m in old_modules.items()} == {n: type(m) for n, m in new_modules.items()}
    theirs = {tensor.data_ptr() for tensor in model.state_dict().values() if tensor.numel()}
    for name, tensor in new.state_dict(keep_vars=True).items():
        old = model.state_dict(keep_vars=True)[name]
        assert (tensor.shape, tensor.stride(), tensor.dtype) == (old.shape, old.stride(), old.dtype)
        assert tensor.requires_grad == old.requires_grad and type(tensor) is type(old)
        assert not tensor.numel() or tensor.data_ptr() not in theirs
    report = explain_permutation(new)
    assert report.energy[1] >= report.energy[0]
    for row in report.layers:
        if row.energy is not None:
            assert row.energy[0] == pytest.approx(share_kept(old_modules[row.name]))
            assert row.energy[1] == pytest.approx(share_kept(new_modules[row.name]))
        assert (row.code is Code.DENSE) == (row.energy is None)
    return new, report


def codes(report):
    return {row.name: row.code for row in report.layers}


NOTHING = pytest.mark.filterwarnings("ignore:permute_channels. nothing was permuted")


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    model = randomise_batch_norm(NETWORKS[name].small())
    new, report = checked(model, NETWORKS[name].small_example(2))
    assert report.by == "torch.export"
    assert report.energy[1] > report.energy[0] + 0.005
    kept = {row.name for row in report.layers if row.code is Code.KEPT}
    assert kept == {"transformer_mlp": {"0.up", "1.up"}, "mobilenet_v2": kept}.get(
        name, kept & FLATTENED[name]
    )
    assert_same(new, model, NETWORKS[name].small_example(3, seed=5))


FLATTENED = {name: {"classifier.0"} for name in NETWORKS}


def image(*shape):
    return torch.randn(shape or (2, 3, 9, 7), generator=torch.Generator().manual_seed(1))


def stack(*layers, start=3):
    """A convolution, these layers over 32 channels, and two convolutions that read them."""
    return uneven(
        nn.Sequential(nn.Conv2d(start, 32, 3), *layers, nn.Conv2d(32, 16, 3, padding=1), nn.Conv2d(16, 8, 1))
    )


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


class Block(nn.Module):
    """Of a transformer without attention between the heads' views: normalised, and scaled per channel."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.up, self.down = norm, nn.Linear(32, 64), nn.Linear(64, 32)
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, x):
        return x + self.scale * self.down(F.gelu(self.up(self.norm(x))))


class RMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, x):
        return self.weight * (x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt())


class Language(nn.Module):
    def __init__(self, norm=lambda: nn.LayerNorm(32), heads=1):
        super().__init__()
        self.embed, self.place = nn.Embedding(11, 32), nn.Parameter(torch.ones(1, 6, 32))
        self.blocks = nn.Sequential(*[Block(norm()) for _ in range(2)])
        self.query, self.out = nn.Linear(32, 32), nn.Linear(32, 32)
        self.heads, self.norm, self.head = heads, norm(), nn.Linear(32, 40)

    def forward(self, tokens):
        x = self.blocks(self.embed(tokens) + self.place)
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        x = x + self.out(F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2))
        return self.head(self.norm(x))


TOKENS = torch.arange(12).view(2, 6) % 11


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


# What stays


class Grouped(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.flip(1))


def hooked(layer):
    layer.register_forward_hook(lambda *_: None)
    return layer


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    return layer


STAYS = {
    "unknown op": ((Net(lambda net, x: x.cumsum(1)),), "cumsum reads every channel"),
    "groups": ((nn.Conv2d(32, 32, 3, padding=1, groups=4),), "1 reads its channels by groups"),
    "hook": ((hooked(nn.BatchNorm2d(32)),), "1: hooks see its channels"),
    "subclass": ((Grouped(32, 32, 1),), "1: Grouped is no kind of layer that can be cut"),
    "parametrization": (
        (parametrized(nn.Conv2d(32, 32, 1)),),
        "1.parametrizations.weight: ParametrizationList is no kind of layer that can be cut",
    ),
    "group norm": ((nn.GroupNorm(4, 32),), "group_norm reads every channel"),
    "shuffle": ((nn.ChannelShuffle(4),), "channel_shuffle reads every channel"),
    "a constant per channel": (
        (Net(lambda net, x: x * torch.arange(32.0, dtype=x.dtype).view(-1, 1, 1)),),
        "mul meets a tensor whose channels are not known",
    ),
    "halves": ((Net(lambda net, x: torch.cat(x.chunk(2, 1)[::-1], 1)),), "chunk reads every channel"),
}


@NOTHING
@pytest.mark.parametrize(("layers", "reason"), STAYS.values(), ids=STAYS)
def test_what_stays(layers, reason):
    model = uneven(nn.Sequential(nn.Conv2d(3, 32, 3), *layers, nn.Conv2d(32, 16, 3)))
    new, report = checked(model, image())
    name = str(len(layers) + 1)
    assert report[name].code is Code.KEPT
    assert report[name].reason == reason
    for key in ("0.weight", f"{name}.weight"):
        assert torch.equal(new.state_dict()[key], model.state_dict()[key])


@NOTHING
@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda net, x: net.b(x), "it reads the model's input"),
        (lambda net, x: net.b(F.relu(x)), "it reads the model's input"),
        (lambda net, x: net.b(F.layer_norm(x, (32,))), "it reads the model's input"),
        (lambda net, x: net.b(x + net.a(x)), "add meets a tensor whose channels are not known"),
        (lambda net, x: (y := net.a(x), net.b(y)), "the model returns it"),
        (
            lambda net, x: net.b(net.a(net.a(x))),
            "a: it is called more than once, or its weight is read elsewhere",
        ),
        (lambda net, x: net.b(net.a(x) * net.a.bias), "mul meets a tensor whose channels are not known"),
        (lambda net, x: net.a(x), "it is not called on the example"),
        (lambda net, x: net.b(F.max_pool1d(net.a(x), 3, 1, 1)), "max_pool1d reads every channel"),
        (lambda net, x: net.b(net.a(x).cumsum(-1) @ net.a.weight), "matmul reads every channel"),
    ],
)
def test_why_a_layer_keeps_its_order(forward, reason):
    net = uneven(Net(forward, a=nn.Linear(32, 32), b=nn.Linear(32, 8)))
    x = image(3, 32)
    permuted = permute_channels(net, x)
    report = explain_permutation(permuted)
    assert report["b"].code is Code.KEPT
    assert report["b"].reason == reason
    for name, tensor in permuted.state_dict().items():
        assert torch.equal(tensor, net.state_dict()[name])


@NOTHING
def test_tied_weights_stay():
    model = uneven(Language())
    model.head = nn.Linear(32, 11, bias=False)
    model.head.weight = model.embed.weight
    new, report = checked_tied(model)
    assert new.head.weight is new.embed.weight
    assert report["blocks.0.up"].code is Code.KEPT
    assert report["blocks.0.down"].code is Code.PERMUTED
    assert report["blocks.0.up"].reason.startswith("head: another module holds the same tensor")


def checked_tied(model):
    new = permute_channels(model, TOKENS)
    assert_same(new, model, TOKENS)
    return new, explain_permutation(new)


@NOTHING
def test_recurrent_layers_stay():
    def forward(net, x):
        return net.head(net.lstm(net.first(x))[0])

    net = uneven(Net(forward, first=nn.Linear(8, 32), lstm=nn.LSTM(32, 32), head=nn.Linear(32, 8)))
    report = explain_permutation(permute_channels(net, image(3, 2, 8)))
    assert report["lstm"].code is Code.KEPT
    assert report["lstm"].reason == "LSTM is no kind of layer that can be cut"
    assert report["lstm"].energy[0] == pytest.approx(share_kept(net.lstm))
    assert report["head"].code is Code.KEPT


@pytest.mark.filterwarnings("ignore:nm24_linear. there is no kernel")
def test_sparse_layers_stay():
    model = uneven(nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 8)))
    for pattern in ("2:4", Channels(ratio=0.5, keep_last=False)):
        mixed = convert(model, pattern, include="1")
        new = permute_channels(mixed, image(3, 8))
        assert_same(new, mixed, image(3, 8))
        report = explain_permutation(new)
        assert report["1"].code is Code.DENSE
        assert report["2"].code is Code.KEPT
        assert report["3"].code is Code.PERMUTED


def test_some_channels_stay():
    def forward(net, x):
        y = torch.cat([net.a(x), x], -1)
        return net.b(y)

    net = Net(forward, a=nn.Linear(32, 32), b=nn.Linear(64, 8))
    _, report = checked(uneven(net), image(3, 32))
    assert report["b"].code is Code.PERMUTED
    assert report["b"].reason.endswith(" of 64 moved; some stay: args_0 has all its channels")


# The plan


def test_a_plan_says_which_layers_count():
    model = uneven(nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)]))
    plan = Plan({"1": "2:4", "2": Channels(), "3": None})
    new, report = checked(model, image(3, 32), plan=plan)
    assert [row.name for row in report.layers] == ["1"]
    assert report["1"].code is Code.PERMUTED
    assert torch.equal(new[3].weight, model[3].weight)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            {"model": 3},
            TypeError,
            "permute_channels: model must be a torch.nn.Module that is no TorchScript, got int",
        ),
        ({"example_inputs": 3}, TypeError, "permute_channels: example_inputs must be .* got int"),
        ({"plan": "2:4t"}, ValueError, "permute_channels: plan must be \"2:4\" or a Plan, got '2:4t'"),
        (
            {"plan": Plan({"no": "2:4"})},
            ValueError,
            "permute_channels: plan must match at least one module .*'no'",
        ),
        ({"seconds": 0}, ValueError, "permute_channels: seconds must be positive or None, got 0"),
        (
            {"example_inputs": torch.ones(3, 9)},
            RuntimeError,
            "permute_channels: model must run on example_inputs, got R",
        ),
    ],
)
def test_errors(arguments, error, words):
    model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8))
    with pytest.raises(error, match=words):
        permute_channels(**{"model": model, "example_inputs": torch.ones(3, 8), **arguments})


def test_a_graph_that_lies_is_found_out(monkeypatch):
    monkeypatch.setitem(spaces._MORE_RULES, "cumsum", spaces._MORE_RULES["softmax"])
    model = uneven(nn.Sequential(nn.Linear(8, 32), Net(lambda net, x: x.cumsum(-1)), nn.Linear(32, 8)))
    before = state(model)
    with pytest.raises(RuntimeError, match="permute_channels: model must compute the same .* wrong elements"):
        permute_channels(model, image(3, 8))
    assert_untouched(model, before)


def test_a_model_without_a_graph_is_copied():
    def forward(net, x):
        return net.b(net.a(x)) if float(x.sum()) > -1e9 else x

    net = uneven(Net(forward, a=nn.Linear(8, 32), b=nn.Linear(32, 8)))
    with pytest.warns(
        UserWarning, match="permute_channels: nothing was permuted in Net .its graph cannot be drawn"
    ):
        new = permute_channels(net, image(3, 8))
    report = explain_permutation(new)
    assert new is not net
    assert report.reason.startswith("its graph cannot be drawn (torch.export: ")
    assert report["b"].code is Code.KEPT
    assert report["b"].energy[0] == report["b"].energy[1] == pytest.approx(share_kept(net.b))
    assert str(report).startswith("Net: unchanged: its graph cannot be drawn")


def test_nothing_to_permute_is_said_once():
    model = uneven(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)))
    with pytest.warns(
        UserWarning, match="nothing was permuted in Sequential; explain_permutation.model. says why"
    ) as all:
        report = explain_permutation(permute_channels(model, image(3, 8)))
    assert len(all) == 1
    assert report.energy == (1.0, 1.0)
    assert report["1"].code is Code.DENSE
    assert report["1"].reason == "in_features must be at least 32 and out_features 8, got 16 and 8"


@NOTHING
def test_weights_that_are_not_finite_stay():
    model = uneven(nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8)))
    with torch.no_grad():
        model[1].weight[3, 4] = torch.nan
    report = explain_permutation(permute_channels(model, image(3, 8)))
    assert report["1"].code is Code.KEPT
    assert report["1"].energy is None
    assert report["1"].reason == "its weight holds NaN or infinity"


@NOTHING
def test_no_time_leaves_all_as_it_is():
    model = stack(nn.BatchNorm2d(32))
    report = explain_permutation(permute_channels(model, image(), seconds=1e-9))
    assert report["2"].code is Code.BEST


# The report


def test_report():
    model = stack(nn.BatchNorm2d(32))
    report = explain_permutation(permute_channels(model, image()))
    lines = str(report).splitlines()
    before, after = (f"{value:.2%}" for value in report.energy)
    assert (
        lines[0] == f"Sequential: 2 of 3 layers permuted, 2:4 keeps {before} → {after} of the squared weight"
    )
    assert repr(report) == f"<PermuteReport: {lines[0].removeprefix('Sequential: ')}>"
    data = json.loads(report.to_json())
    assert [row["name"] for row in data["layers"]] == ["0", "2", "3"]
    assert data["layers"][1]["code"] == "permuted"
    assert data["layers"][1]["energy"] == list(report["2"].energy)
    assert data["energy"] == list(report.energy)
    assert (data["model"], data["by"], data["reason"]) == ("Sequential", "torch.export", "")
    with pytest.raises(KeyError):
        report["1"]


def test_print(capsys):
    report = explain_permutation(permute_channels(stack(), image()))
    report.print()
    assert capsys.readouterr().out.rstrip() == str(report)


@pytest.mark.parametrize(("model", "error"), [(3, TypeError), (nn.Linear(2, 2), ValueError)])
def test_explain_of_something_else(model, error):
    with pytest.raises(error, match="explain_permutation: model must "):
        explain_permutation(model)
