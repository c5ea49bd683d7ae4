"""Random networks: whatever meets whatever, the compacted network is the masked one."""

import random

import pytest
import torch
from pruned import assert_same, drop, randomise
from torch import nn

from sparseops.compact import compact, explain_compact

ACTIVATIONS = (nn.ReLU, nn.Sigmoid, nn.Hardswish, nn.GELU)
POOLS = (
    lambda: nn.AvgPool2d(3, 1, 1),
    lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    lambda: nn.MaxPool2d(3, 1, 1),
)
JOINS = {
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b.tanh(),
    "cat": lambda a, b: torch.cat([a, b], 1),
}


class Net(nn.Module):
    """Each step applies a layer to an earlier value, or joins two of them."""

    def __init__(self, rng):
        super().__init__()
        self.steps, self.layers = [], nn.ModuleList()
        widths = [3]
        for _ in range(rng.randint(3, 9)):
            a = rng.randrange(max(0, len(widths) - 3), len(widths))
            b = rng.choice([j for j, width in enumerate(widths) if width == widths[a]])
            join, layer = rng.choice([*JOINS, None, None, None, None]), nn.Identity()
            width = widths[a]
            if join == "cat":
                b = rng.randrange(len(widths))
                width += widths[b]
            elif join is None:
                layer, width = random_layer(rng, width)
            self.steps.append((join, a, b))
            self.layers.append(layer)
            widths.append(width)
        self.head = nn.Linear(widths[-1], 5)

    def forward(self, x):
        values = [x]
        for (join, a, b), layer in zip(self.steps, self.layers, strict=True):
            values.append(layer(values[a]) if join is None else JOINS[join](values[a], values[b]))
        return self.head(values[-1].mean((2, 3)))


class Excite(nn.Module):
    """x times a function of its means, of which some channels are dropped."""

    def __init__(self, rng, width):
        super().__init__()
        up = drop(nn.Conv2d(8, width, 1), some(rng, width))
        self.scale = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, 8, 1), nn.ReLU(), up, nn.Sigmoid()
        )

    def forward(self, x):
        return x * self.scale(x)


def some(rng, width):
    return sorted(rng.sample(range(width), rng.randint(1, width)))


def random_layer(rng, width):
    """A layer for so many channels, and how many it gives."""
    kind = rng.choice(
        ["conv"] * 4 + ["depthwise", "grouped", "transposed", "norm", "prelu", "act", "pool", "excite"]
    )
    bias = rng.random() < 0.6
    if kind == "conv":
        outputs = rng.choice([8, 16, 24])
        layer = nn.Conv2d(width, outputs, rng.choice([1, 3]), padding="same", bias=bias)
        if rng.random() < 0.7:
            layer = drop(layer, some(rng, outputs), some(rng, width) if rng.random() < 0.5 else None)
        return layer, outputs
    if kind == "depthwise":
        outputs = width * rng.choice([1, 2])
        return nn.Conv2d(width, outputs, 3, padding=1, groups=width, bias=bias), outputs
    if kind == "grouped" and width % 8 == 0:
        return nn.Conv2d(width, 16, 3, padding=1, groups=rng.choice([2, 4]), bias=bias), 16
    if kind == "transposed":
        return nn.ConvTranspose2d(width, 8, 3, padding=1, bias=bias), 8
    layers = {
        "norm": lambda: nn.BatchNorm2d(width),
        "prelu": lambda: nn.PReLU(width),
        "pool": rng.choice(POOLS),
        "excite": lambda: Excite(rng, width),
    }
    return layers.get(kind, rng.choice(ACTIVATIONS))(), width


@pytest.mark.parametrize("seed", range(60))
def test_random_network(seed):
    model = randomise(Net(random.Random(seed)), seed)
    small = compact(model, torch.randn(2, 3, 6, 5, dtype=torch.float64))
    assert explain_compact(small).reason == ""
    assert_same(small, model, torch.randn(3, 3, 9, 8, dtype=torch.float64))
