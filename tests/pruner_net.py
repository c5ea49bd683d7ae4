"""A small model with a layer of each kind that plans prune, and how the tests of ``Pruner`` train it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparseops import Channels, Plan, Unstructured

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
