"""Part of a plan: smaller ratios, and 2:4 in the layers that lose the least by it."""

from __future__ import annotations

from dataclasses import replace

import torch

from sparseops.prune import Channels, Layers, Unstructured
from sparseops.train.masks import Judgement, choose_masks
from sparseops.train.targets import Left, Target


def weaken(targets: list[Target], strength: float, judgement: Judgement) -> tuple[list[Target], list[Left]]:
    """The targets of ``strength`` times the plan, and the layers that it leaves dense for that.

    Ratios and thresholds are multiplied by it. A layer that is 2:4 in part would win nothing, so that of the
    layers to be 2:4 this share is, rounded down: those that lose the least of their weights' squared sum.
    """
    whole = [target for target in targets if isinstance(target.layer.treatment, str)]
    losses = _losses(whole, judgement)
    order = sorted(losses, key=losses.__getitem__)
    taken = set(order[: int(strength * len(order))])
    kept: list[Target] = []
    left: dict[str, Left] = {}
    for target in targets:
        layer = target.layer
        if isinstance(layer.treatment, str):
            if layer.name in taken:
                kept.append(target)
            else:
                reason = f"loses {losses[layer.name]:.1%}, more than others, and strength is {strength:g}"
                left[layer.name] = Left(layer, reason)
            continue
        kept.append(replace(target, layer=replace(layer, treatment=_weaker(layer.treatment, strength))))
    return kept, list(left.values())


def _weaker(rule: object, strength: float) -> Channels | Unstructured | Layers:
    assert isinstance(rule, (Channels, Unstructured, Layers))
    threshold = None if rule.threshold is None else rule.threshold * strength
    return replace(rule, ratio=rule.ratio * strength, threshold=threshold)


def _losses(targets: list[Target], judgement: Judgement) -> dict[str, float]:
    """By layer, the share of the squared weights that 2:4 drops."""
    if not targets:
        return {}
    masks, _ = choose_masks(targets, judgement, 1.0)
    sums: dict[str, list[float]] = {}
    for target in targets:
        squares = judgement.weights[target.name].double().square()
        dropped = torch.where(masks[target.name], 0.0, squares).sum()
        total, lost = sums.setdefault(target.layer.name, [0.0, 0.0])
        sums[target.layer.name] = [total + float(squares.sum()), lost + float(dropped)]
    return {name: lost / total if total else 0.0 for name, (total, lost) in sums.items()}
