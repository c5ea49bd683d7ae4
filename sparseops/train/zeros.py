"""Keeping dropped weights zero while whatever optimizer moves them, and what training tells of weights."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparseops.train import shards
from sparseops.train.masks import Masks
from sparseops.train.targets import Target


class Zeros:
    """The masks of some weights, and what they hold back.

    masks: whole ones, by name; {} before the first are set. dropped: with ``keeps_dropped`` the weights that
    are zero in the model but live on here, this process's part of each.
    """

    def __init__(self, targets: Sequence[Target], *, keeps_dropped: bool) -> None:
        self.targets = targets
        self.masks: Masks = {}
        self.dropped: dict[str, Tensor] = {}
        self._keeps_dropped = keeps_dropped
        self._gone: dict[str, Tensor] = {}
        self._followers: list[weakref.ref[nn.Module]] = []
        self._hooks: list[Any] = []
        self._unhook = weakref.finalize(self, _remove, self._hooks)
        if keeps_dropped:
            return  # which need their gradients
        me = weakref.ref(self)
        for target in targets:
            if target.weight.requires_grad:
                hook = _without_gradient(me, target.name)
                self._hooks.append(target.weight.register_post_accumulate_grad_hook(hook))

    def set(self, masks: Mapping[str, Tensor]) -> None:
        """Other masks, {} for none; ``settle`` makes the weights obey them."""
        self.masks = dict(masks)
        of_masks = [target for target in self.targets if target.name in masks]
        self._gone = {t.name: ~shards.local_like(t.weight, masks[t.name]) for t in of_masks}

    @torch.no_grad()
    def release(self, decay: float) -> None:
        """Bring the dropped weights, a little smaller, back into the model, where what the optimizer did to
        them at zero is added."""
        for target in self.targets:
            if target.name in self.dropped:
                shards.local(target.weight).add_(self.dropped[target.name].mul_(1 - decay))

    @torch.no_grad()
    def settle(self) -> None:
        """Put the dropped weights away, and zeros in their places."""
        if self._keeps_dropped:
            for target in self._masked:
                dropped = shards.local(target.weight).detach().clone()
                self.dropped[target.name] = dropped.masked_fill_(~self._gone[target.name], 0)
        self.mask()

    @torch.no_grad()
    def mask(self) -> None:
        """Zero what is dropped, in the model and in what follows it."""
        followers = [model for ref in self._followers if (model := ref()) is not None]
        for target in self._masked:
            for weight in (target.weight, *(counterpart(model, target) for model in followers)):
                shards.local(weight).masked_fill_(self._gone[target.name], 0)

    def follow(self, model: nn.Module) -> None:
        """Zero the same weights of a copy of the model."""
        for target in self.targets:
            counterpart(model, target)
        self._followers.append(weakref.ref(model))
        self.mask()

    def close(self) -> None:
        """Look at no gradient any more, and forget what was held back."""
        self._unhook()
        self._followers, self.dropped = [], {}

    @property
    def _masked(self) -> list[Target]:
        return [target for target in self.targets if target.name in self._gone]


class Movement:
    """``-sum of w dloss/dw`` over the steps of training (Sanh et al. 2020, "Movement pruning"), of this
    process's part of each weight. It holds a copy of every weight, since a step has changed them by the time
    that it is seen."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = targets
        self._before = {t.name: shards.local(t.weight).detach().clone() for t in targets}
        self.sums = {name: torch.zeros_like(weight) for name, weight in self._before.items()}

    @torch.no_grad()
    def learn(self) -> None:
        """Add the step that is just over."""
        for target in self._targets:
            if (grad := target.weight.grad) is not None:
                self.sums[target.name].addcmul_(self._before[target.name], shards.local(grad), value=-1)

    @torch.no_grad()
    def note(self) -> None:
        """Remember the weights that the next step begins with."""
        for target in self._targets:
            self._before[target.name].copy_(shards.local(target.weight))

    def whole(self, target: Target) -> Tensor:
        """The sums of a weight, gathered from all processes."""
        return shards.whole_like(target.weight, self.sums[target.name])


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()


def counterpart(model: nn.Module, target: Target) -> Tensor:
    """The parameter of a copy of the model, or of the model that an average wraps.

    Raises:
        ValueError: there is none of its name and shape.
    """
    for prefix in ("", "module."):
        try:
            found = model.get_parameter(prefix + target.name)
        except AttributeError:
            continue
        if found.shape == target.weight.shape:
            return found
    raise ValueError(
        f"Pruner.follow: model must have a parameter {target.name} of shape {tuple(target.weight.shape)}, "
        f"got a {type(model).__name__} without"
    )


def _without_gradient(zeros: weakref.ref[Zeros], name: str) -> Callable[[Tensor], None]:
    """A dropped weight has no gradient: it counts for no norm and moves no running average."""

    def after_backward(weight: Tensor) -> None:
        its = zeros()
        if its is not None and weight.grad is not None and name in its._gone:
            with torch.no_grad():
                shards.local(weight.grad).masked_fill_(its._gone[name], 0)

    return after_backward
