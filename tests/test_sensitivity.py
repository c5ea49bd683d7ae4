"""``sensitivity`` against pruning each layer by hand, and its report."""

import copy
import io
import itertools
import json
import re

import pytest
import torch
from conftest import assert_untouched, state
from option_nets import A, B, Judge, X, chain
from torch import nn

from sparseops import Channels
from sparseops.prune import Unstructured
from sparseops.train.recalibrate import recalibrate
from sparseops.train.sensitivity import OptionRow, Sensitivity, sensitivity


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(32, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.neck = nn.Linear(16, 32)
        self.head = nn.Linear(32, 8)

    def forward(self, x):
        return self.head(self.neck(self.norm(self.conv(x)).mean((2, 3))).relu())


@pytest.fixture
def net():
    torch.manual_seed(3)
    return Net().eval()


IMAGES = torch.randn(4, 32, 6, 6, generator=torch.Generator().manual_seed(2))


def by_hand(weight, option):
    """The weight with the smaller two of each four neighbouring inputs zero, or a share of the output
    channels in blocks of 8, those of the smallest sums of magnitudes."""
    pruned = weight.detach().clone()
    if option == "2:4":
        for row in pruned.reshape(len(pruned), pruned.shape[1], -1).unbind(2):  # for each kernel tap
            for out, start in itertools.product(range(len(row)), range(0, row.shape[1], 4)):
                row[out, start + row[out, start : start + 4].abs().argsort()[:2]] = 0
        return pruned
    blocks = list(pruned.split(8))
    for block in sorted(blocks, key=lambda block: float(block.abs().sum()))[
        : int(option.ratio * len(blocks))
    ]:
        block.zero_()
    return pruned


@pytest.mark.parametrize("batches", [None, [IMAGES]])
def test_against_pruning_by_hand(net, batches):
    with torch.no_grad():
        y = net(IMAGES)

    def evaluate(model):
        return -float((model(IMAGES) - y).square().sum())

    before = state(net)
    options = ["2:4", Channels(0.5)]
    found = sensitivity(net, evaluate, options, recalibrate=batches)
    assert_untouched(net, before)
    assert found.dense_metric == 0.0
    assert [(row.layer, row.option) for row in found] == [
        ("conv", "2:4"),
        ("conv", options[1]),
        ("neck", options[1]),
        ("head", "2:4"),
        ("head", options[1]),
    ], "in the order of the model; the neck is too small for 2:4"
    for row in found:
        pruned = copy.deepcopy(net)
        layer = pruned.get_submodule(row.layer)
        if (row.layer, row.option) == ("head", options[1]):
            assert row.drop == {"metric": 0.0}, "the last layer keeps its outputs"
            continue
        layer.weight.data = by_hand(layer.weight, row.option)
        if batches is not None:
            recalibrate(pruned, batches)
        with torch.no_grad():
            expected = -evaluate(pruned)
        assert row.drop == {"metric": pytest.approx(expected, rel=1e-5)}
        assert (row.ms_before, row.ms_after, row.reason, row.chosen) == (None, None, "", False)


def test_layers_are_pruned_one_at_a_time():
    judge = Judge(dict.fromkeys([(str(n), option) for n in range(4) for option in (A, B)], 0.25))
    found = sensitivity(chain(), judge, [A, B, A])
    assert judge.calls == [{}] + [{str(n): option} for option in (A, B) for n in range(4)]
    assert len(found) == 8
    assert all(row.drop == {"metric": 0.25} for row in found)
    assert found.options == [A, B]


def test_the_same_file_serves_sensitivity_again(tmp_path):
    path = str(tmp_path / "results.json")
    drops = dict.fromkeys([(str(n), option) for n in range(4) for option in (A, B)], 0.25)
    judge = Judge(drops)
    first = sensitivity(chain(), judge, [A], cache=path)
    more = sensitivity(chain(), judge, [A, B], cache=path)
    assert judge.calls == [{}] + [{str(n): option} for option in (A, B) for n in range(4)]
    assert [row for row in more if row.option == A] == list(first)


def test_channels_that_compete_are_judged_as_they_are_when_all_have_the_option():
    model = chain()
    with torch.no_grad():
        model[2].weight[:16] = 1e-6
    competing = Channels(0.2, scope="global", keep_last=False)
    seen = []

    def evaluate(net):
        seen.append([int((layer.weight == 0).all(1).sum()) for layer in net])
        return 1.0

    found = sensitivity(model, evaluate, [competing])
    assert len(found) == 4
    assert sum(map(sum, seen)) == 24, "a fifth of all 128 channels, in blocks"
    assert [0, 0, 16, 0] in seen
    assert len(seen) < 5, "what loses nothing is not evaluated"


class Backwards(nn.Module):
    """What is called last is registered first."""

    def __init__(self):
        super().__init__()
        self.head, self.neck = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.head(self.neck(x))


@pytest.mark.parametrize(("inputs", "kept", "other"), [(X, "head", "neck"), (None, "neck", "head")])
def test_the_last_layer_keeps_its_outputs(inputs, kept, other):
    half = Channels(0.5)

    def evaluate(net):
        return sum(float(parameter.abs().sum()) for parameter in net.parameters())

    found = sensitivity(Backwards(), evaluate, [half], example_inputs=inputs)
    assert found[kept, half].drop == {"metric": 0.0}
    assert found[other, half].drop["metric"] > 1


def test_zeros_in_no_pattern():
    seen = []

    def evaluate(net):
        seen.append([float((layer.weight == 0).float().mean()) for layer in net])
        return 1.0

    found = sensitivity(chain(2), evaluate, [Unstructured(0.25)])
    assert seen == [[0.0, 0.0], [0.25, 0.0], [0.0, 0.25]]
    assert [row.layer for row in found] == ["0", "1"]


def test_a_model_without_a_layer_for_the_options():
    with pytest.warns(UserWarning, match="sensitivity: no layer of Sequential can have 2:4") as caught:
        found = sensitivity(nn.Sequential(nn.Linear(4, 4)), lambda net: 0.5, ["2:4"])
    assert caught[0].filename == __file__
    assert (len(found), found.dense_metric) == (0, 0.5)


def report():
    rows = [
        OptionRow("a[red]", "2:4", {"x": 0.125, "y": -0.5}),
        OptionRow("a[red]", Channels(0.5), {"x": 0.25, "y": 0.0}),
        OptionRow("", Channels(0.5), None, reason="why"),
    ]
    return Sensitivity(rows, {"x": 0.75, "y": 2.0}, model="Net")


def test_table():
    text = str(report())
    lines = [line.split() for line in text.splitlines()]
    assert text.splitlines()[0] == "Net: 2 layers, 2 options, dense x 0.75, y 2"
    assert ["layer", "2:4", "Channels(ratio=0.5)"] in lines
    assert ["a[red]", "x", "0.125,", "y", "-0.5", "x", "0.25,", "y", "0"] in lines
    assert ["(model)"] in lines
    assert repr(report()) == "<Sensitivity: 2 layers, 2 options, dense x 0.75, y 2>"


def test_rows():
    found = report()
    assert len(found) == 3
    assert found["a[red]", "2:4"] is found.rows[0]
    assert (found.layers, found.options) == (["a[red]", ""], ["2:4", Channels(0.5)])
    assert found.dense_metric == {"x": 0.75, "y": 2.0}
    with pytest.raises(KeyError):
        found["a[red]", Channels(0.25)]


def test_json():
    data = json.loads(report().to_json())
    assert (data["model"], data["dense"]) == ("Net", {"x": 0.75, "y": 2.0})
    assert data["rows"][1] == {
        "layer": "a[red]",
        "option": "Channels(ratio=0.5)",
        "drop": {"x": 0.25, "y": 0.0},
        "ms_before": None,
        "ms_after": None,
        "reason": "",
        "chosen": False,
    }


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "sensitivity.svg"
    report().plot(path)
    text = path.read_text(encoding="utf-8")
    for words in ("drop of x", "drop of y", "a[red]", "Channels(ratio=0.5)", "2 layers, 2 options"):
        assert f"<!-- {words}" in text or words in text
    assert "chosen" not in text
    points = [part.count("<use") for part in re.split(r'<g id="', text) if part.startswith("PathCollection")]
    assert points[:4] == [1, 1, 1, 1], "of two options for two tasks"
    assert "(model)" not in text, "what was not measured is not drawn"
    with pytest.raises(ValueError, match="plot: report must have at least one measured drop, got none"):
        Sensitivity([OptionRow("a", "2:4")], {"metric": 1.0}).plot(path)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_one_progress_bar_at_a_time(net, monkeypatch):
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr("sys.stderr", stream)
        sensitivity(net, lambda model: 1.0, ["2:4"], recalibrate=[IMAGES])
        assert ("measuring" in stream.getvalue()) == shown
        assert "recalibrating" not in stream.getvalue()
        recalibrate(net, [IMAGES])
        assert ("recalibrating" in stream.getvalue()) == shown
