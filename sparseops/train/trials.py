"""Trying options out: copies of a model with some layers pruned, evaluated, with a file of the results."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparseops import _measure
from sparseops._eligible import Choice, check_choices, find_layers
from sparseops.prune import Channels, Plan, Treatment
from sparseops.prune.criteria import Criterion
from sparseops.prune.plan import plan_of
from sparseops.report import Code
from sparseops.train.metrics import Evaluate, metrics_of
from sparseops.train.pruner import Pruner
from sparseops.train.recalibrate import recalibrate
from sparseops.train.targets import KINDS

OPTIONS: tuple[Treatment, ...] = ("2:4", Channels(ratio=0.25), Channels(ratio=0.5))
"""What a layer can get where nothing else is asked for."""

_DENSE = "dense"


@dataclass(eq=False)
class Trials:
    """Evaluates copies of a model, which itself never changes. caller: the function that a user called, which
    errors begin with; the other fields are arguments of that.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: include, exclude or options are wrong, or the file is none of results.
    """

    caller: str
    model: nn.Module
    evaluate: Evaluate
    options: Sequence[Treatment]
    criterion: str | Criterion
    calibration: Iterable[Any] | None
    loss: Callable[..., Any] | None
    example_inputs: Any
    batches: Iterable[Any] | None
    cache: str | os.PathLike[str] | None
    include: Choice | list[Choice] | None
    exclude: Choice | list[Choice] | None
    known: dict[str, dict[str, dict[str, float]]] = field(init=False, default_factory=dict)
    """Metrics by what was tried, by the fingerprint of the model."""

    def __post_init__(self) -> None:
        caller, model = self.caller, self.model
        if not isinstance(model, nn.Module):
            raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")
        for name, given in (("calibration", self.calibration), ("recalibrate", self.batches)):
            if isinstance(given, Iterator):
                raise TypeError(
                    f"{caller}: {name} must be read once for each trial (a list, a DataLoader), "
                    f"got {type(given).__name__}, which can be read once"
                )
        _check_options(self.options, caller)
        self._included = (
            None if self.include is None else check_choices(model, "include", self.include, caller)
        )
        self._excluded = [] if self.exclude is None else check_choices(model, "exclude", self.exclude, caller)
        self._model = fingerprint(model)
        if self.cache is not None and os.path.exists(self.cache):
            self.known = _read(Path(self.cache), caller)

    def layers(self, option: Treatment) -> list[str]:
        """The names of the layers that an option can prune: those that ``convert`` can make sparse, or could
        if the zeros were in a pattern."""
        found = find_layers(self.model, self._included, self._excluded, option)
        return [
            layer.name
            for layer in found
            if layer.code is None or (layer.code is Code.UNSTRUCTURED and isinstance(layer.module, KINDS))
        ]

    def pruned(self, chosen: Mapping[str, Treatment]) -> nn.Module:
        """A copy with the layers of these names pruned, as ``Pruner.finalize`` leaves it."""
        pruner = Pruner(
            self._copy(),
            plan_of(chosen),
            criterion=self.criterion,
            calibration=self.calibration,
            loss=self.loss,
            example_inputs=self.example_inputs,
        )
        return pruner.finalize()

    def dense_metrics(self) -> dict[str, float]:
        """The metrics of the model as it is, by task."""
        return self._metrics(_DENSE, self._copy)

    def metrics_alone(self, name: str, option: Treatment, donor: nn.Module) -> dict[str, float]:
        """The metrics with one layer as it is in ``donor``, where every layer has the option, and all others
        as they are. Those of the dense model where the option drops nothing of the layer."""
        pruned = dict(donor.get_submodule(name).named_parameters())
        whole = self.model.get_submodule(name).named_parameters()
        if all(torch.equal(parameter, pruned[key]) for key, parameter in whole):
            return self.dense_metrics()

        def make() -> nn.Module:
            subject = self._copy()
            with torch.no_grad():
                for key, parameter in subject.get_submodule(name).named_parameters():
                    parameter.copy_(pruned[key])
            return self._recalibrated(subject)

        return self._metrics(self._key(f"{name!r} alone: {option!r}"), make)

    def metrics_together(self, chosen: Mapping[str, Treatment]) -> dict[str, float]:
        """The metrics with all layers of these names pruned."""
        return self._metrics(
            self._key(repr(plan_of(chosen))), lambda: self._recalibrated(self.pruned(chosen))
        )

    def _copy(self) -> nn.Module:
        return _measure.copy_model(self.model, {}, self.caller)

    def _recalibrated(self, model: nn.Module) -> nn.Module:
        return model if self.batches is None else recalibrate(model, self.batches)

    def _key(self, what: str) -> str:
        by = self.criterion
        if not isinstance(by, str):
            by = getattr(by, "__name__", type(by).__name__)
        return f"{what}, criterion {by}" + ("" if self.batches is None else ", recalibrated")

    def _metrics(self, key: str, make: Callable[[], nn.Module]) -> dict[str, float]:
        """What was found out under this key, now or in an earlier run."""
        results = self.known.setdefault(self._model, {})
        found = results[key] if key in results else metrics_of(make(), self.evaluate, self.caller)
        if found.keys() != (expected := results.get(_DENSE, found).keys()):
            raise ValueError(
                f"{self.caller}: evaluate must give the same tasks each time, {', '.join(sorted(expected))}, "
                f"got {', '.join(sorted(found))}"
            )
        if key not in results:
            results[key] = found
            if self.cache is not None:
                _write(Path(self.cache), self.known)
        return found


def _check_options(options: Sequence[Treatment], caller: str) -> None:
    if not isinstance(options, (list, tuple)):
        raise TypeError(f"{caller}: options must be a list of treatments of a layer, got {options!r}")
    if not options:
        raise ValueError(f"{caller}: options must hold at least one treatment, got none")
    for option in options:
        try:
            Plan({"*": option})
        except (TypeError, ValueError) as exc:
            raise type(exc)(f"{caller}: options must hold treatments of a layer, got {option!r}") from exc
        if option is None:
            raise TypeError(f"{caller}: options must hold treatments of a layer, got None, which all can get")


def fingerprint(model: nn.Module) -> str:
    """The same for models of equal structure, weights and buffers."""
    # Without the addresses that a module may show: they are others in the next run.
    digest = hashlib.sha256(re.sub(" at 0x[0-9a-f]+", "", repr(model)).encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        flat = tensor.detach().cpu().reshape(-1).contiguous()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read(path: Path, caller: str) -> dict[str, dict[str, dict[str, float]]]:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        _check_results(known)
    except (ValueError, TypeError) as exc:
        raise ValueError(
            f"{caller}: cache must be a file that {caller} wrote, or a new one, got {str(path)!r}: {exc}"
        ) from exc
    return known


def _check_results(known: Any) -> None:
    levels: list[Any] = [known]
    for _ in range(3):
        if not all(isinstance(level, dict) for level in levels):
            raise TypeError("it does not hold metrics by trial by model")
        levels = [value for level in levels for value in level.values()]
    if not all(isinstance(value, (int, float)) for value in levels):
        raise TypeError("a metric in it is no number")


def _write(path: Path, known: Mapping[str, Any]) -> None:
    """Whoever stops this half-way finds the old file whole."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(json.dumps(known, indent=1), encoding="utf-8")
    os.replace(fresh, path)
