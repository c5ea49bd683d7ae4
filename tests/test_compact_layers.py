"""How channels go through layers that are not plain: depthwise, grouped, transposed, in place, 2:4 inside."""

import pytest
import torch
import torch.nn.functional as F
from pruned import HALF, Net, assert_same, check, conv, drop, image, randomise
from torch import nn

from sparseops.compact import compact, explain_compact
from sparseops.compact.report import Code
from sparseops.nn import SparseConv2d, SparseLinear, SparseModule


@pytest.mark.parametrize("multiplier", [1, 2])
def test_depthwise(multiplier):
    depthwise = nn.Conv2d(16, 16 * multiplier, 3, groups=16)
    model = nn.Sequential(
        conv(), nn.ReLU(), depthwise, nn.BatchNorm2d(16 * multiplier), nn.Conv2d(16 * multiplier, 4, 1)
    )
    small, report = check(model, image())
    assert small[2].weight.shape == (8 * multiplier, 1, 3, 3)
    assert small[2].groups == small[2].in_channels == 8
    assert report.edge("0", "2").code is report.edge("2", "4").code is Code.COMPACTED


def test_depthwise_that_pads_a_constant():
    def network(bias):
        depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        return nn.Sequential(conv(bias=bias), depthwise, nn.Conv2d(16, 4, 1))

    _, report = check(network(True), image())
    assert report.edge("0", "1").code is Code.KEPT
    assert report.edge("0", "1").reason == "1 pads a constant that is not zero"
    small, _ = check(network(False), image())
    assert small[1].groups == 8


def test_depthwise_without_some_channels():
    depthwise = drop(nn.Conv2d(16, 16, 3, groups=16), range(4, 16))
    model = nn.Sequential(conv(kept=range(12)), depthwise, nn.Conv2d(16, 4, 1))
    small, _ = check(model, image())
    assert type(small[1]) is nn.Conv2d
    assert small[1].groups == 8


def test_groups_that_keep_equally_many():
    grouped = nn.Conv2d(16, 8, 3, groups=2, padding=1)
    even = [0, 1, 2, 3, 8, 9, 10, 11]
    small, report = check(nn.Sequential(conv(kept=even), grouped, nn.Conv2d(8, 4, 1)), image())
    assert small[1].layer.weight.shape == (8, 4, 3, 3)
    assert report.edge("0", "1").code is Code.COMPACTED
    _, report = check(nn.Sequential(conv(kept=range(6)), grouped, nn.Conv2d(8, 4, 1)), image())
    assert report["1"].reason == "its groups would keep different numbers of channels"


@pytest.mark.parametrize("bias", [True, False])
def test_transposed_convolution(bias):
    model = nn.Sequential(
        conv(bias=bias), nn.ConvTranspose2d(16, 16, 2, 2), drop(nn.Conv2d(16, 4, 1), inputs=HALF)
    )
    small, report = check(model, image())
    assert small[1].weight.shape == (16 if bias else 8, 8, 2, 2)
    if bias:
        reason = "a transposed convolution reads a constant that is not zero"
        assert report.edge("0", "1").reason == reason


@pytest.mark.parametrize(
    ("pool", "reason"),
    [
        (nn.AvgPool2d(3, 1, 1), "avg_pool2d pads a constant that is not 0"),
        (nn.AvgPool2d(2, divisor_override=3), "avg_pool2d pads a constant that is not nan"),
        (nn.ZeroPad2d(1), "pad pads a constant that is not 0"),
        (nn.ConstantPad2d(1, 0.5), "pad pads a constant that is not 0.5"),
    ],
)
def test_borders_that_break_a_constant(pool, reason):
    _, report = check(nn.Sequential(conv(), pool, nn.Conv2d(16, 4, 1)), image())
    assert report.edge("0", "2").code is Code.KEPT
    assert report.edge("0", "2").reason == reason
    if reason.endswith("0"):
        _, report = check(nn.Sequential(conv(bias=False), pool, nn.Conv2d(16, 4, 1)), image())
        assert report.edge("0", "2").code is Code.COMPACTED


def test_a_layer_that_reads_constants_only():
    model = nn.Sequential(conv(), drop(nn.Conv2d(16, 4, 1), inputs=range(8)), nn.Conv2d(4, 4, 1))
    small, report = check(model, image())
    assert small[0].weight.shape[0] == 1
    assert small[1].weight.shape[:2] == (1, 1)
    assert report.edge("0", "1").reason.startswith("a tensor has at least one channel")


def test_the_last_layer_keeps_its_scatter():
    small, report = check(nn.Sequential(nn.Conv2d(3, 16, 3), conv(16)), image())
    assert type(small[1]) is SparseConv2d
    row = report.edge("1", "(output)")
    assert (row.code, row.reason) == (Code.KEPT, "the model returns it")


def test_a_compact_weight_that_is_24_is_only_renumbered():
    middle = drop(nn.Linear(64, 64), range(32), range(16, 48), nm24=True)
    model = nn.Sequential(drop(nn.Linear(8, 64), range(8, 56)), middle, nn.ReLU(), nn.Linear(64, 8))
    small, report = check(model, image(3, 8))
    new = small[1]
    assert isinstance(new, SparseLinear)
    assert new.weight_shape == (32, 32)
    assert new.in_index.tolist() == list(range(32))
    assert new.meta is not None
    assert torch.equal(new.values, middle.values)
    assert small[0].weight.shape[0] == 32
    assert report["1"].outputs == (64, 32)


def test_a_mask_in_dense_layers_compacts_too():
    model = randomise(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1)))
    with torch.no_grad():
        model[0].weight[3:9] = 0
    small = compact(model, image())
    assert_same(small, model, image())
    assert small[0].weight.shape[0] == 10
    assert not any(isinstance(module, SparseModule) for module in small.modules())


def test_a_lone_layer():
    small, report = check(conv(), image())
    assert type(small) is SparseConv2d
    assert report[""].outputs == (16, 16)


def test_an_operand_that_is_changed_in_place():
    """The shortcut ends at a batch norm, whose result the next activation changes before it is added."""

    def forward(net, x):
        shortcut = net.norm(net.first(x))
        y = net.middle(F.relu_(shortcut))
        return net.out(y + shortcut)

    layers = {
        "first": conv(),
        "norm": nn.BatchNorm2d(16),
        "middle": conv(16, padding=1),
        "out": nn.Conv2d(16, 4, 1),
    }
    small, _ = check(Net(forward, **layers), image())
    assert small.out.weight.shape[1] == 8


def test_a_reader_after_an_activation_in_place():
    """``shortcut`` is negative where it is constant; after the activation in place that is zero, and what is
    read later through the old name is that zero."""

    def forward(net, x):
        shortcut = net.norm(net.first(x))
        torch.relu_(shortcut)
        return net.out(shortcut)

    layers = {"first": conv(), "norm": nn.BatchNorm2d(16), "out": nn.Conv2d(16, 4, 1)}
    check(Net(forward, **layers), image())


def test_a_reader_of_what_dropout_hands_on_in_place():
    """In evaluation mode dropout returns its argument itself."""

    def forward(net, x):
        y = net.first(x)
        torch.relu_(F.dropout(y, training=False))
        return net.out(y)

    report = explain_compact(compact(randomise(Net(forward, first=conv(), out=nn.Conv2d(16, 4, 1))), image()))
    assert "relu_ writes into memory that is also read as" in report.reason


def test_pictures_of_channels_last_that_are_averaged():
    model = Net(
        lambda net, x: net.out(net.first(x).mean(1)),
        first=drop(nn.Linear(8, 32), range(16)),
        out=nn.Linear(32, 4),
    )
    _, report = check(model, image(2, 5, 8))
    assert report.edge("first", "out").code is Code.COMPACTED


def test_depthwise_over_the_input():
    model = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), drop(nn.Conv2d(3, 4, 1), inputs=range(2)))
    small, _ = check(model, image())
    assert small[0].weight.shape == (3, 1, 3, 3)


def test_a_frozen_padded_layer_stays_frozen():
    model = nn.Sequential(conv(), nn.Conv2d(16, 4, 3, padding=1))
    model[1].weight.requires_grad_(False)
    small, _ = check(model, image())
    assert not small[1].constants.requires_grad


def test_modes_of_norms_and_metadata_of_24():
    middle = drop(nn.Linear(64, 64), range(32), range(16, 48), nm24=True)
    model = randomise(
        nn.Sequential(drop(nn.Linear(8, 64), range(8, 56)), nn.BatchNorm1d(64), middle, nn.Linear(64, 8))
    )
    model[1].train()
    small = compact(model, image(3, 8))
    assert small[1].num_features < 64
    assert small[1].training
    assert small[2].meta.data_ptr() != middle.meta.data_ptr()


def test_a_layer_with_nothing_cut_around_it_is_kept():
    _, report = check(nn.Sequential(nn.Conv2d(3, 16, 3), conv(16)), image())
    assert report["1"].code is Code.KEPT
