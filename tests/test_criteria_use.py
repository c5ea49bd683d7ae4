"""Criteria as functions, on blocks of channels, and used wrongly."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from criteria_cases import case

from sparseops.prune import CRITERIA, criteria
from sparseops.prune.criteria import check_criterion, score, score_blocks, score_weights

# Functions, blocks


def test_a_function_is_given_the_weight_and_the_dimension_alone():
    weight, evidence = case((4, 3, 2))
    seen = []

    def spread(w, dim):
        seen.append((w.requires_grad, dim))
        return w.abs() if dim is None else w.movedim(dim, 0).flatten(1).amax(1)

    assert torch.equal(score_weights(weight.requires_grad_(), spread, evidence), weight.abs())
    assert torch.equal(score(weight, 1, spread, evidence), weight.amax((0, 2)).double())
    assert seen == [(False, None), (False, 1)]


@pytest.mark.parametrize("name", ["l2", "gradient", "l1", "taylor", "wanda", "lamp", "movement"])
def test_blocks_are_judged_by_the_mean_that_fits_the_criterion(name):
    scores = torch.rand(2, 10, dtype=torch.float64)
    blocks = score_blocks(scores, 4, name)
    for group, block in itertools.product(range(2), range(3)):
        part = scores[group].tolist()[4 * block : 4 * block + 4]
        if name in ("l2", "gradient"):
            expected = math.sqrt(sum(value**2 for value in part) / len(part))
        else:
            expected = sum(part) / len(part)
        assert float(blocks[group, block]) == pytest.approx(expected)
    assert torch.equal(score_blocks(scores, 4, CRITERIA[name]), blocks), "the function and its name agree"


def test_errors_say_where_each_kind_of_evidence_comes_from():
    assert {key for criterion in CRITERIA.values() for key in criterion.needs} == set(criteria.SOURCES)


@pytest.mark.parametrize("name", [*CRITERIA])
def test_named_criteria_are_values_of_the_module(name):
    criterion = CRITERIA[name]
    assert getattr(criteria, name) is criterion and criterion.__name__ == repr(criterion) == name
    assert pickle.loads(pickle.dumps(criterion)) is criterion
    assert copy.deepcopy(criterion) is criterion
    assert criterion.__doc__ and criterion.__doc__ != type(criterion).__doc__


# Wrong use


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda w: score(w, 1, "bn"),
            r'Channels: criterion "bn" scores output channels only, got input channels, '
            r"which are scored by l1, l2, gradient, taylor, fpgm, lamp, random, wanda, movement",
        ),
        (
            lambda w: score_weights(w, "bn"),
            r'Pruner: criterion "bn" scores output channels only, got single weights, '
            r"which are scored by l1, l2, gradient, taylor, lamp, random, wanda, movement, sparsegpt",
        ),
        (
            lambda w: score_weights(w, criteria.fpgm),
            r'Pruner: criterion "fpgm" scores output channels and input channels only, got single weights',
        ),
        (
            lambda w: score(w, 0, "sparsegpt"),
            r'Channels: criterion "sparsegpt" scores single weights only, got output channels',
        ),
        (
            lambda w: score(w, 2, "l1"),
            r'Channels: criterion "l1" scores single weights and .* only, got dim 2, which .* by none',
        ),
        (
            lambda w: score(w, 0, "gradient"),
            r'Channels: criterion "gradient" must have evidence "gradient", got none; .* batches and a loss,',
        ),
        (
            lambda w: score_weights(w, "wanda", {"gradient": w}),
            r'Pruner: criterion "wanda" must have evidence "inputs", got none; .* from calibration batches,',
        ),
        (
            lambda w: score(w, 0, "bn"),
            r'Channels: criterion "bn" must have evidence "scale", got none; sparseops.Pruner gathers it '
            r"where a batch norm reads the layer's output, and sparseops.convert takes what it has pruned$",
        ),
        (
            lambda w: score(w, 0, "taylor", {"gradient": w[:, :2]}),
            r'Channels: evidence "gradient" must have the shape of the weight, \(4, 3, 2\), got \(4, 2, 2\)',
        ),
        (
            lambda w: score_weights(w, "sparsegpt"),
            r'Pruner: criterion "sparsegpt" must have evidence "hessian", got none; sparseops.Pruner',
        ),
        (
            lambda w: score_weights(w, "sparsegpt", {"hessian": w}),
            r'Pruner: criterion "sparsegpt" must be used through sparseops.Pruner, .* got a call for scores',
        ),
        (
            lambda w: score_weights(w, lambda weight, dim: weight.sum()),
            r"Pruner: criterion must give scores of shape \(4, 3, 2\), got \(\)",
        ),
        (
            lambda w: score_weights(w, lambda weight, dim: weight.tolist()),
            r"Pruner: criterion must give scores of shape \(4, 3, 2\), got list",
        ),
        (
            lambda w: score(w, 1, lambda weight, dim: weight),
            r"Channels: criterion must give scores of shape \(3,\), got \(4, 3, 2\)",
        ),
    ],
)
def test_wrong_use(call, message):
    with pytest.raises(ValueError, match=rf"^{message}"):
        call(torch.ones(4, 3, 2))


@pytest.mark.parametrize(
    ("criterion", "dims", "message"),
    [
        (
            "l3",
            (0,),
            r"Rule: criterion must be one of l1, l2, gradient, taylor, bn, fpgm, lamp, random, wanda, "
            r"movement or a function \(weight, dim\) -> scores, got 'l3'$",
        ),
        (3, (None,), r"Rule: criterion must be one of l1, .*, sparsegpt or a function .*, got 3$"),
        (
            ["l1"],
            (0, 1),
            r"Rule: criterion must be one of l1, l2, gradient, taylor, fpgm, lamp, random, wanda, movement "
            r"or a function .*, got \['l1'\]$",
        ),
        (
            "bn",
            (0, 1),
            r'Rule: criterion "bn" scores output channels only, got input channels, which are scored by l1,',
        ),
        ("fpgm", (None,), r'Rule: criterion "fpgm" scores output channels and .* only, got single weights'),
    ],
)
def test_criteria_that_rules_refuse(criterion, dims, message):
    with pytest.raises(ValueError, match=rf"^{message}"):
        check_criterion(criterion, "Rule", dims)


def test_criteria_that_rules_take():
    for name, dims in (("bn", (0,)), ("fpgm", (0, 1)), ("sparsegpt", (None,)), ("l1", (None, 0, 1))):
        check_criterion(name, "Rule", dims)
        check_criterion(CRITERIA[name], "Rule", dims)
    check_criterion(lambda weight, dim: weight, "Rule", (None, 0, 1))
