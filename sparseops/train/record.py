"""What a finished pruner leaves in a model: the plan that ``convert`` packs its zeros by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparseops.formats.nm24 import is_24
from sparseops.prune import Channels, Plan, Treatment
from sparseops.prune.plan import plan_of
from sparseops.train.targets import Target


def recorded_plan(targets: list[Target], masks: Mapping[str, Tensor]) -> Plan:
    """By the names of the layers what their masks are, and None for the others."""
    by_layer: dict[str, list[Target]] = {}
    for target in targets:
        if target.weight.dim() < 2:
            continue  # a given mask of a bias
        by_layer.setdefault(target.layer.name, []).append(target)
    return plan_of({name: _pattern_of(its, masks) for name, its in by_layer.items()})


def _pattern_of(targets: list[Target], masks: Mapping[str, Tensor]) -> Treatment:
    """A magnitude is enough to find what is zero, so that convert needs nothing of the criterion."""
    asked: Any = targets[0].layer.treatment
    views = [target.logical(masks[target.name]) for target in targets]
    if isinstance(asked, Channels) and _has_zero_channels(targets, views):
        return Channels(side="both", then=asked.then)
    if isinstance(asked, str) or all(map(is_24, views)):
        return "2:4"
    return None if isinstance(asked, Channels) else asked


def _has_zero_channels(targets: list[Target], views: list[Tensor]) -> bool:
    if isinstance(targets[0].layer.module, nn.RNNBase):
        # A dropped feature is a column, and so is a dropped unit, of the weight that reads the state.
        return any(not view.any(0).all() for view in views)
    view = views[0].flatten(2) if views[0].dim() > 2 else views[0].unsqueeze(2)
    outputs = view.any(2).any(1)
    inputs = view.unflatten(0, (targets[0].groups, -1)).any(3).any(1)
    return not bool(outputs.all() and inputs.all())
