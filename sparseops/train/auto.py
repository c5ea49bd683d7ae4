"""``auto_plan``: the fastest plan whose drop of the metric is within a budget."""

from __future__ import annotations

import os
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from sparseops import _measure
from sparseops._eligible import Choice
from sparseops.convert import convert, explain
from sparseops.prune import Layers, Plan, Treatment, Unstructured
from sparseops.prune.criteria import Criterion
from sparseops.prune.plan import plan_of
from sparseops.report import Row, change_text, ms_text
from sparseops.train.budget import REACH, STEPS, Combination, Item, cost_of, frontier, search
from sparseops.train.metrics import Evaluate, budgets_of, overrun
from sparseops.train.sensitivity import OptionRow, Sensitivity, as_given, measure_options, metrics_text
from sparseops.train.trials import OPTIONS, Trials


@dataclass(frozen=True)
class Check:
    """A plan that was evaluated as a whole.

    predicted: the sums of its layers' drops, those below 0 counted as 0, by task. drop: what the metrics of
    the whole fall by. ms: sum of its layers' times. passed: every drop is within its budget.
    """

    plan: Plan
    predicted: Mapping[str, float]
    drop: Mapping[str, float]
    ms: float
    passed: bool


class AutoPlan(Sensitivity):
    """The plan that ``auto_plan`` found, and what it was chosen from.

    plan: exact layer names, then ``"*": None``. checks: the plans that were evaluated as a whole, in that
    order. budgets: by how much each task's metric may fall. The rest as ``Sensitivity``, with the times.
    """

    def __init__(  # noqa: PLR0913
        self,
        rows: Iterable[OptionRow],
        dense: Mapping[str, float],
        *,
        plan: Plan,
        metrics: Mapping[str, float],
        budgets: Mapping[str, float],
        checks: Iterable[Check] = (),
        model: str = "",
    ) -> None:
        super().__init__(rows, dense, model=model)
        self.plan = plan
        self.metrics = dict(metrics)
        self.budgets = dict(budgets)
        self.checks = tuple(checks)

    @property
    def metric(self) -> float | dict[str, float]:
        """Of the model pruned by the plan, as ``evaluate`` gives it."""
        return as_given(self.metrics)

    @property
    def drop(self) -> float | dict[str, float]:
        """By how much the metric is below that of the dense model."""
        return as_given(self._drops)

    @property
    def chosen(self) -> dict[str, OptionRow]:
        """The rows that the plan is made of, by layer."""
        return {row.layer: row for row in self.rows if row.chosen}

    @property
    def ms_before(self) -> float:
        """Dense time of the layers that were measured, together."""
        return sum(self._dense_times.values())

    @property
    def ms_after(self) -> float:
        """The time of the same layers by the plan."""
        return self.ms_before - sum(
            (row.ms_before or 0) - (row.ms_after or 0) for row in self.chosen.values()
        )

    @property
    def speedup(self) -> float | None:
        """Of the layers that were measured together, None where none was."""
        return self.ms_before / self.ms_after if self.ms_after else None

    @property
    def _dense_times(self) -> dict[str, float]:
        return {row.layer: row.ms_before for row in self.rows if row.ms_before is not None}

    @property
    def _drops(self) -> dict[str, float]:
        return drops(self.dense, self.metrics)

    def _summary(self) -> str:
        words = f"{len(self.chosen)} of {len(self.layers)} layers pruned, drop {metrics_text(self._drops)} "
        words += f"of at most {metrics_text(self.budgets)}"
        if self.speedup is not None:
            words += f", layers {self.speedup:.2f}x as fast"
        return words

    def _columns(self) -> list[tuple[str, str, Callable[[str], str]]]:
        chosen = self.chosen
        before = self._dense_times

        def gets(layer: str) -> str:
            return str(chosen[layer].option) if layer in chosen else "dense"

        def time(layer: str) -> str:
            after = chosen[layer].ms_after if layer in chosen else before.get(layer)
            return change_text(before.get(layer), after, ms_text)

        return [
            ("gets", "", gets),
            ("ms", change_text(self.ms_before, self.ms_after, ms_text), time),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can carry: strings, numbers, None, lists and dicts."""
        return super().to_dict() | {
            "plan": {name: option if option is None else str(option) for name, option in self.plan.rules},
            "metrics": self.metrics,
            "budgets": self.budgets,
            "ms_before": self.ms_before,
            "ms_after": self.ms_after,
            "checks": [
                {
                    "plan": repr(check.plan),
                    "predicted": dict(check.predicted),
                    "drop": dict(check.drop),
                    "ms": check.ms,
                    "passed": check.passed,
                }
                for check in self.checks
            ],
        }


def auto_plan(  # noqa: PLR0913
    model: nn.Module,
    evaluate: Evaluate,
    example_inputs: Any,
    *,
    max_drop: float | Mapping[str, float] = 0.01,
    options: Sequence[Treatment] = OPTIONS,
    criterion: str | Criterion = "l1",
    calibration: Iterable[Any] | None = None,
    loss: Callable[..., Any] | None = None,
    recalibrate: Iterable[Any] | None = None,
    cache: str | os.PathLike[str] | None = None,
    checks: int = 8,
    include: Choice | list[Choice] | None = None,
    exclude: Choice | list[Choice] | None = None,
) -> AutoPlan:
    """The plan that makes the model's layers fastest while its metric falls by at most ``max_drop``::

        auto = auto_plan(model, evaluate, x, max_drop=0.02)
        auto.print()
        model = convert(Pruner(model, auto.plan, criterion=..., calibration=...).finalize(), prune=None)

    Each layer and option is timed, and evaluated by itself where it is faster than the dense layer, as
    ``sensitivity`` does. Of all combinations of one option for each layer, the fastest is taken whose drops
    add up to the budget, a drop below 0 counting as 0: a multiple-choice knapsack, solved exactly on a grid
    of 1/10,000 of the budget.

    Drops do not really add up, in recurrent networks least of all, so the combined plan is evaluated as well:
    while it is over the budget one that saves less time is tried, else one that saves more, by bisection. The
    answer is the fastest plan that was seen to be within.

    Layers are timed by themselves: what ``compact`` gains by taking gathers and scatters away is not seen.

    With several tasks each has its budget, and the cost of an option is the largest of its shares of these.
    That is cautious: what fits by these fits by the sum of each task's drops.

    max_drop is that of pruning at once. Where training follows, which brings much of the metric back, a
    larger one than the final model is to have is sensible.

    Args:
        model: any module that ``convert`` takes; it is not changed.
        evaluate: a function of a model that gives its metric on validation data, a number or one for each
            task by name; the higher the better. It is called for the dense model, for each layer with each
            option that is faster, and for each check.
        example_inputs: of the model, as ``convert`` takes them; layers are timed on them.
        max_drop: by how much the metric may fall, one number for all tasks or one for each by name.
        options: treatments of a ``Plan``, of which each layer gets one or none.
        criterion, calibration, loss, recalibrate, cache, include, exclude: as in ``sensitivity``. Times are
            not kept in the file: they are those of this machine now.
        checks: how many combined plans are evaluated at most.

    Returns:
        An ``AutoPlan``. When no layer is faster, or no plan was within the budget, its plan leaves all
        layers dense, and a warning says so.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a metric is not finite, or the tasks are not the same each time; max_drop or checks is
            negative; a name pattern matches nothing; options are none; cache is some other file; or
            ``Pruner`` refuses.
        RuntimeError: the model cannot be copied, or the check of ``convert`` on example_inputs fails.
    """
    if isinstance(checks, bool) or not isinstance(checks, int):
        raise TypeError(f"auto_plan: checks must be an integer, got {checks!r}")
    if checks < 0:
        raise ValueError(f"auto_plan: checks must be at least 0, got {checks}")
    _measure.Inputs.of(example_inputs, "auto_plan")
    trials = Trials(
        caller="auto_plan",
        model=model,
        evaluate=evaluate,
        options=options,
        criterion=criterion,
        calibration=calibration,
        loss=loss,
        example_inputs=example_inputs,
        batches=recalibrate,
        cache=cache,
        include=include,
        exclude=exclude,
    )
    for option in trials.options:
        if isinstance(option, (Unstructured, Layers)):
            raise ValueError(f"auto_plan: options must be patterns that a kernel gains from, got {option}")
    dense = trials.dense_metrics()
    budgets = budgets_of(max_drop, dense, "auto_plan")
    rows = _with_one_dense_time(measure_options(trials, lambda donor: _times(donor, example_inputs)))
    menus = [_menu(its, budgets) for its in _by_layer(rows).values()]
    combinations = frontier([[item for item, _ in menu] for menu in menus], REACH * STEPS)
    tried: list[Check] = []

    def picked(combination: Combination) -> list[OptionRow]:
        pairs = [menu[pick] for menu, pick in zip(menus, combination.picks, strict=True)]
        return [row for _, row in pairs if row is not None]

    with _measure.progress("checking", checks) as advance:

        def passes(combination: Combination) -> bool:
            its = picked(combination)
            chosen = {row.layer: row.option for row in its}
            found = trials.metrics_together(chosen)
            is_within = overrun(found, dense, budgets) <= 0
            predicted = {task: sum(max(0.0, (row.drop or {})[task]) for row in its) for task in dense}
            tried.append(Check(plan_of(chosen), predicted, drops(dense, found), combination.time, is_within))
            advance()
            return is_within

        # Rounding up adds a step for each layer at most; what fits but for that is worth a check.
        best = picked(search(combinations, STEPS + len(menus), passes, checks))
    chosen = {row.layer: row.option for row in best}
    if not chosen:
        warnings.warn(f"auto_plan: every layer stays dense, {_why(rows, combinations, tried)}", stacklevel=2)
    return AutoPlan(
        [replace(row, chosen=row in best) for row in rows],
        dense,
        plan=plan_of(chosen),
        metrics=trials.metrics_together(chosen) if chosen else dense,
        budgets=budgets,
        checks=tried,
        model=type(model).__name__,
    )


def drops(dense: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
    """By how much each task's metric is below that of the dense model."""
    return {task: value - metrics[task] for task, value in dense.items()}


def _times(donor: nn.Module, example_inputs: Any) -> dict[str, Row]:
    """What ``convert`` measures of the layers of a pruned model, by name."""
    with warnings.catch_warnings():
        # That nothing became sparse says the answer of auto_plan, if it comes to that.
        warnings.filterwarnings("ignore", "convert: nothing was made sparse")
        made = convert(donor, prune=None, example_inputs=example_inputs)
    return {row.name: row for row in explain(made)}


def _by_layer(rows: Iterable[OptionRow]) -> dict[str, list[OptionRow]]:
    """The rows with times."""
    by_layer: dict[str, list[OptionRow]] = {}
    for row in rows:
        if row.ms_before is not None:
            by_layer.setdefault(row.layer, []).append(row)
    return by_layer


def _with_one_dense_time(rows: Sequence[OptionRow]) -> list[OptionRow]:
    """The dense time of a layer was measured beside each option, so that their ratio is fair; the same dense
    time for all makes the options comparable."""
    medians = {
        layer: statistics.median(row.ms_before or 0.0 for row in its)
        for layer, its in _by_layer(rows).items()
    }
    return [
        row
        if row.speedup is None
        else replace(row, ms_before=medians[row.layer], ms_after=medians[row.layer] / row.speedup)
        for row in rows
    ]


def _menu(rows: Iterable[OptionRow], budgets: Mapping[str, float]) -> list[tuple[Item, OptionRow | None]]:
    """What a layer can get: to stay dense, or an option that is faster and not far over the budget alone."""
    rows = list(rows)
    menu: list[tuple[Item, OptionRow | None]] = [(Item(0, rows[0].ms_before or 0.0), None)]
    for row in rows:
        cost = None if row.drop is None else cost_of(row.drop, budgets)
        if cost is not None:
            menu.append((Item(cost, row.ms_after or 0.0), row))
    return menu


def _why(rows: Sequence[OptionRow], combinations: Sequence[Combination], tried: Sequence[Check]) -> str:
    if not rows:
        return "none can have any of the options"
    if all(row.drop is None for row in rows):
        return "none is faster with any of the options"
    if len(combinations) == 1:
        return f"each faster option alone lets the metric fall by more than {REACH} times max_drop"
    return f"no plan was seen to be within max_drop ({len(tried)} were evaluated)"
