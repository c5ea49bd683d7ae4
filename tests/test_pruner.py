"""``Pruner`` in a training loop: schedules, and zeros that stay zero whatever trains the model."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from pruner_net import (
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

from sparseops import Channels, Plan, Pruner, Unstructured
from sparseops.formats import NM24


@every_plan
def test_oneshot_prunes_when_it_is_made(plan):
    model, dense = Net(), Net()
    pruner = Pruner(model, plan)
    assert pruner.level == 1.0
    assert_zeros(model, pruner)
    for name, mask in pruner.masks.items():
        assert torch.equal(model.get_parameter(name)[mask], dense.get_parameter(name)[mask])
    untouched = dense.state_dict().keys() - pruner.masks.keys()
    for name in untouched:
        assert torch.equal(model.state_dict()[name], dense.state_dict()[name])


@every_plan
@pytest.mark.parametrize("schedule", ["linear", "cubic"])
def test_schedule_drops_more_and_more_and_nothing_comes_back(plan, schedule):
    model = Net()
    pruner = Pruner(model, plan, schedule=schedule, steps=8)
    assert pruner.sparsity == 0.0 and pruner.level == 0.0
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    before, shares = None, []
    for step in range(1, 11):
        train(model, pruner, optimizer, 1)
        t = min(step / 8, 1)
        assert pruner.level == pytest.approx(t if schedule == "linear" else 1 - (1 - t) ** 3)
        assert_zeros(model, pruner)
        if before is not None:
            for name, mask in pruner.masks.items():
                assert not (mask & ~before[name]).any(), name
        before = pruner.masks
        shares.append(pruner.sparsity)
    assert shares == sorted(shares) and shares[7] == shares[9] > shares[0]
    # of which layers channels go, and so how many weights, is up to training where they compete
    tolerance = 0.01 if getattr(plan, "scope", "local") == "local" else 0.1
    assert shares[-1] == pytest.approx(Pruner(Net(), plan).sparsity, abs=tolerance)


def test_every_chooses_masks_less_often():
    model = Net()
    pruner = Pruner(model, "2:4", schedule="linear", steps=7, every=3)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    levels = []
    for _ in range(8):
        train(model, pruner, optimizer, 1)
        levels.append(pruner.level)
    assert levels == [0, 0, 3 / 7, 3 / 7, 3 / 7, 6 / 7, 1, 1]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_under_every_optimizer(name):
    model = Net()
    optimizer = OPTIMIZERS[name](model.parameters())
    F.cross_entropy(model(X), Y).backward()
    optimizer.step()  # so that there is momentum from before
    pruner = Pruner(model, PLAN, schedule="linear", steps=3)
    before = weights(model)
    for _ in range(5):
        train(model, pruner, optimizer, 1)
        assert_zeros(model, pruner)
    assert not torch.equal(before["fc1.weight"], model.fc1.weight)


def test_dropped_weights_count_for_no_gradient_norm():
    model = Net()
    pruner = Pruner(model, PLAN)
    F.cross_entropy(model(X), Y).backward()
    for name, mask in pruner.masks.items():
        grad = model.get_parameter(name).grad
        assert (grad[~mask] == 0).all() and (grad[mask] != 0).any()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    kept = [p.grad[pruner.masks[n]] if n in pruner.masks else p.grad for n, p in model.named_parameters()]
    assert norm == pytest.approx(float(torch.cat([g.flatten() for g in kept]).norm()), rel=1e-5)


def test_gradient_scaler_and_autocast():
    model = Net()
    pruner = Pruner(model, PLAN, schedule="cubic", steps=3)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(5):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(X).float(), Y)
        if step == 2:
            loss = loss * torch.inf  # a step that the scaler leaves out
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        pruner.step()
        assert_zeros(model, pruner)
    assert all(p.isfinite().all() for p in model.parameters())


def test_average_of_the_weights_follows():
    model = Net()
    pruner = Pruner(model, PLAN, schedule="linear", steps=4)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn()
    )
    pruner.follow(average)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        average.update_parameters(model)
        pruner.step()
        assert_zeros(average.module, pruner)
    assert not torch.equal(average.module.fc1.weight, model.fc1.weight)
    with pytest.raises(
        ValueError, match=r"follow: model must have a parameter conv1.weight of shape \(32, 3"
    ):
        pruner.follow(nn.Linear(2, 2))
    wider = Net()
    wider.fc2 = nn.Linear(64, 10)
    with pytest.raises(ValueError, match=r"a parameter fc2.weight of shape \(10, 32\), got a Net without"):
        pruner.follow(wider)


@every_plan
@pytest.mark.parametrize("training", ["fixed", "straight-through"])
def test_resumed_in_the_middle_it_gives_equal_bits(plan, training):
    def start():
        model = Net()
        pruner = Pruner(model, plan, schedule="cubic", steps=6, training=training)
        return model, pruner, OPTIMIZERS["adamw"](model.parameters())

    model, pruner, optimizer = start()
    train(model, pruner, optimizer, 3)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, pruner, optimizer)], file)
    train(model, pruner, optimizer, 5)

    file.seek(0)
    again = start()
    for part, state in zip(again, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*again, 5)
    assert_equal(weights(model), weights(again[0]))
    assert_equal(pruner.masks, again[1].masks)
    assert (pruner.level, pruner.count) == (again[1].level, again[1].count) == (1.0, 8)
    assert pruner.report().to_json() == again[1].report().to_json()


def test_state_of_another_plan_is_refused():
    state = Pruner(Net(), "2:4").state_dict()
    with pytest.raises(
        ValueError, match=r"plan must be that of this pruner, 'Channels\(ratio=0.5\)', got .*2:4"
    ):
        Pruner(Net(), Channels(ratio=0.5)).load_state_dict(state)
    with pytest.raises(ValueError, match="schedule must be that of this pruner, 'linear', got 'oneshot'"):
        Pruner(Net(), "2:4", schedule="linear").load_state_dict(state)
    with pytest.raises(ValueError, match="criterion must be that of this pruner, 'l2', got 'l1'"):
        Pruner(Net(), "2:4", criterion="l2").load_state_dict(state)
    with pytest.raises(ValueError, match="masks must be of this model's pruned weights, got conv2.weight"):
        Pruner(nn.Sequential(nn.Linear(64, 64)), "2:4").load_state_dict(state)
    with pytest.raises(ValueError, match="version must be 1, got None"):
        Pruner(Net(), "2:4").load_state_dict({})


def test_straight_through_lets_weights_come_back():
    model = Net()
    pruner = Pruner(model, Plan({"fc1": "2:4"}), training="straight-through", decay=0.0)
    first = pruner.masks["fc1.weight"]
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    back = False
    for _ in range(20):
        train(model, pruner, optimizer, 1)
        assert_zeros(model, pruner)
        NM24.from_dense(model.fc1.weight.detach())
        back |= bool((pruner.masks["fc1.weight"] & ~first).any())
    assert back


def test_straight_through_is_the_dense_weight_moved_by_the_gradient_of_the_masked_one():
    torch.manual_seed(0)
    layer = nn.Linear(32, 8, bias=False)
    dense = layer.weight.detach().double().clone()
    pruner = Pruner(layer, "2:4", training="straight-through", decay=0.1)
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    x, y = torch.randn(5, 32), torch.randn(5, 8)
    for _ in range(6):
        quads = dense.view(8, 8, 4)
        mask = torch.zeros_like(quads).scatter_(2, quads.abs().topk(2, 2).indices, 1.0).view(8, 32)
        masked = (dense * mask).requires_grad_()
        F.mse_loss(x.double() @ masked.t(), y.double()).backward()
        # what is dropped shrinks, and moves by the gradient at zero
        dense = torch.where(mask.bool(), dense, dense * 0.9) - 0.5 * masked.grad
        optimizer.zero_grad()
        F.mse_loss(layer(x), y).backward()
        optimizer.step()
        pruner.step()
    quads = dense.view(8, 8, 4)
    mask = torch.zeros_like(quads).scatter_(2, quads.abs().topk(2, 2).indices, 1.0).view(8, 32).bool()
    torch.testing.assert_close(layer.weight.double(), dense * mask, rtol=1e-4, atol=1e-5)


def test_straight_through_gives_back_what_it_holds():
    layer = nn.Linear(32, 8)
    dense = layer.weight.detach().clone()
    pruner = Pruner(layer, Unstructured(ratio=0.5), training="straight-through")
    pruner.prune(0.5)
    assert pruner.sparsity == 0.25
    assert torch.equal(layer.weight.detach(), dense * pruner.masks["weight"])


@pytest.mark.parametrize(
    "calibration", [None, [(torch.ones(1, 32), torch.ones(1, 8))]], ids=["alone", "with"]
)
def test_movement_learns_from_training(calibration):
    torch.manual_seed(0)
    layer = nn.Linear(32, 8, bias=False)
    options = {"criterion": "movement", "schedule": "linear", "steps": 3, "every": 3}
    options |= {"calibration": calibration, "loss": F.mse_loss}
    pruner = Pruner(layer, Unstructured(ratio=0.5), **options)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    x, y = torch.randn(5, 32), torch.randn(5, 8)
    moved = torch.zeros(8, 32)
    for _ in range(3):
        before = layer.weight.detach().clone()
        optimizer.zero_grad()
        F.mse_loss(layer(x), y).backward()
        moved -= before * layer.weight.grad
        optimizer.step()
        pruner.step()
    kept = moved.flatten().topk(128).indices
    expected = torch.zeros(256, dtype=torch.bool).index_fill_(0, kept, True).view(8, 32)
    assert torch.equal(pruner.masks["weight"], expected)


def test_finalize_before_the_end_says_so():
    model = Net()
    pruner = Pruner(model, "2:4", schedule="linear", steps=10)
    train(model, pruner, OPTIMIZERS["sgd"](model.parameters()), 3)
    with pytest.warns(UserWarning, match=r"finalize: 30% of the plan is carried out, at step 3 of 10"):
        pruner.finalize()
    for call in (pruner.step, pruner.prune, pruner.finalize, lambda: pruner.load_state_dict({})):
        with pytest.raises(RuntimeError, match="pruner must not be finalized, got one that is"):
            call()
    Pruner(model, "2:4")  # and another one may have it now


def test_prune_by_hand():
    model = Net()
    pruner = Pruner(model, Unstructured(ratio=0.8), schedule="linear", steps=100)
    pruner.prune(0.5)
    assert pruner.sparsity == pytest.approx(0.4, abs=1e-3) and pruner.level == 0.5
    pruner.prune()
    assert pruner.sparsity == pytest.approx(0.8, abs=1e-3)
    with pytest.raises(ValueError, match="level must be at least the one that is reached, 1, got 0.2"):
        pruner.prune(0.2)
    with pytest.raises(ValueError, match=r"level must be in \[0, 1\], got 1.5"):
        pruner.prune(1.5)


def test_state_from_before_anything_was_dropped():
    def start():
        model = Net()
        return model, Pruner(model, "2:4", schedule="linear", steps=3), OPTIMIZERS["sgd"](model.parameters())

    fresh, tried = start(), start()
    state, dense = copy.deepcopy(tried[1].state_dict()), weights(tried[0])
    tried[1].prune()
    tried[0].load_state_dict(dense)
    tried[1].load_state_dict(state)
    assert tried[1].sparsity == 0.0
    for each in (fresh, tried):
        train(*each, 1)
    assert_equal(weights(fresh[0]), weights(tried[0]))
    assert fresh[1].report().to_json() == tried[1].report().to_json()
