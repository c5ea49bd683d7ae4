"""What the networks are built with: a seed for their weights, and the unit of convolution and batch norm."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def seeded(build: Callable[..., Module]) -> Callable[..., Module]:
    """``build`` with an argument ``seed`` (0) that decides every weight; torch's generator is left alone."""

    @wraps(build)
    def build_seeded(*args: Any, seed: int = 0, **kwargs: Any) -> Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build(*args, **kwargs)
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        return model.eval()

    return build_seeded


def conv_norm(
    inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, activation: nn.Module | None
) -> nn.Sequential:
    """Convolution that keeps the side at stride 1, batch norm, and an activation unless it is None."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    layers: list[nn.Module] = [conv, nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([] if activation is None else [activation]))
