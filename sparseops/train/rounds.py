"""One round of ``fit_sparse``: prune, retrain, evaluate, and keep the best that was seen."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sparseops import _measure
from sparseops.train.loggers import Callback
from sparseops.train.loop import Loop, Step, Values
from sparseops.train.metrics import Evaluate, budgets_of, metrics_of, number, overrun
from sparseops.train.pruner import Pruner
from sparseops.train.recalibrate import recalibrate
from sparseops.train.result import Metrics, Round

CHECK = 50
"""Steps from one look at the loss to the next, where no callback looks: each waits for the GPU."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The values of a model's parameters and buffers."""

    tensors: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        return cls({name: tensor.detach().clone() for name, tensor in _tensors_of(model)})

    def load(self, model: nn.Module) -> None:
        """Put them into a model with the same names."""
        with torch.no_grad():
            for name, tensor in _tensors_of(model):
                tensor.copy_(self.tensors[name])


def _tensors_of(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


@dataclass(frozen=True, eq=False)
class Candidate:
    """A pruned model as it was when it was evaluated.

    model, pruner: which may have gone on since. rank: the lower the better, at most 0 in its first place
    where every task is within its budget.
    """

    model: nn.Module
    pruner: Pruner
    strength: float
    round: int
    stage: str
    metrics: Metrics
    rank: tuple[float, float]
    snapshot: Snapshot
    state: Mapping[str, Any]

    @property
    def within(self) -> bool:
        return self.rank[0] <= 0

    def restore(self) -> None:
        """Model and pruner as they were."""
        self.snapshot.load(self.model)
        self.pruner.load_state_dict(self.state)


@dataclass(eq=False)
class Course:
    """What rounds have in common; most are arguments of ``fit_sparse``.

    loop: None where ``train`` has one of its own. options: of the pruners. done: optimizer steps of all
    rounds so far.
    """

    model: nn.Module
    plan: Any
    train: Callable[..., Any]
    evaluate: Evaluate
    loop: Loop | None
    options: Mapping[str, Any]
    recalibrate: Iterable[Any] | None
    evaluate_every: int | None
    callbacks: Sequence[Callback]
    done: int = 0
    dense: Metrics = field(default_factory=dict)
    budgets: Metrics = field(default_factory=dict)

    def begin(self, max_drop: float | Mapping[str, float]) -> None:
        """Evaluate the dense model."""
        # A copy, since the user's code may change what it is given.
        self.dense = self.measure(self.copy(), "dense")
        self.budgets = budgets_of(max_drop, self.dense, "fit_sparse")

    def round(self, place: int, strength: float, start: Candidate | None) -> tuple[Candidate, Round]:
        """Prune with this strength and retrain; the best that was seen, and the record. place: from 1. start:
        whose weights are the first ones; None for those of the dense model."""
        for callback in self.callbacks:
            callback.on_round(self.done, place, strength)
        began, before = time.perf_counter(), self.done
        model = self.copy()
        if start is not None:
            start.snapshot.load(model)
        pruner = Pruner(model, self.plan, strength=strength, **self.options)
        attempt = _Attempt(self, place, strength, model, pruner)
        attempt.prune()
        losses = attempt.train() if self.loop is None else attempt.loop(self.loop)
        attempt.evaluate("retrained")
        best = attempt.best
        assert best is not None
        record = Round(
            number=place,
            strength=strength,
            sparsity=pruner.sparsity,
            pruned=attempt.stages.get("pruned"),
            recalibrated=attempt.stages.get("recalibrated"),
            retrained=attempt.stages["retrained"],
            losses=losses,
            steps=self.done - before,
            seconds=time.perf_counter() - began,
            within=best.within,
        )
        return best, record

    def copy(self) -> nn.Module:
        """Of the model as it was given."""
        return _measure.copy_model(self.model, {}, "fit_sparse")

    def measure(self, model: nn.Module, stage: str) -> dict[str, float]:
        """Metrics by task, of which the callbacks hear."""
        metrics = metrics_of(model, self.evaluate, "fit_sparse")
        for callback in self.callbacks:
            callback.on_evaluate(self.done, stage, metrics)
        return metrics

    def rank(self, metrics: Metrics) -> tuple[float, float]:
        """By how much the worst task is over its budget, then the mean drop: the lower the better."""
        if metrics.keys() != self.dense.keys():
            raise ValueError(
                f"fit_sparse: evaluate must give the same tasks each time, {sorted(self.dense)}, "
                f"got {sorted(metrics)}"
            )
        drops = [(its - metrics[task]) / (abs(its) or 1.0) for task, its in self.dense.items()]
        return overrun(metrics, self.dense, self.budgets), math.fsum(drops) / len(drops)


@dataclass(eq=False)
class _Attempt:
    """A round as it goes on. stages: the best metrics of each."""

    course: Course
    place: int
    strength: float
    model: nn.Module
    pruner: Pruner
    best: Candidate | None = None
    stages: dict[str, Metrics] = field(default_factory=dict)

    def evaluate(self, stage: str) -> None:
        """Keep what is no worse than all before: of equal ones the latest, which was trained the longest."""
        metrics = self.course.measure(self.model, stage)
        rank = self.course.rank(metrics)
        if stage not in self.stages or rank <= self.course.rank(self.stages[stage]):
            self.stages[stage] = metrics
        if self.best is None or rank <= self.best.rank:
            self.best = Candidate(
                self.model,
                self.pruner,
                self.strength,
                self.place,
                stage,
                metrics,
                rank,
                Snapshot.of(self.model),
                copy.deepcopy(self.pruner.state_dict()),
            )

    def prune(self) -> None:
        """Prune all at once and evaluate; under a gradual schedule only to see what that costs."""
        state = copy.deepcopy(self.pruner.state_dict())
        snapshot = None
        if self.pruner.level < 1.0:
            if state["movement"]:
                return  # training has yet to tell what matters
            snapshot = Snapshot.of(self.model)
            self.pruner.prune()
        self.evaluate("pruned")
        if self.course.recalibrate is not None:
            recalibrate(self.model, self.course.recalibrate)
            self.evaluate("recalibrated")
        if snapshot is not None:
            snapshot.load(self.model)
            self.pruner.load_state_dict(state)

    def loop(self, loop: Loop) -> dict[str, float]:
        """Train by a loop of ours; the mean losses."""
        course, means = self.course, _Means()
        with _measure.progress(f"round {self.place}, strength {self.strength:g}", loop.steps) as advance:
            for count, step in enumerate(loop.run(self.model, self.pruner), 1):
                course.done += 1
                means.add(step.losses)
                self._tell(step)
                if count % CHECK == 0:
                    means.check()
                is_due = course.evaluate_every is not None and count % course.evaluate_every == 0
                if is_due and count < loop.steps and self.pruner.level == 1.0:
                    self.evaluate("retrained")
                advance()
        return means.check()

    def _tell(self, step: Step) -> None:
        due = [callback for callback in self.course.callbacks if self.course.done % callback.every == 0]
        if due:
            values = {name: float(value) for name, value in {**step.losses, **step.others}.items()}
            values["sparsity"] = self.pruner.sparsity
            for callback in due:
                callback.on_step(self.course.done, values)

    def train(self) -> dict[str, float]:
        """Train by the user's loop; the losses that it gives."""
        self.model.train()
        found = self.course.train(self.model, self.pruner)
        self.course.done += self.pruner.count
        if self.pruner.level < 1.0:
            raise ValueError(
                f"fit_sparse: train must call pruner.step() {self.pruner.steps} times at least, "
                f"got {self.pruner.count} calls"
            )
        for name, mask in self.pruner.masks.items():
            if self.pruner.model.get_parameter(name).detach()[~mask].any():
                raise ValueError(
                    "fit_sparse: train must call pruner.step() after each optimizer step, got zeros of "
                    f"{name} that are none any more"
                )
        if found is None:
            return {}
        losses = found if isinstance(found, Mapping) else {"loss": found}
        return {name: number(loss, "fit_sparse: train", name) for name, loss in losses.items()}


class _Means:
    """Mean losses, each over the steps that gave it; added up where they lie."""

    def __init__(self) -> None:
        self.sums: Values = {}
        self.counts: dict[str, int] = {}

    def add(self, losses: Values) -> None:
        for name, loss in losses.items():
            # In float64, where many steps do not round (but on devices that have none).
            wide = loss.float() if loss.device.type == "mps" else loss.double()
            self.sums[name] = self.sums[name] + wide if name in self.sums else wide
            self.counts[name] = self.counts.get(name, 0) + 1

    def check(self) -> dict[str, float]:
        """The means.

        Raises:
            ValueError: one is not finite.
        """
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise ValueError(
                    f"fit_sparse: train must give finite losses, got a mean {name} of {mean} in "
                    f"{self.counts[name]} steps (a lower learning rate, or clip)"
                )
        return means
