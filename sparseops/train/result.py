"""``FitResult``: what ``fit_sparse`` made, and how it came about."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from sparseops.report import Tabled
from sparseops.train.report import PruneReport

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Round:
    """One round: pruned, retrained and evaluated.

    number: from 1. strength: share of the plan. sparsity: share of the elements of all pruned weights that is
    zero. pruned, recalibrated, retrained: metrics by task; pruned is None where the masks are made of what
    training tells, recalibrated where nothing was. losses: means over the steps. steps: of the optimizer.
    within: whether its best evaluation is within the budget.
    """

    number: int
    strength: float
    sparsity: float
    pruned: Metrics | None
    recalibrated: Metrics | None
    retrained: Metrics
    losses: Mapping[str, float]
    steps: int
    seconds: float
    within: bool


@dataclass(frozen=True, eq=False)
class FitResult(Tabled):
    """The pruned model and how well it does.

    Attributes:
        model: finalized: an ordinary model with exact zeros, which ``convert(model, prune=None)`` takes.
        plan: as it was given.
        strength: share of the plan that is carried out.
        sparsity: share of the elements of all pruned weights that is zero.
        within_budget: whether every metric is within its budget.
        max_drop: the budget by task.
        dense: metrics by task of the model as it was given.
        metrics: of the result.
        stage: where in its round the result was evaluated: "pruned", "recalibrated" or "retrained".
        history: the rounds.
        round: number of the one that the result is of.
        report: the pruner's, of the result.
    """

    model: nn.Module
    plan: Any
    strength: float
    sparsity: float
    within_budget: bool
    max_drop: Metrics
    dense: Metrics
    metrics: Metrics
    stage: str
    history: tuple[Round, ...]
    round: int
    report: PruneReport

    @property
    def pruned(self) -> Metrics | None:
        """Metrics of the result's round right after pruning."""
        return self.history[self.round - 1].pruned

    @property
    def recalibrated(self) -> Metrics | None:
        """Metrics of the result's round after pruning and recalibration."""
        return self.history[self.round - 1].recalibrated

    @property
    def retrained(self) -> Metrics:
        """Metrics of the result's round after retraining, at their best."""
        return self.history[self.round - 1].retrained

    def __repr__(self) -> str:
        return f"<FitResult: {self._summary()}>"

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can carry, without the model."""
        return {
            "plan": repr(self.plan),
            "strength": self.strength,
            "sparsity": self.sparsity,
            "within_budget": self.within_budget,
            # A budget without limit is infinite, which JSON does not have.
            "max_drop": {task: drop if drop < float("inf") else None for task, drop in self.max_drop.items()},
            "dense": dict(self.dense),
            "metrics": dict(self.metrics),
            "stage": self.stage,
            "round": self.round,
            "history": [asdict(its) for its in self.history],
            "report": json.loads(self.report.to_json()),
        }

    def to_json(self) -> str:
        """The same as a JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a picture to ``path`` (the ending chooses the type): for each task the metrics of the rounds
        over their sparsity, the dense metric, and the least that the budget allows."""
        from matplotlib.figure import Figure

        tasks = list(self.dense)
        # A Figure of its own, not pyplot: no window system, no global state left behind.
        figure = Figure(figsize=(5.5 * len(tasks), 4.2), layout="constrained")
        rounds = sorted(self.history, key=lambda its: its.sparsity)
        for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
            axes.axhline(self.dense[task], color="tab:blue", label="dense")
            if self.max_drop[task] < float("inf"):
                least = self.dense[task] - self.max_drop[task]
                axes.axhline(least, color="tab:red", linestyle="--", label="budget")
            for stage, color in _STAGES.items():
                points = [(its.sparsity, getattr(its, stage)) for its in rounds]
                points = [(100 * x, metrics[task]) for x, metrics in points if metrics is not None]
                if points:
                    axes.plot(*zip(*points, strict=True), "o-", color=color, label=stage)
            axes.plot(
                [100 * self.sparsity], [self.metrics[task]], "*", markersize=14, color="black", label="result"
            )
            axes.set_xlabel("sparsity of the pruned weights in %")
            axes.set_ylabel(task)
        axes.legend()
        figure.suptitle(self._summary())
        figure.savefig(path)

    def _summary(self) -> str:
        words = "within the budget" if self.within_budget else "OVER THE BUDGET"
        return f"strength {self.strength:g}, {100 * self.sparsity:.1f}% zeros, {words}"

    def _table(self) -> Any:
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table

        title = f"{type(self.model).__name__}, {self.plan!r}: {self._summary()}"
        table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD)
        for column in ("round", "strength", "zeros"):
            table.add_column(column, justify="right")
        for task, budget in self.max_drop.items():
            limit = "" if budget == float("inf") else f", max_drop {budget:g}"
            table.add_column(escape(f"{task} (dense {self.dense[task]:.4g}{limit})"), justify="right")
        for column in ("loss", "steps", "seconds"):
            table.add_column(column, justify="right")
        table.add_column("")
        for its in self.history:
            cells = [str(its.number), f"{its.strength:g}", f"{100 * its.sparsity:.1f}%"]
            for task in self.dense:
                stages = [getattr(its, stage) for stage in _STAGES]
                cells.append(" → ".join(f"{metrics[task]:.4g}" for metrics in stages if metrics is not None))
            cells.append(f"{its.losses['loss']:.4g}" if "loss" in its.losses else "")
            cells += [str(its.steps), f"{its.seconds:.1f}", "within" if its.within else "over"]
            is_result = its.number == self.round
            cells[-1] += f", the result ({self.stage})" if is_result else ""
            table.add_row(*cells, style="bold" if is_result else "green" if its.within else "dim")
        return table


_STAGES = {"pruned": "tab:gray", "recalibrated": "tab:orange", "retrained": "tab:green"}
