"""``permute_channels``: which channels stay and why, plans, errors, and the report."""

import json

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_untouched, state
from permuted import NOTHING, TOKENS, Language, assert_same, checked, image, share_kept, stack, uneven
from pruned import Net
from torch import nn
from torch.nn.utils import parametrize

from sparseops.convert import convert
from sparseops.prune import Channels, Plan
from sparseops.train import spaces
from sparseops.train.permute import explain_permutation, permute_channels
from sparseops.train.permute_report import Code


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
    "hook on a layer norm": ((hooked(nn.LayerNorm([32, 7, 5])),), "layer_norm reads every channel"),
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
    new, report = checked_tied(model, TOKENS)
    assert new.head.weight is new.embed.weight
    assert report["blocks.0.up"].code is Code.KEPT
    assert report["blocks.0.down"].code is Code.PERMUTED
    assert report["blocks.0.up"].reason.startswith("head: another module holds the same tensor")


def checked_tied(model, x):
    new = permute_channels(model, x)
    assert_same(new, model, x)
    return new, explain_permutation(new)


@NOTHING
def test_tied_buffers_stay():
    def forward(net, x):
        return net.c(net.b(net.a(x) * net.one) * net.two)

    net = Net(forward, a=nn.Linear(8, 32), b=nn.Linear(32, 32), c=nn.Linear(32, 8))
    net.register_buffer("one", torch.ones(32))
    net.register_buffer("two", net.one)
    _, report = checked_tied(uneven(net), image(3, 8))
    assert report["b"].reason == report["c"].reason == "mul meets a tensor whose channels are not known"


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
    reasons = ("a weight of format nm24 reads and writes every channel", "it is sparse already")
    for pattern, reason in zip(("2:4", Channels(ratio=0.5, keep_last=False)), reasons, strict=True):
        mixed = convert(model, pattern, include="1")
        new = permute_channels(mixed, image(3, 8))
        assert_same(new, mixed, image(3, 8))
        report = explain_permutation(new)
        assert report["1"].code is Code.DENSE
        assert report["2"].code is Code.KEPT
        assert report["2"].reason == f"1: {reason}"
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


def test_one_reader_that_is_not_finite_leaves_the_order_to_the_others():
    net = Net(lambda net, x: (y := net.a(x), (net.b(y), net.c(y)))[1], a=nn.Linear(8, 32), b=nn.Linear(32, 8))
    net.c = nn.Linear(32, 8)
    with torch.no_grad():
        uneven(net).c.weight[3, 4] = torch.inf
    report = explain_permutation(permute_channels(net, image(3, 8)))
    assert report["b"].code is report["c"].code is Code.PERMUTED
    assert report["b"].energy[1] > report["b"].energy[0]
    assert report["c"].energy is None
    assert report.energy == report["b"].energy


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
