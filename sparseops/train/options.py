"""What a pruner may be told, and how it is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparseops.prune import Channels, Layers, Plan, Unstructured
from sparseops.prune.plan import NAMED

SCHEDULES: dict[str, Callable[[float], float]] = {
    "oneshot": lambda _: 1.0,
    "linear": lambda t: t,
    "cubic": lambda t: 1 - (1 - t) ** 3,
}
"""The level at a share t of the steps; cubic: Zhu and Gupta 2017, "To prune, or not to prune", eq. 1."""

TRAININGS = ("fixed", "straight-through")


def check_plan(plan: Any) -> None:
    """Raises TypeError or ValueError for what is no plan."""
    if isinstance(plan, (Plan, Channels, Unstructured, Layers)) or plan in NAMED:
        return
    words = ", ".join(f'"{word}"' for word in NAMED)
    error = ValueError if isinstance(plan, str) else TypeError
    raise error(
        f"Pruner: plan must be {words}, a Channels, Unstructured, Layers or Plan, or masks by parameter, "
        f"got {plan!r}"
    )


def check_options(
    schedule: str, steps: int, every: int, strength: float, training: str, decay: float
) -> None:
    """Raises TypeError or ValueError for a value that a pruner cannot take."""
    for name, value, allowed in (("schedule", schedule, tuple(SCHEDULES)), ("training", training, TRAININGS)):
        if value not in allowed:
            words = ", ".join(f'"{word}"' for word in allowed)
            raise ValueError(f"Pruner: {name} must be one of {words}, got {value!r}")
    for name, count in (("steps", steps), ("every", every)):
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"Pruner: {name} must be an integer, got {count!r}")
        if count < 1:
            raise ValueError(f"Pruner: {name} must be at least 1, got {count}")
    if not 0 < strength <= 1:
        raise ValueError(f"Pruner: strength must be in (0, 1], got {strength}")
    if not 0 <= decay < 1:
        raise ValueError(f"Pruner: decay must be in [0, 1), got {decay}")


def check_sparsegpt(rule: Any, schedule: str) -> None:
    """Raises ValueError for what SparseGPT, which changes weights as it drops others, cannot do."""
    if schedule != "oneshot":
        raise ValueError(f'Pruner: schedule must be "oneshot" with criterion "sparsegpt", got {schedule!r}')
    is_ratio = isinstance(rule, Unstructured) and rule.scope == "local" and rule.threshold is None
    if rule != "2:4" and not is_ratio:
        raise ValueError(
            'Pruner: plan must be "2:4", or Unstructured with a ratio and scope "local", with criterion '
            f'"sparsegpt", got {rule!r}'
        )
