"""``fit_sparse``: the budget, the rounds, and the model that must stay as it is."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_untouched, state
from fit_net import PLAN_OF_80, SGD, Recorder, data, density, fit, net, train, zeros
from torch import nn

from sparseops._replace import PLAN
from sparseops.prune import Channels
from sparseops.train.distill import Distiller
from sparseops.train.loggers import Callback
from sparseops.train.pruner import Pruner

# Rounds


def test_the_whole_plan_at_once_where_the_budget_allows_it():
    model = net()
    result = fit(model, max_drop=0.8)
    assert result.strength == 1.0 and result.within_budget and len(result.history) == result.round == 1
    assert result.sparsity == pytest.approx(0.8) and zeros(result.model) == pytest.approx(0.8)
    assert result.dense == {"metric": 1.0}
    assert result.metrics == result.retrained == {"metric": pytest.approx(0.2)}
    assert result.plan is PLAN_OF_80 and result.max_drop == {"metric": 0.8}
    assert PLAN in vars(result.model) and PLAN not in vars(model)
    assert type(result.model) is nn.Sequential
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in result.model.modules())


def test_the_strength_is_halved_towards_the_budget():
    starts, ends = [], []
    biases = [None]

    def noting(model, x):
        biases[0] = model[0].bias
        return train(model, x)

    class Biases(Callback):
        def on_evaluate(self, step, stage, metrics):
            (ends if stage == "retrained" else starts).append(
                None if stage == "dense" or biases[0] is None else biases[0].detach().clone()
            )

    # zeros of 0.8 x strength: 0.45 allows a strength of 0.5625
    result = fit(train=noting, max_drop=0.45, rounds=5, callbacks=[Biases()])
    assert [its.strength for its in result.history] == [1.0, 0.5, 0.75, 0.625, 0.5625]
    assert [its.within for its in result.history] == [False, True, False, False, True]
    assert (result.strength, result.round, result.within_budget) == (0.5625, 5, True)
    assert zeros(result.model) == result.sparsity == pytest.approx(0.45)
    assert [its.sparsity for its in result.history] == pytest.approx([0.8, 0.4, 0.6, 0.5, 0.45])


def test_rounds_begin_with_the_weights_of_the_strongest_that_was_within():
    dense = net()
    first, last = [], []

    def loop(model, pruner):
        first.append(model[0].bias.detach().clone())
        optimizer = SGD(model.parameters())
        train(model, data()[0]).backward()
        optimizer.step()
        pruner.step()
        last.append(model[0].bias.detach().clone())

    fit(dense, train=loop, batches=None, optimizer=None, max_drop=0.45, rounds=5)
    assert torch.equal(first[0], dense[0].bias) and torch.equal(first[1], dense[0].bias)
    for begin in first[2:]:
        assert torch.equal(begin, last[1])
    assert not torch.equal(last[1], dense[0].bias)


def test_a_budget_that_no_round_meets_is_said():
    with pytest.warns(UserWarning, match=r"no round is within max_drop \(metric 0.1\).* by 0.2 \(more"):
        result = fit(max_drop=0.1, rounds=3)
    assert not result.within_budget and result.round == 3
    assert [its.strength for its in result.history] == [1.0, 0.5, 0.25]
    assert result.strength == 0.25 and zeros(result.model) == result.sparsity == pytest.approx(0.2)
    assert "OVER THE BUDGET" in str(result) and "OVER THE BUDGET" in repr(result)


def test_the_least_bad_is_not_the_last():
    """A metric that is best at half of the strength."""
    with pytest.warns(UserWarning, match="of strength 0.5, is the least"):
        result = fit(evaluate=lambda m: 1.0 if not zeros(m) else -abs(zeros(m) - 0.4), max_drop=0.1)
    assert result.strength == 0.5 and result.round == 2 and zeros(result.model) == pytest.approx(0.4)


def test_a_drop_of_exactly_the_budget_is_within():
    assert 0.8 - 0.7 > 0.1  # in floating point
    result = fit(evaluate=lambda m: 0.7 if zeros(m) else 0.8, max_drop=0.1)
    assert result.within_budget and result.strength == 1.0


def test_a_strength_that_prunes_nothing_is_said():
    with pytest.warns(UserWarning, match="strength 0.5 of the plan prunes nothing"):
        result = fit(
            nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)),
            plan=Channels(0.03, round_to=1, block=1),
            evaluate=lambda m: float(zeros(m) == 0),
            train=lambda m, x: m(torch.ones(1, 64)).sum(),
            max_drop=0.5,
            rounds=3,
        )
    assert result.sparsity == 0 and result.within_budget


# Tasks


def test_budgets_by_task():
    """The first task may lose all, the second 0.45 of its zeros' metric."""

    def evaluate(model):
        return {"easy": density(model), "hard": 10 * density(model)}

    result = fit(evaluate=evaluate, max_drop={"easy": math.inf, "hard": 4.5}, rounds=3)
    assert [its.strength for its in result.history] == [1.0, 0.5, 0.75]
    assert result.strength == 0.5 and result.within_budget
    assert result.dense == {"easy": 1.0, "hard": 10.0}
    assert result.metrics == pytest.approx({"easy": 0.6, "hard": 6.0})
    with pytest.warns(UserWarning, match="easy 0.45, hard 0.45"):
        result = fit(evaluate=evaluate, max_drop=0.45, rounds=2)
    assert not result.within_budget


@pytest.mark.parametrize("value", [float("nan"), torch.tensor(float("inf"))])
def test_a_metric_that_is_no_number(value):
    model = net()
    before = state(model)
    with pytest.raises(ValueError, match="^fit_sparse: evaluate must give a finite number for 'pitch', got"):
        fit(model, evaluate=lambda m: {"other": 1.0, "pitch": 1.0 if zeros(m) < 0.1 else value})
    assert_untouched(model, before)


def test_evaluation_is_in_evaluation_mode_without_gradients():
    model = nn.Sequential(net(), nn.Dropout(0.5))
    model[1].eval()
    modes, training = [], []

    def evaluate(m):
        modes.append((m.training, m[0].training, m[1].training, torch.is_grad_enabled()))
        return 1.0

    def noting(m, x):
        training.append((m.training, m[1].training))
        return train(m, x)

    result = fit(model, train=noting, evaluate=evaluate, evaluate_every=2, batches=data(4))
    assert modes == [(False, False, False, False)] * len(modes) and len(modes) == 4
    assert training == [(True, True)] * 4
    assert [m.training for m in (result.model, result.model[0], result.model[1])] == [True, True, False]


# The best that was seen


def scripted(metrics, seen):
    """An evaluation that answers as told, and keeps what it was asked about."""
    answers = iter(metrics)

    def evaluate(model):
        seen.append({name: t.clone() for name, t in model.state_dict().items()})
        return next(answers)

    return evaluate


@pytest.mark.parametrize(
    ("metrics", "best", "stage"),
    [
        # dense, pruned, and after 2, 3 and 4 of four steps
        ([1.0, 0.3, 0.5, 0.9, 0.7], 3, "retrained"),
        ([1.0, 0.3, 0.5, 0.4, 0.7], 4, "retrained"),
        ([1.0, 0.8, 0.5, 0.4, 0.7], 1, "pruned"),
    ],
)
def test_the_result_is_the_best_that_was_evaluated(metrics, best, stage):
    seen = []
    result = fit(evaluate=scripted(metrics, seen), batches=data(4), evaluate_every=1)
    assert result.metrics == {"metric": metrics[best]} and result.stage == stage
    assert result.dense["metric"] == 1.0 and result.pruned["metric"] == metrics[1]
    assert result.retrained["metric"] == max(metrics[2:])
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, seen[best][name])
    assert len({tuple(its["0.bias"].tolist()) for its in seen[1:]}) == 4  # they do differ


def test_a_gradual_schedule_is_tried_at_once_and_taken_back():
    seen = []
    model = net()
    result = fit(model, evaluate=lambda m: seen.append(copy.deepcopy(m)) or density(m), batches=data(8))
    dense, pruned, retrained = seen
    assert zeros(dense) == 0 and zeros(pruned) == zeros(retrained) == pytest.approx(0.8)
    assert torch.equal(pruned[0].bias, model[0].bias)
    assert result.report.schedule == "cubic" and result.report.steps == 4

    # the same as by hand, so that nothing of the trial is left
    pruner = Pruner(model, PLAN_OF_80, schedule="cubic", steps=4)
    optimizer = SGD(model.parameters())
    for x in data(8):
        optimizer.zero_grad()
        train(model, x).backward()
        optimizer.step()
        pruner.step()
    model = pruner.finalize()
    for name, tensor in result.model.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=0)
    rows = zip(result.report, pruner.report(), strict=True)
    assert all(mine.energy_kept == pytest.approx(its.energy_kept) for mine, its in rows)


def test_recalibration_comes_before_retraining():
    model = nn.Sequential(nn.Linear(10, 10), nn.BatchNorm1d(10), nn.Linear(10, 10)).eval()
    seen = []
    result = fit(
        model,
        evaluate=lambda m: seen.append(copy.deepcopy(m)) or float(len(seen)),
        schedule="oneshot",
        recalibrate=data(),
    )
    _, pruned, recalibrated, _ = seen
    assert (result.pruned, result.recalibrated, result.retrained) == tuple({"metric": n} for n in (2, 3, 4))
    assert torch.equal(pruned[1].running_mean, model[1].running_mean)
    expected = recalibrated[0](torch.cat(data())).mean(0)
    torch.testing.assert_close(recalibrated[1].running_mean, expected)


def test_a_generator_of_batches_serves_every_round():
    result = fit(
        criterion="wanda",
        calibration=(x for x in data()),
        recalibrate=(x for x in data()),
        max_drop=0.3,
        rounds=3,
    )
    assert len(result.history) == 3


def test_criteria_of_training_are_not_tried_before_it():
    stages = Recorder()
    result = fit(criterion="movement", callbacks=[stages], batches=data(6))
    assert result.pruned is None and result.sparsity == pytest.approx(0.8)
    assert [call for call in stages.calls if call[0] in ("dense", "pruned", "retrained")] == [
        ("dense", 0),
        ("retrained", 6),
    ]
    assert "movement" in str(result.report)


# The model that was given


def failing(at):
    calls = []

    def wrapped(model, x):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return train(model, x)

    return wrapped


@pytest.mark.parametrize("inplace", [False, True])
def test_the_given_model_is_not_touched(inplace):
    model = net()
    model[0].weight.requires_grad_(False)
    before = state(model)
    recorder = Recorder()
    for broken in (failing(1), failing(5)):
        with pytest.raises(KeyboardInterrupt), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the frozen weight
            fit(model, train=broken, max_drop=0.01, inplace=inplace, callbacks=[recorder])
        assert recorder.calls[-1] == ("end", None)
        assert_untouched(model, before)
    if not inplace:
        with pytest.warns(UserWarning, match="frozen"):
            result = fit(model, distill=Distiller(model))
        assert_untouched(model, before)
        assert result.model is not model and all(p.grad is None for p in result.model.parameters())
        assert all(p.grad is None for p in model.parameters())


def test_inplace():
    model = net()
    parameters = list(model.parameters())
    twin = copy.deepcopy(model)
    result = fit(model, inplace=True, max_drop=0.45)
    assert result.model is model and PLAN in vars(model)
    assert all(mine is its for mine, its in zip(model.parameters(), parameters, strict=True))
    expected = fit(twin, max_drop=0.45).model
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name])


def test_seed():
    def dropping(model, x):
        return F.mse_loss(F.dropout(model(x)), x)

    torch.manual_seed(5)
    expected = torch.rand(3)
    results = []
    for other in (5, 6):
        model = net().requires_grad_(True)
        model.load_state_dict(results[0][1] if results else model.state_dict())
        given = copy.deepcopy(model.state_dict())
        torch.manual_seed(other)
        results.append((fit(model, train=dropping, seed=3).model, given))
        if other == 5:
            assert torch.equal(torch.rand(3), expected)
    for mine, its in zip(*(model.parameters() for model, _ in results), strict=True):
        assert torch.equal(mine, its)
