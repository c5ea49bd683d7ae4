"""What ``Pruner`` refuses, in words that say what to do, and with the model untouched."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_untouched, state
from torch import nn
from torch.nn.utils import parametrizations

from sparseops import Channels, Layers, Plan, Pruner, Unstructured, convert

X, Y = torch.randn(4, 64), torch.randint(0, 10, (4,))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


BAD = {
    "plan_word": ({"plan": "3:4"}, ValueError, 'plan must be "2:4", "2:4t", a Channels, Unstructured'),
    "plan_type": ({"plan": 0.5}, TypeError, "plan must be .* or masks by parameter, got 0.5"),
    "plan_unknown_name": (
        {"plan": Plan({"head.*": "2:4"})},
        ValueError,
        "plan must match at least one module of the model, got 'head.*'",
    ),
    "plan_of_no_weight": (
        {"plan": Plan({"1": "2:4", "*": None})},
        ValueError,
        "plan must name at least one layer that can be pruned, got none; 0: the plan leaves it dense",
    ),
    "plan_of_nothing": (
        {"plan": Plan({"0": None, "2": None, "*": None})},
        ValueError,
        "plan must name at least one layer",
    ),
    "criterion_unknown": ({"criterion": "l3"}, ValueError, "criterion must be one of l1, l2, .* got 'l3'"),
    "criterion_of_channels": (
        {"criterion": "bn", "calibration": [X]},
        ValueError,
        'criterion "bn" scores output channels only',
    ),
    "criterion_of_weights": (
        {"plan": Channels(), "criterion": "sparsegpt", "calibration": [X]},
        ValueError,
        'plan must be "2:4", or Unstructured .* got Channels',
    ),
    "gradient_without_data": (
        {"criterion": "gradient"},
        ValueError,
        'calibration must be given with criterion "gradient" .an iterable of batches .x, y., and a loss.',
    ),
    "rule_without_data": (
        {"plan": Channels(criterion="taylor")},
        ValueError,
        'calibration must be given with criterion "taylor"',
    ),
    "wanda_without_data": (
        {"criterion": "wanda"},
        ValueError,
        'calibration must be given with criterion "wanda" .an iterable of batches x., got None',
    ),
    "gradient_without_loss": (
        {"criterion": "gradient", "calibration": [(X, Y)]},
        ValueError,
        "loss must be given",
    ),
    "calibration_empty": (
        {"criterion": "wanda", "calibration": []},
        ValueError,
        "calibration must hold at least one batch, got none",
    ),
    "calibration_type": (
        {"criterion": "wanda", "calibration": X},
        TypeError,
        "calibration must be an iterable",
    ),
    "loss_not_finite": (
        {"criterion": "taylor", "calibration": [(X * torch.nan, Y)], "loss": F.cross_entropy},
        ValueError,
        "loss must be finite, got nan for batch 0",
    ),
    "schedule": ({"schedule": "square"}, ValueError, 'schedule must be one of "oneshot", "linear", "cubic"'),
    "steps": ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
    "steps_type": ({"steps": 1.5}, TypeError, "steps must be an integer, got 1.5"),
    "every": ({"every": 0}, ValueError, "every must be at least 1, got 0"),
    "strength": ({"strength": 0.0}, ValueError, r"strength must be in \(0, 1\], got 0.0"),
    "training": ({"training": "soft"}, ValueError, 'training must be one of "fixed", "straight-through"'),
    "decay": ({"decay": 1.0}, ValueError, r"decay must be in \[0, 1\), got 1.0"),
    "together": ({"plan": Channels(together=True)}, ValueError, "example_inputs must be given with Channels"),
    "sparsegpt_of_another_pattern": (
        {"plan": "2:4t", "criterion": "sparsegpt", "calibration": [X]},
        ValueError,
        'plan must be "2:4", or Unstructured with a ratio and scope "local", .* got \'2:4t\'',
    ),
    "sparsegpt_over_all": (
        {"plan": Unstructured(scope="global"), "criterion": "sparsegpt", "calibration": [X]},
        ValueError,
        "plan must be .* got Unstructured",
    ),
    "sparsegpt_by_and_by": (
        {"criterion": "sparsegpt", "calibration": [X], "schedule": "linear"},
        ValueError,
        'schedule must be "oneshot" with criterion "sparsegpt", got \'linear\'',
    ),
}


@pytest.mark.parametrize(("options", "error", "words"), BAD.values(), ids=BAD)
def test_refused_and_untouched(options, error, words):
    model = net()
    before = state(model)
    with pytest.raises(error, match=words) as raised:
        Pruner(model, **{"plan": "2:4", **options})
    assert re.match(r"Pruner|Channels", str(raised.value))
    assert_untouched(model, before)
    Pruner(model, "2:4")  # no trace of the first


@pytest.mark.parametrize("rule", [Unstructured, Layers, Channels], ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("ratio", [1.0, -0.1, 1.5, float("nan")])
def test_ratio_out_of_range(rule, ratio):
    with pytest.raises(ValueError, match=rf"{rule.__name__}: ratio must be in \[0, 1\), got {ratio}"):
        rule(ratio=ratio)


def test_model_that_is_none():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        Pruner("model", "2:4")


def test_a_layer_in_two_plans():
    model = net()
    first = Pruner(model, Plan({"0": "2:4"}))
    with pytest.raises(ValueError, match="plan must not name 0.weight, which another Pruner keeps"):
        Pruner(model, "2:4")
    Pruner(model, Plan({"2": "2:4"})).finalize()
    first.finalize()
    Pruner(model, "2:4")


def test_a_pruner_that_is_gone_holds_no_layer():
    model = net()
    Pruner(model, "2:4")
    assert not model[0].weight._post_accumulate_grad_hooks
    Pruner(model, "2:4")


def test_strength_that_leaves_no_layer():
    model = net()
    pruner = Pruner(model, "2:4", strength=0.4)
    assert pruner.sparsity == 0.0 and pruner.masks == {}
    assert all("strength is 0.4" in row.reason for row in pruner.report())
    pruner.step()
    pruner.finalize()


def test_converted_model():
    sparse = convert(net())
    with pytest.raises(
        ValueError, match=r"model must not be converted yet, got sparse layer '0' \(.*to_dense"
    ):
        Pruner(sparse, "2:4")


def test_tied_weights_are_treated_alike():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"must treat 0.weight and 1.weight, which are one weight, alike"):
        Pruner(model, Plan({"0": Unstructured(0.5), "1": Unstructured(0.7)}))
    pruner = Pruner(model, Unstructured(0.5))
    assert list(pruner.masks) == ["0.weight"]


def test_computed_weights_are_left():
    model = net()
    parametrizations.weight_norm(model[0])
    report = Pruner(model, "2:4").report()
    assert "remove_parametrizations" in report["0"].reason


def test_steps_are_undisturbed_by_a_failing_criterion():
    calls = []

    def criterion(weight, dim):
        calls.append(dim)
        return weight.abs() if len(calls) < 5 else weight[:1]

    model = net()
    pruner = Pruner(model, Unstructured(), criterion=criterion, schedule="linear", steps=4)
    pruner.step()
    pruner.step()
    before = state(model)
    with pytest.raises(ValueError, match="criterion must give scores of shape"):
        pruner.step()
    assert_untouched(model, before)
