"""What ``Pruner`` makes of each plan: masks, layers of every kind, criteria, and what convert finds."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from pruner_net import (
    EVERY_PLAN,
    OPTIMIZERS,
    PLAN,
    Net,
    X,
    Y,
    assert_equal,
    assert_zeros,
    every_plan,
    train,
    weights,
)
from torch import nn

from sparseops import Channels, Layers, Plan, Pruner, Unstructured, convert, explain
from sparseops import nn as sparse_nn
from sparseops.prune import is_24_transposable


@every_plan
def test_finalized_model_converts_as_it_is(plan):
    model = Net().eval()
    state = model.state_dict().keys()
    pruner = Pruner(model, plan)
    pruned = pruner.finalize()
    assert pruned is model and model.state_dict().keys() == state and type(model) is Net
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing to convert where the zeros have no pattern
        sparse = convert(model, prune=None)
    torch.testing.assert_close(sparse(X), model(X), rtol=1e-3, atol=1e-4)
    if not isinstance(plan, Unstructured):
        assert any(isinstance(m, sparse_nn.SparseModule) for m in sparse.modules())


def test_converted_by_the_recorded_plan():
    model = Net().eval()
    Pruner(model, PLAN).finalize()
    sparse = convert(copy.deepcopy(model), prune=None)
    rows = explain(sparse)
    assert [rows[name].format for name in ("conv1", "conv2", "fc1", "fc2")] == ["channel", "nm24", "nm24", ""]
    assert is_24_transposable(model.fc1.weight.detach() != 0)


def test_channels_of_global_scope_and_other_criteria_convert():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    with torch.no_grad():
        model[2].weight.mul_(torch.linspace(0.1, 1, 64).unsqueeze(1))
    Pruner(model, Channels(ratio=0.3, scope="global", criterion="fpgm")).finalize()
    sparse = convert(model, prune=None)
    x = torch.randn(4, 64)
    torch.testing.assert_close(sparse(x), model(x), rtol=1e-4, atol=1e-5)


def test_24_of_what_channels_leave_is_packed():
    sparse = convert(Pruner(Net(), EVERY_PLAN["channels_24"]).finalize(), prune=None)
    assert sparse.fc1.format == "channel" and sparse.fc1.meta is not None


@pytest.mark.parametrize("model", [nn.Linear(64, 32), nn.LSTM(64, 32)], ids=["linear", "lstm"])
def test_inputs_alone(model):
    pruner = Pruner(model, Channels(ratio=0.5, side="inputs"))
    sparse = convert(pruner.finalize(), prune=None)
    assert sparse.format == "channel"


def test_the_last_layer_is_not_the_last_that_is_pruned():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    kept = Pruner(model, Plan({"0": None, "1": Channels()})).masks["1.weight"]
    assert kept.all()
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    assert not Pruner(model, Plan({"0": Channels(), "*": None})).masks["0.weight"].all()


def test_24_of_what_channels_leave_comes_last():
    model = Net()
    pruner = Pruner(model, Plan({"fc1": Channels(ratio=0.5, then="2:4")}), schedule="linear", steps=4)
    shares = []
    for _ in range(4):
        train(model, pruner, OPTIMIZERS["sgd"](model.parameters()), 1)
        shares.append(pruner.sparsity)
    assert shares == [0.0, 0.25, 0.25, 0.75]


def test_24_is_of_the_inputs_that_are_kept():
    torch.manual_seed(0)
    model = nn.Linear(64, 16)
    rule = Channels(ratio=0.5, side="inputs", block=1, then="2:4", keep_last=False)
    mask = Pruner(model, rule).masks["weight"]
    kept = mask.any(0)
    assert int(kept.sum()) == 32 and mask[:, kept].view(16, 8, 4).sum(2).eq(2).all()
    assert not mask.view(16, 16, 4).sum(2).le(2).all()


def test_the_criterion_of_a_rule_counts_for_its_layers():
    mixed = Plan({"fc1": Unstructured(criterion="random"), "fc2": Unstructured()})
    masks = Pruner(Net(), mixed, criterion="l1").masks
    for criterion, name in (("random", "fc1.weight"), ("l1", "fc2.weight")):
        assert torch.equal(masks[name], Pruner(Net(), Unstructured(), criterion=criterion).masks[name])
    assert not torch.equal(masks["fc1.weight"], Pruner(Net(), Unstructured()).masks["fc1.weight"])


def test_inputs_of_convolution_groups():
    torch.manual_seed(0)
    model = nn.Conv2d(32, 8, 3, groups=2)
    with torch.no_grad():
        model.weight[:4, 8:] *= 0.1
        model.weight[4:, :8] *= 0.1
    pruner = Pruner(model, Channels(ratio=0.5, side="inputs", keep_last=False))
    read = pruner.masks["weight"].view(2, 4, 16, 9).any(3)
    kept = torch.arange(16) < 8
    assert torch.equal(read, torch.stack([kept, ~kept]).unsqueeze(1).expand(2, 4, 16))


def test_strength_is_a_share_of_the_plan():
    pruner = Pruner(Net(), Unstructured(ratio=0.8), strength=0.5)
    assert pruner.sparsity == pytest.approx(0.4, abs=1e-3)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    with torch.no_grad():
        model[1].weight.copy_(model[1].weight * (torch.arange(64) % 4 < 2))  # loses nothing
        model[3].weight.fill_(1.0)  # loses half
    pruner = Pruner(model, "2:4", strength=0.75)
    assert set(pruner.masks) == {"0.weight", "1.weight", "2.weight"}
    assert "strength is 0.75" in pruner.report()["3"].reason
    layer = nn.Linear(100, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1, 101) / 100)
    assert Pruner(layer, Unstructured(threshold=0.8), strength=0.5).sparsity == 0.4


def test_calibration_is_read_once_for_a_share_of_the_plan():
    reads = []

    class Batches:
        def __iter__(self):
            reads.append(1)
            return iter([X])

    def masks(calibration, model):
        return Pruner(model, "2:4", criterion="wanda", calibration=calibration, strength=0.67).masks

    found = masks(Batches(), Net())
    whole = Pruner(Net(), "2:4", criterion="wanda", calibration=[X]).masks
    assert len(found) == 2 and all(torch.equal(mask, whole[name]) for name, mask in found.items())
    assert len(reads) == 1


def test_given_masks_are_kept():
    model = Net()
    masks = {"fc1.weight": torch.rand(32, 32 * 36) > 0.3, "conv2.weight": torch.rand(32, 16, 3, 3) > 0.5}
    masks["fc1.bias"] = torch.rand(32) > 0.5
    pruner = Pruner(model, masks)
    assert_equal(pruner.masks, masks)
    train(model, pruner, OPTIMIZERS["sgd"](model.parameters()), 3)
    assert_zeros(model, pruner)
    assert pruner.report()["fc1.weight"].pattern == "given"
    pruner.finalize()
    assert {row.format for row in explain(model)} == {""}
    for bad, error, words in (
        ({}, ValueError, "must hold at least one mask"),
        ({"nobody.weight": masks["fc1.weight"]}, ValueError, "got 'nobody.weight'"),
        ({"norm.running_mean": torch.ones(32).bool()}, ValueError, "got 'norm.running_mean'"),
        ({"fc2.weight": torch.ones(10, 32)}, TypeError, "bool masks, got torch.float32 for fc2.weight"),
        (
            {"fc2.weight": torch.ones(32, 10).bool()},
            ValueError,
            r"got \(32, 10\) for fc2.weight of shape \(10",
        ),
    ):
        with pytest.raises(error, match=words):
            Pruner(Net(), bad)


def test_a_given_mask_needs_a_weight_with_data():
    with pytest.raises(ValueError, match="of layers that can be pruned, got 'weight'"):
        Pruner(nn.Linear(8, 4, device="meta"), {"weight": torch.ones(4, 8, dtype=torch.bool)})


def test_given_masks_that_are_24_are_converted():
    masks = {"0.bias": torch.rand(32) > 0.5, "0.weight": (torch.arange(64) % 4 < 2).expand(32, 64)}
    model = Pruner(nn.Sequential(nn.Linear(64, 32)), masks).finalize()
    assert convert(model, prune=None)[0].format == "nm24"


def test_names_that_look_like_patterns():
    model = nn.Sequential()
    model.add_module("a[0]", nn.Linear(64, 32))
    sparse = convert(Pruner(model, "2:4").finalize(), prune=None)
    assert explain(sparse)["a[0]"].format == "nm24"


def test_layers_go_whole():
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)))
    with torch.no_grad():
        model[2].weight.mul_(0.01)
    pruner = Pruner(model, Layers(ratio=0.25))
    assert not model[2].weight.any() and pruner.sparsity == 0.25
    assert all(m.weight.any() for m in (model[0], model[1], model[3]))


def test_what_convert_cannot_use_is_left_unless_it_is_named():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ConvTranspose2d(64, 32, 3), nn.Conv2d(32, 32, 3))
    report = Pruner(copy.deepcopy(model), "2:4").report()
    assert [row.name for row in report.pruned] == ["2.weight"]
    assert report["1"].reason.startswith("convert could not make it sparse: there is no sparse module")
    assert len(Pruner(copy.deepcopy(model), Plan({"*": "2:4"})).masks) == 1
    pruner = Pruner(model, Plan({"1": "2:4", "*": None}))
    assert "convert will leave it dense" in pruner.report()["1.weight"].reason
    # its input channels lie along the first dimension
    assert pruner.masks["1.weight"].view(16, 4, 32, 3, 3).sum(1).eq(2).all()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind):
    torch.manual_seed(0)
    model = kind(32, 64, num_layers=2, bidirectional=True)
    plan = Plan({"*": "2:4"}) if kind is not nn.RNN else Unstructured(ratio=0.5)
    pruner = Pruner(model, plan)
    assert len(pruner.masks) == 8 and pruner.sparsity == pytest.approx(0.5)
    if kind is nn.RNN:
        return
    pruner.finalize()
    sparse = convert(model, prune=None)
    x = torch.randn(5, 2, 32)
    torch.testing.assert_close(sparse(x)[0], model(x)[0], rtol=1e-4, atol=1e-5)
    model = kind(32, 64)
    pruner = Pruner(model, Channels(ratio=0.5, keep_last=False))
    mask = pruner.masks["weight_hh_l0"]
    units = mask.any(0)
    assert int(units.sum()) == 32 and torch.equal(mask.view(-1, 64, 64).any(0).any(1), units)
    sparse = convert(pruner.finalize(), prune=None)
    torch.testing.assert_close(sparse(x)[0], model(x)[0], rtol=1e-4, atol=1e-5)


def test_calibrated_criteria_and_the_last_layer():
    for criterion in ("gradient", "taylor", "wanda", "movement"):
        model = Net()
        pruner = Pruner(model, "2:4", criterion=criterion, calibration=[(X, Y)] * 2, loss=F.cross_entropy)
        assert pruner.sparsity == pytest.approx(0.5) and all(p.grad is None for p in model.parameters())
        by_size = Pruner(Net(), "2:4")
        assert any(not torch.equal(mask, by_size.masks[name]) for name, mask in pruner.masks.items())
    model = Net()
    before = weights(model)
    pruner = Pruner(model, "2:4", criterion="sparsegpt", calibration=iter([X]))
    assert_zeros(model, pruner)
    kept = pruner.masks["fc1.weight"]
    assert not torch.equal(model.fc1.weight[kept], before["fc1.weight"][kept])  # made up for what went
    model = Net()
    pruner = Pruner(model, Plan({"conv1": Channels(criterion="bn")}), calibration=[X])
    assert int(pruner.masks["conv1.weight"].flatten(1).any(1).sum()) == 16


def test_columns_of_an_embedding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight[:, 16:40] *= 0.1
    pruner = Pruner(model, Plan({"0": Channels(ratio=0.375)}))
    kept = torch.ones(64, dtype=torch.bool)
    kept[16:40] = False
    assert torch.equal(pruner.masks["0.weight"], kept.expand(50, 64))
    sparse = convert(pruner.finalize(), prune=None)
    x = torch.arange(50)
    torch.testing.assert_close(sparse(x), model(x))


def test_sparsegpt_of_single_weights():
    model = Net()
    rule = Unstructured(ratio=0.6, criterion="sparsegpt")
    pruner = Pruner(model, Plan({"fc1": rule, "conv2": rule}), calibration=[X])
    assert pruner.sparsity == pytest.approx(0.6, abs=0.01)
    assert_zeros(model, pruner)


def test_frozen_weights_are_pruned_and_said():
    model = Net()
    model.fc1.weight.requires_grad_(False)
    with pytest.warns(UserWarning, match="1 frozen weights are pruned too, fc1.weight first"):
        pruner = Pruner(model, "2:4")
    assert "frozen" in pruner.report()["fc1.weight"].reason
    train(model, pruner, OPTIMIZERS["sgd"]([p for p in model.parameters() if p.requires_grad]), 1)
    assert_zeros(model, pruner)


def test_report(tmp_path):
    pruner = Pruner(Net(), PLAN)
    report = pruner.report()
    text = str(report)
    for words in ("4 weights pruned by l1", "Channels(ratio=0.25)", "conv2.weight", "2:4t", "50.0%"):
        assert words in text
    by_and_by = Pruner(Net(), PLAN, schedule="linear", steps=9)
    for level in (0.3, 0.6, 1.0):
        by_and_by.prune(level)
    for row in by_and_by.report().pruned:
        assert row.energy_kept == pytest.approx(report[row.name].energy_kept)
    assert 0.4 < report["fc2.weight"].energy_kept < 1 and report["fc2.weight"].dropped == pytest.approx(0.7)
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000
