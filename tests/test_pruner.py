"""``Pruner``: masks, schedules, and zeros that stay zero whatever trains the model."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparseops import Channels, Layers, Plan, Pruner, Unstructured, convert, explain
from sparseops import nn as sparse_nn
from sparseops.formats import NM24
from sparseops.prune import is_24_transposable

X, Y = torch.randn(16, 3, 8, 8), torch.randint(0, 10, (16,))
PLAN = Plan({"conv1": Channels(ratio=0.25), "conv2": "2:4", "fc1": "2:4t", "fc2": Unstructured(ratio=0.7)})
EVERY_PLAN = {
    "2:4": "2:4",
    "2:4t": "2:4t",
    "channels": Channels(ratio=0.5),
    "both_sides": Channels(ratio=0.5, side="both", scope="global", keep_last=False),
    "channels_24": Channels(ratio=0.5, then="2:4"),
    "unstructured": Unstructured(ratio=0.6),
    "global": Unstructured(ratio=0.6, scope="global", min_kept=0.1),
    "plan": PLAN,
}
every_plan = pytest.mark.parametrize("plan", EVERY_PLAN.values(), ids=EVERY_PLAN)

OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda ps: torch.optim.Adam(ps, 1e-2, weight_decay=0.1),
    "adamw": lambda ps: torch.optim.AdamW(ps, 1e-2, weight_decay=0.1),
    "amsgrad": lambda ps: torch.optim.AdamW(ps, 1e-2, amsgrad=True),
    "nadam": lambda ps: torch.optim.NAdam(ps, 1e-2),
    "radam": lambda ps: torch.optim.RAdam(ps, 1e-2),
    "adamax": lambda ps: torch.optim.Adamax(ps, 1e-2),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, 1e-2),
    "adadelta": lambda ps: torch.optim.Adadelta(ps),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, 1e-3, momentum=0.9, weight_decay=0.1),
    "rprop": lambda ps: torch.optim.Rprop(ps, 1e-3),
    "asgd": lambda ps: torch.optim.ASGD(ps, 1e-2, weight_decay=0.1),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 32, 3, groups=2)
        self.fc1 = nn.Linear(32 * 36, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.conv1(x)))
        return self.fc2(F.relu(self.fc1(F.relu(self.conv2(x)).flatten(1))))


def train(model, pruner, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        pruner.step()


def assert_zeros(model, pruner):
    assert pruner.masks
    for name, mask in pruner.masks.items():
        assert (model.get_parameter(name)[~mask] == 0).all(), name


def weights(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name, t in a.items():
        assert torch.equal(t, b[name]), name


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


def test_movement_learns_from_training():
    torch.manual_seed(0)
    layer = nn.Linear(32, 8, bias=False)
    pruner = Pruner(layer, Unstructured(ratio=0.5), criterion="movement", schedule="linear", steps=3, every=3)
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


@every_plan
def test_finalized_model_converts_as_it_is(plan):
    model = Net().eval()
    state = model.state_dict().keys()
    pruned = Pruner(model, plan).finalize()
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


def test_given_masks_are_kept():
    model = Net()
    masks = {"fc1.weight": torch.rand(32, 32 * 36) > 0.3, "conv2.weight": torch.rand(32, 16, 3, 3) > 0.5}
    pruner = Pruner(model, masks)
    assert_equal(pruner.masks, masks)
    train(model, pruner, OPTIMIZERS["sgd"](model.parameters()), 3)
    assert_zeros(model, pruner)
    assert pruner.report()["fc1.weight"].pattern == "given"
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
    assert 0.4 < report["fc2.weight"].energy_kept < 1 and report["fc2.weight"].dropped == pytest.approx(0.7)
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000
