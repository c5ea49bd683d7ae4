"""Batches of data as calls of a model: what calibration, recalibration and training loops are given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from sparseops import _measure


@dataclass(frozen=True)
class Batch:
    """inputs: the arguments of one call of the model. target: what the output is compared with, None where
    the batch brings none."""

    inputs: _measure.Inputs
    target: Any = None

    @classmethod
    def of(cls, given: Any, *, caller: str, argument: str) -> Batch:
        """``x``, ``(x,)`` or ``(x, y)`` (lists too), or keyword arguments by name, which x may be as well. A
        tuple as x holds the positional arguments; anything else is the one argument. caller, argument: the
        function that a user called, and what the batches are to it.

        Raises:
            TypeError: a tuple or list of another length.
        """
        x, target = given, None
        if isinstance(given, (tuple, list)) and not isinstance(given, PackedSequence):
            if len(given) not in (1, 2):
                raise TypeError(
                    f"{caller}: {argument} must hold x, (x, y) or a mapping of keyword arguments, got a "
                    f"{type(given).__name__} of {len(given)} (several arguments are a tuple of their own, "
                    "((a, b), y))"
                )
            x, target = given if len(given) == 2 else (given[0], None)
        if isinstance(x, Mapping):
            return cls(_measure.Inputs((), dict(x)), target)
        positional = isinstance(x, tuple) and not isinstance(x, PackedSequence)
        return cls(_measure.Inputs(x if positional else (x,), {}), target)

    def to(self, device: torch.device) -> Batch:
        """The same with its tensors on ``device``."""
        args, kwargs, target = pytree.tree_map(
            lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf,
            (self.inputs.args, self.inputs.kwargs, self.target),
            is_leaf=lambda node: hasattr(node, "to"),
        )
        return Batch(_measure.Inputs(args, kwargs), target)

    def call(self, model: nn.Module) -> Any:
        """What the model returns for it."""
        return model(*self.inputs.args, **self.inputs.kwargs)


def batches_for(model: nn.Module, given: Iterable[Any], *, caller: str, argument: str) -> Iterator[Batch]:
    """The batches one by one, moved to where the model lies if that is one device.

    Raises:
        TypeError: ``given`` is no iterable of batches, or one of them is none.
        ValueError: it is empty.
    """
    if isinstance(given, (Tensor, Mapping, str)) or not isinstance(given, Iterable):
        raise TypeError(
            f"{caller}: {argument} must be an iterable of batches (a list, a DataLoader), "
            f"got {type(given).__name__}"
        )
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    empty = True
    for one in given:
        empty = False
        batch = Batch.of(one, caller=caller, argument=argument)
        yield batch.to(*devices) if len(devices) == 1 else batch
    if empty:
        raise ValueError(f"{caller}: {argument} must hold at least one batch, got none")


def lasting(batches: Iterable[Any] | None) -> Iterable[Any] | None:
    """Batches that can be gone through again: those of a generator are read into memory."""
    return list(batches) if isinstance(batches, Iterator) else batches
