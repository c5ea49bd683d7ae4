"""The loop of ``fit_sparse``, loops of the user's, callbacks and errors."""

import copy
import json
import math
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_untouched, state
from fit_net import PLAN_OF_80, SGD, Recorder, data, density, fit, net, train, zeros
from torch import nn

from sparseops.prune import Channels
from sparseops.train.distill import Distiller

# The loop


@pytest.mark.parametrize("precision", [None, "bf16", "fp16"])
@pytest.mark.parametrize("schedule", ["oneshot", "cubic"])
@pytest.mark.parametrize("plan", ["2:4", PLAN_OF_80, Channels(0.5, round_to=8)])
def test_zeros_are_exact(precision, schedule, plan):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    optimizer = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    dtypes = set()

    def training(m, x):
        y = m(x)
        dtypes.add(y.dtype)
        return F.mse_loss(y.float(), x.flip(1))

    result = fit(
        model,
        plan,
        train=training,
        evaluate=lambda m: 1.0,
        batches=[torch.randn(8, 64) for _ in range(6)],
        optimizer=optimizer,
        precision=precision,
        schedule=schedule,
        clip=1.0,
    )
    named = {"bf16": torch.bfloat16, "fp16": torch.float16}
    assert dtypes == {named.get(precision, torch.float32)}
    assert result.model[0].weight.dtype == torch.float32
    assert not torch.equal(result.model[0].bias, model[0].bias)
    if plan == "2:4":
        groups = result.model[0].weight.view(64, 16, 4)
        assert (groups != 0).sum(-1).eq(2).all()
    elif plan is PLAN_OF_80:
        assert int((result.model[0].weight == 0).sum()) == int(0.8 * 4096)
    else:
        assert int((result.model[0].weight == 0).all(1).sum()) == 32
    assert zeros(result.model) == pytest.approx(result.sparsity)


def test_a_step_of_several_losses():
    """One step of plain gradient descent on the weighted sum, with the gradient's norm limited."""
    model, (x,) = net(), data(1)

    def losses(m):
        y = m(x)
        return {"near": F.mse_loss(y, x), "far": y.square().mean(), "plain": y.mean()}

    recorder = Recorder()
    result = fit(
        model,
        train=lambda m, batch: losses(m),
        batches=[x],
        loss_weights={"near": 2.0, "far": 0.5},
        clip=0.01,
        optimizer=partial(torch.optim.SGD, lr=1.0),
        schedule="oneshot",
        callbacks=[recorder],
    )
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer, mine in ((twin[0], result.model[0]), (twin[2], result.model[2])):
            layer.weight *= mine.weight != 0
    found = losses(twin)
    total = 2 * found["near"] + 0.5 * found["far"] + found["plain"]
    total.backward()
    grads = [p.grad * ((p != 0) if p.dim() > 1 else 1) for p in twin.parameters()]
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
    for mine, its, grad in zip(result.model.parameters(), twin.parameters(), grads, strict=True):
        torch.testing.assert_close(mine, its - grad * 0.01 / norm)
    (values,) = recorder.values
    expected = {f"loss/{name}": loss.item() for name, loss in found.items()}
    expected |= {"loss": total.item(), "gradient_norm": norm, "learning_rate": 1.0, "sparsity": 0.8}
    assert values == pytest.approx(expected, rel=1e-4)
    assert result.history[0].losses == pytest.approx(
        {name: value for name, value in expected.items() if name.startswith("loss")}, rel=1e-4
    )


def test_tasks_may_take_turns():
    result = fit(
        train=lambda m, batch: {batch[0]: m(batch[1]).mean() * 0 + batch[2]},
        batches=[(task, data()[0], value) for task, value in (("a", 1.0), ("b", 5.0), ("a", 2.0))],
        loss_weights={"b": 2.0},
        evaluate=lambda m: 1.0,
    )
    assert result.history[0].losses == {"loss": pytest.approx(13 / 3), "loss/a": 1.5, "loss/b": 5.0}


def test_batches_begin_again():
    fed = []

    def noting(model, x):
        fed.append(x[0, 0].item())
        return train(model, x)

    batches = data(3)
    first = [x[0, 0].item() for x in batches]
    result = fit(train=noting, batches=batches, steps=7, max_drop=0.5, rounds=2)
    assert fed == (first * 3)[:7] * 2 and [its.steps for its in result.history] == [7, 7]
    fed.clear()
    fit(train=noting, batches=batches)
    assert fed == first
    fed.clear()
    fit(train=noting, batches=(x for x in batches), steps=3)
    assert fed == first
    with pytest.raises(ValueError, match="batches must begin again .* got a generator that is used up"):
        fit(train=noting, batches=(x for x in batches), steps=4)


def test_the_learning_rate():
    recorder = Recorder()
    fit(
        lr_schedule=lambda optimizer, steps: torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 1 - step / steps
        ),
        batches=data(4),
        callbacks=[recorder],
        rounds=2,
        max_drop=0.5,
        optimizer=partial(torch.optim.SGD, lr=4.0),
        train=lambda m, x: m(x).mean() * 0,
    )
    assert [values["learning_rate"] for values in recorder.values] == [4.0, 3.0, 2.0, 1.0] * 2


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_gradients_are_limited_by_their_true_size(precision):
    """Not by the scaled one of fp16."""
    model, norms, results = net(), [], []
    for its in (None, precision):
        recorder = Recorder()
        results.append(fit(model, precision=its, clip=0.01, callbacks=[recorder], schedule="oneshot").model)
        norms.append([values["gradient_norm"] for values in recorder.values])
    assert norms[1] == pytest.approx(norms[0], rel=0.05)
    for mine, its, given in zip(*(m.parameters() for m in (*results, model)), strict=True):
        torch.testing.assert_close(mine - (mine != 0) * given, its - (its != 0) * given, rtol=0, atol=1e-4)


def test_steps_that_fp16_leaves_out_do_not_count_for_the_schedule():
    model, recorder = net(), Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = fit(
            model,
            lr_schedule=lambda optimizer, steps: torch.optim.lr_scheduler.LinearLR(
                optimizer, 1.0, 0.0, steps
            ),
            callbacks=[recorder],
            train=lambda m, x: m(x).float().mean() * 1e36,
            precision="fp16",
        )
    assert [values["learning_rate"] for values in recorder.values] == [0.05] * 3
    assert torch.equal(result.model[0].bias, model[0].bias)
    assert zeros(result.model) == pytest.approx(0.8)


def test_a_loop_that_trains_another_model():
    model = net()
    with pytest.raises(ValueError, match="train must compute the loss with the model that it is given"):
        fit(model, train=lambda m, x: train(model, x))


def test_the_default_optimizer():
    recorder = Recorder()
    fit(callbacks=[recorder], optimizer=None)
    assert recorder.values[0]["learning_rate"] == 1e-3
    made = []
    fit(optimizer=lambda parameters: made.append(parameters) or SGD(parameters), max_drop=0.45, rounds=2)
    assert len(made) == 2 and made[0][0] is not made[1][0]


def test_parameters_that_are_frozen_stay():
    model = net()
    model[2].requires_grad_(False)
    given = copy.deepcopy(model[2].state_dict())
    counts = []
    plan = {"0.weight": torch.rand(10, 10) < 0.5}
    result = fit(
        model, plan, rounds=1, optimizer=lambda parameters: counts.append(len(parameters)) or SGD(parameters)
    )
    assert counts == [2]
    assert all(torch.equal(t, given[name]) for name, t in result.model[2].state_dict().items())
    assert torch.equal(result.model[0].weight != 0, plan["0.weight"])
    with pytest.raises(ValueError, match="model must have parameters that require gradients, got none"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(net().requires_grad_(False))


def test_distillation():
    """The loss is the mixture, and the teacher may be the model that is given."""
    model, (x,) = net(), data(1)
    recorder = Recorder()
    distiller = Distiller(model, alpha=0.25, features=["0"])
    fit(model, distill=distiller, batches=[x], schedule="oneshot", callbacks=[recorder])
    (values,) = recorder.values
    student = copy.deepcopy(model)
    with torch.no_grad():
        for p in (student[0].weight, student[2].weight):
            p[p.abs() <= p.abs().flatten().kthvalue(80).values] = 0
    distilled = distiller(student, x)[1].item()
    assert values["distillation"] == pytest.approx(distilled, rel=1e-4)
    assert values["loss"] == pytest.approx(0.75 * train(student, x).item() + 0.25 * distilled, rel=1e-4)
    with pytest.raises(ValueError, match="student must be called .* got no call"):
        fit(model, train=lambda m, x: m[0](x).mean(), distill=distiller)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(value):
    with pytest.raises(ValueError, match=r"train must give finite losses, got a mean loss of (nan|inf) in 3"):
        fit(train=lambda m, x: m(x).mean() * value)


# A loop of the user's


def loop_of(steps, optimizer=SGD, calls=1):
    def loop(model, pruner):
        stepping = optimizer(model.parameters())
        for x in data(steps):
            stepping.zero_grad()
            train(model, x).backward()
            stepping.step()
            for _ in range(calls):
                pruner.step()
        return {"last": torch.tensor(2.5)}

    return loop


def test_a_loop_of_ones_own():
    recorder = Recorder()
    options = {"batches": None, "optimizer": None, "callbacks": [recorder]}
    result = fit(train=loop_of(3), max_drop=0.45, rounds=2, **options)
    assert result.report.schedule == "oneshot"
    assert result.history[0].losses == {"last": 2.5} and result.history[0].steps == 3
    assert result.strength == 0.5 and zeros(result.model) == pytest.approx(0.4)
    assert [call for call in recorder.calls if call[0] in ("round", "retrained")] == [
        ("round", 0, 1, 1.0),
        ("retrained", 3),
        ("round", 3, 2, 0.5),
        ("retrained", 6),
    ]
    result = fit(train=loop_of(3), steps=3, schedule="linear", **options)
    assert result.report.steps == 3 and zeros(result.model) == pytest.approx(0.8)
    assert fit(train=lambda m, pruner: None, **options).history[0].losses == {}
    assert fit(train=lambda m, pruner: 1.5, **options).history[0].losses == {"loss": 1.5}
    modes = []
    fit(net().eval(), train=lambda m, pruner: modes.append(m.training), **options)
    assert modes == [True]


def test_a_loop_that_forgets_the_pruner():
    options = {"batches": None, "optimizer": None}
    with pytest.raises(ValueError, match=r"call pruner.step\(\) 4 times at least, got 3 calls"):
        fit(train=loop_of(3), steps=4, schedule="linear", **options)
    momentum = partial(torch.optim.SGD, lr=0.1)

    def forgetful(model, pruner):
        model[2].weight.data[0] += 1
        loop_of(2, momentum, calls=0)(model, pruner)

    with pytest.raises(ValueError, match=r"pruner.step\(\) after each .* zeros of 2.weight that are none"):
        fit(train=forgetful, **options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", SGD),
        ("lr_schedule", lambda optimizer, steps: None),
        ("loss_weights", {"a": 1.0}),
        ("precision", "bf16"),
        ("clip", 1.0),
        ("evaluate_every", 3),
        ("distill", Distiller(net())),
    ],
)
def test_what_needs_batches(name, value):
    with pytest.raises(ValueError, match=f"^fit_sparse: {name} must be None without batches"):
        fit(**{"batches": None, "optimizer": None, "train": loop_of(1), name: value})


# Callbacks and the report


def test_callbacks():
    recorder, rare = Recorder(), Recorder(every=2)
    result = fit(max_drop=0.45, rounds=2, callbacks=[recorder, rare])
    assert recorder.calls == [
        ("start", 2),
        ("dense", 0),
        ("round", 0, 1, 1.0),
        ("pruned", 0),
        *[("step", n) for n in (1, 2, 3)],
        ("retrained", 3),
        ("round", 3, 2, 0.5),
        ("pruned", 3),
        *[("step", n) for n in (4, 5, 6)],
        ("retrained", 6),
        ("end", result),
    ]
    assert [call[1] for call in rare.calls if call[0] == "step"] == [2, 4, 6]
    assert all(values.keys() == {"loss", "learning_rate", "sparsity"} for values in recorder.values)


def test_report(tmp_path, capsys):
    result = fit(
        evaluate=lambda m: {"a": density(m), "b": 2 * density(m)},
        max_drop={"a": 0.45, "b": math.inf},
        rounds=2,
        seed=0,
    )
    found = json.loads(result.to_json())
    assert found["strength"] == 0.5 and found["max_drop"] == {"a": 0.45, "b": None}
    assert found["dense"] == {"a": 1.0, "b": 2.0} and found["plan"] == repr(PLAN_OF_80)
    assert [its["strength"] for its in found["history"]] == [1.0, 0.5]
    assert found["history"][1]["retrained"] == pytest.approx({"a": 0.6, "b": 1.2})
    assert len(found["report"]["weights"]) == len(result.report)
    lines = str(result).splitlines()
    assert lines[0] == "Sequential, Unstructured(ratio=0.8): strength 0.5, 40.0% zeros, within the budget"
    assert "a (dense 1, max_drop 0.45)" in lines[2] and "b (dense 2)" in lines[2]
    assert lines[4].split()[:6] == ["1", "1", "80.0%", "0.2", "→", "0.2"] and lines[4].endswith("over")
    assert lines[5].endswith("within, the result (retrained)")
    result.print()
    assert capsys.readouterr().out.split() == str(result).split()
    assert repr(result) == "<FitResult: strength 0.5, 40.0% zeros, within the budget>"
    result.plot(tmp_path / "fit.png")
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")


# Errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rounds": 0}, ValueError, "rounds must be at least 1, got 0"),
        ({"steps": 1.5}, TypeError, "steps must be an integer, got 1.5"),
        ({"evaluate_every": True}, TypeError, "evaluate_every must be an integer, got True"),
        ({"precision": "fp8"}, ValueError, 'precision must be one of "bf16", "fp16", None, got \'fp8\''),
        ({"clip": 0.0}, ValueError, "clip must be greater than 0, got 0.0"),
        ({"distill": 3}, TypeError, "distill must be a Distiller, got int"),
        ({"callbacks": [print]}, TypeError, "callbacks must be of train.loggers.Callback, got <built-in"),
        ({"batches": []}, ValueError, "batches must hold at least one batch, got none"),
        ({"batches": torch.ones(2)}, TypeError, r"batches must be an iterable of .* got Tensor"),
        ({"batches": iter(data())}, ValueError, "steps must be given .* got None with a list_iterator"),
        ({"max_drop": -0.1}, ValueError, "max_drop must be at least 0, got -0.1 for 'metric'"),
        ({"max_drop": {"a": 1}}, ValueError, "max_drop must name the tasks of evaluate, metric, got a"),
        ({"evaluate": lambda m: None}, TypeError, "evaluate must give a number for 'metric', got NoneType"),
        ({"evaluate": lambda m: {}}, ValueError, "evaluate must give at least one metric, got none"),
        (
            {"evaluate": lambda m: {"b" if zeros(m) else "a": 1}},
            ValueError,
            r"evaluate must give the same tasks each time, \['a'\], got \['b'\]",
        ),
        (
            {"train": lambda m, x: m(x)},
            TypeError,
            r"train must give .* one element, got one of shape \(4, 10",
        ),
        ({"train": lambda m, x: {"a": 1.0}}, TypeError, "train must give .* for 'a', got float"),
        (
            {"loss_weights": {"a": 1.0}},
            ValueError,
            r"loss_weights must name losses that train gives, \['loss'\], got \['loss/a'\]",
        ),
        ({"strength": 0.5}, TypeError, "options of Pruner must be of every, .* got strength"),
        (
            {"plan": {"0.weight": torch.ones(10, 10, dtype=torch.bool)}},
            ValueError,
            "rounds must be 1 with masks as plan, which have no strength, got 3",
        ),
        (
            {"batches": None, "optimizer": None, "schedule": "cubic"},
            ValueError,
            "steps must be given with schedule 'cubic' and a loop of yours, got None",
        ),
    ],
)
def test_errors(options, error, message):
    model = net()
    before = state(model)
    with pytest.raises(error, match=f"^fit_sparse: {message}"):
        fit(model, **options)
    assert_untouched(model, before)


def test_the_model_must_be_a_module():
    with pytest.raises(TypeError, match="^fit_sparse: model must be a torch.nn.Module, got function$"):
        fit(density)
