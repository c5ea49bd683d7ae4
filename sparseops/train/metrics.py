"""The user's ``evaluate``: a model's metrics by task, and how far each may fall."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

Evaluate: TypeAlias = "Callable[[nn.Module], float | Mapping[str, float]]"
"""The user's function: one metric, or one for each task; the higher the better."""

ONLY = "metric"
"""The name of a metric that has none."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each module is in the mode in which it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def metrics_of(model: nn.Module, evaluate: Evaluate, caller: str) -> dict[str, float]:
    """What ``evaluate(model)`` gives in evaluation mode without gradients, by task.

    Raises:
        TypeError: it gives neither a number nor a mapping of names to numbers.
        ValueError: a metric is NaN or infinite, or there is none.
    """
    with evaluating(model), torch.no_grad():
        found = evaluate(model)
    named = found if isinstance(found, Mapping) else {ONLY: found}
    metrics = {task: number(value, f"{caller}: evaluate", task) for task, value in named.items()}
    if not metrics:
        raise ValueError(f"{caller}: evaluate must give at least one metric, got none")
    for task, value in metrics.items():
        if not math.isfinite(value):
            raise ValueError(f"{caller}: evaluate must give a finite number for {task!r}, got {value}")
    return metrics


def number(value: Any, what: str, name: object) -> float:
    """``value`` as a float. what: the argument that holds it under ``name``.

    Raises:
        TypeError: it is no number, or the name is no string.
    """
    if not isinstance(name, str):
        raise TypeError(f"{what} must have strings as names, got {name!r}")
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{what} must give a number for {name!r}, got {type(value).__name__}") from None


def budgets_of(
    max_drop: float | Mapping[str, float], metrics: Mapping[str, float], caller: str
) -> dict[str, float]:
    """By how much each metric may fall. max_drop: one number for all, or one by task.

    Raises:
        TypeError: one is no number.
        ValueError: one is negative or NaN, or the names are not those of ``metrics``.
    """
    named = max_drop if isinstance(max_drop, Mapping) else dict.fromkeys(metrics, max_drop)
    budgets = {task: number(value, f"{caller}: max_drop", task) for task, value in named.items()}
    if budgets.keys() != metrics.keys():
        raise ValueError(
            f"{caller}: max_drop must name the tasks of evaluate, {', '.join(sorted(metrics))}, "
            f"got {', '.join(sorted(budgets)) or 'none'}"
        )
    for task, value in budgets.items():
        if not value >= 0:
            raise ValueError(f"{caller}: max_drop must be at least 0, got {value} for {task!r}")
    return budgets


def overrun(metrics: Mapping[str, float], dense: Mapping[str, float], budgets: Mapping[str, float]) -> float:
    """The largest of (drop - budget) over the magnitude of the dense metric (over 1 where that is 0): at
    most 0 where every task is within its budget.

    What rounding adds to a drop does not count.
    """
    worst = -math.inf
    for task, budget in budgets.items():
        scale = abs(dense[task]) or 1.0
        excess = (dense[task] - metrics[task] - budget) / scale
        worst = max(worst, 0.0 if abs(excess) < 1e-9 else excess)
    return worst
