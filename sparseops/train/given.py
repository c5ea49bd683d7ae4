"""Masks that a user brings, as the targets of a pruner that keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparseops._eligible import find_layers
from sparseops.prune import Unstructured
from sparseops.train.targets import IMPOSSIBLE, Target


def fixed_targets(model: nn.Module, masks: Mapping[str, Tensor]) -> list[Target]:
    """A target for each mask.

    Raises:
        TypeError: a mask is no bool tensor.
        ValueError: there is none, or one is not of a weight that can be pruned, or has another shape.
    """
    if not masks:
        raise ValueError("Pruner: plan must hold at least one mask, got none")
    layers = {layer.name: layer for layer in find_layers(model, pattern=Unstructured())}
    targets = []
    for name, mask in masks.items():
        owner, _, parameter = name.rpartition(".")
        weight = dict(model.named_parameters()).get(name)
        if owner not in layers or weight is None or layers[owner].code in IMPOSSIBLE:
            raise ValueError(f"Pruner: plan must name parameters of layers that can be pruned, got {name!r}")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"Pruner: plan must hold bool masks, got {got} for {name}")
        if mask.shape != weight.shape:
            raise ValueError(
                f"Pruner: plan must hold masks of their parameters' shapes, got {tuple(mask.shape)} for "
                f"{name} of shape {tuple(weight.shape)}"
            )
        targets.append(Target(replace(layers[owner], code=None, reason=""), parameter))
    return targets
