"""``sensitivity``: how much a model's metric falls when one layer alone is pruned."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from sparseops import _measure
from sparseops._eligible import Choice
from sparseops.prune import Treatment
from sparseops.prune.criteria import Criterion
from sparseops.report import Row, Tabled
from sparseops.train.metrics import ONLY, Evaluate
from sparseops.train.trials import OPTIONS, Trials

_RING: dict[str, Any] = {"s": 120, "facecolors": "none", "edgecolors": "black"}


@dataclass(frozen=True)
class OptionRow:
    """One layer with one option.

    layer: its name in the model. option: what it gets. drop: by how much the metric of each task falls when
    this layer alone gets it, negative where it rises; None where that was not measured. ms_before, ms_after:
    of the layer, dense and sparse, None where not measured. reason: why the layer cannot have the option, ""
    if it can. chosen: the plan gives it to the layer.
    """

    layer: str
    option: Treatment
    drop: Mapping[str, float] | None = None
    ms_before: float | None = None
    ms_after: float | None = None
    reason: str = ""
    chosen: bool = False

    @property
    def speedup(self) -> float | None:
        """Dense time over sparse time, None where not measured."""
        return self.ms_before / self.ms_after if self.ms_before and self.ms_after else None


class Sensitivity(Tabled):
    """Rows by layer, in the order of the model, and by option; ``len`` and iteration go over them.

    dense: the metrics of the dense model by task. model: its class name. ``str`` is the plain table,
    ``print`` the coloured one, ``to_json`` the same as data, ``plot`` a picture.
    """

    def __init__(self, rows: Iterable[OptionRow], dense: Mapping[str, float], *, model: str = "") -> None:
        self.rows = tuple(rows)
        self.dense = dict(dense)
        self.model = model

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[OptionRow]:
        return iter(self.rows)

    def __getitem__(self, key: tuple[str, Treatment]) -> OptionRow:
        """The row of a layer, by its name, and an option (KeyError when there is none)."""
        for row in self.rows:
            if (row.layer, row.option) == key:
                return row
        raise KeyError(key)

    @property
    def dense_metric(self) -> float | dict[str, float]:
        """Of the dense model, as ``evaluate`` gives it."""
        return as_given(self.dense)

    @property
    def layers(self) -> list[str]:
        return list(dict.fromkeys(row.layer for row in self.rows))

    @property
    def options(self) -> list[Treatment]:
        return list(dict.fromkeys(row.option for row in self.rows))

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self._summary()}>"

    def _summary(self) -> str:
        return f"{len(self.layers)} layers, {len(self.options)} options, dense {metrics_text(self.dense)}"

    def _columns(self) -> list[tuple[str, str, Callable[[str], str]]]:
        """Of the table between the layer and the options: header, footer, and the cell of a layer."""
        return []

    def _table(self) -> Any:
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table

        title = f"{self.model or 'model'}: {self._summary()}"
        extra = self._columns()
        table = Table(title=escape(title), title_justify="left", show_footer=bool(extra), box=SIMPLE_HEAD)
        table.add_column("layer", footer="total", overflow="fold")
        for header, footer, _ in extra:
            table.add_column(header, footer=escape(footer))
        for option in self.options:
            table.add_column(escape(str(option)), justify="right")
        rows = {(row.layer, row.option): row for row in self.rows}
        for layer in self.layers:
            its = [rows.get((layer, option)) for option in self.options]
            cells = [layer or "(model)", *(cell(layer) for *_, cell in extra), *map(_cell, its)]
            style = "green" if any(row is not None and row.chosen for row in its) else None
            table.add_row(*map(escape, cells), style=style)
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can carry: strings, numbers, None, lists and dicts."""
        return {
            "model": self.model,
            "dense": self.dense,
            "rows": [
                {
                    "layer": row.layer,
                    "option": str(row.option),
                    "drop": None if row.drop is None else dict(row.drop),
                    "ms_before": row.ms_before,
                    "ms_after": row.ms_after,
                    "reason": row.reason,
                    "chosen": row.chosen,
                }
                for row in self.rows
            ],
        }

    def to_json(self) -> str:
        """The report as a JSON text, one object with ``rows``."""
        return json.dumps(self.to_dict(), indent=2)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a picture to ``path`` (the ending chooses the type): the drop of each layer with each option,
        for each task, and a ring around what is chosen.

        Raises ValueError when nothing was measured, and what matplotlib raises for a path it cannot write.
        """
        measured = [row for row in self.rows if row.drop is not None]
        if not measured:
            raise ValueError("plot: report must have at least one measured drop, got none")
        from matplotlib.figure import Figure

        layers = [layer for layer in self.layers if any(row.layer == layer for row in measured)]
        # A Figure of its own, not pyplot: no window system, no global state left behind.
        size = (max(6.0, 0.45 * len(layers) + 2), 1.6 + 3.2 * len(self.dense))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(self.dense), sharex=True, squeeze=False)[:, 0]
        series: list[tuple[str, dict[str, Any], list[OptionRow]]] = [
            (str(option), {}, [row for row in measured if row.option == option]) for option in self.options
        ]
        series.append(("chosen", _RING, [row for row in measured if row.chosen]))
        for task, its in zip(self.dense, axes, strict=True):
            for label, style, rows in series:
                places = [layers.index(row.layer) for row in rows]
                if rows:
                    its.scatter(places, [(row.drop or {})[task] for row in rows], label=label, **style)
            its.axhline(0.0, color="tab:gray", linewidth=0.8)
            its.set_ylabel("drop" if task == ONLY else f"drop of {task}")
        axes[-1].set_xticks(
            range(len(layers)), [layer or "(model)" for layer in layers], rotation=60, ha="right"
        )
        axes[0].set_title(f"{self.model or 'model'}: {self._summary()}", wrap=True)
        axes[0].legend()
        figure.savefig(path)


def sensitivity(  # noqa: PLR0913
    model: nn.Module,
    evaluate: Evaluate,
    options: Sequence[Treatment] = OPTIONS,
    *,
    criterion: str | Criterion = "l1",
    calibration: Iterable[Any] | None = None,
    loss: Callable[..., Any] | None = None,
    example_inputs: Any = None,
    recalibrate: Iterable[Any] | None = None,
    cache: str | os.PathLike[str] | None = None,
    include: Choice | list[Choice] | None = None,
    exclude: Choice | list[Choice] | None = None,
) -> Sensitivity:
    """By how much the metric falls when a layer alone is pruned, for every layer that ``convert`` can make
    sparse and every option (Li et al. 2017, "Pruning filters for efficient ConvNets", section 3.2).

    Each evaluation is that of a copy of the model, in evaluation mode and without gradients. A layer is
    pruned as it is when all that can have the option have it: those that choose among several layers (scope
    "global", together) do so here too. Where an option drops nothing of a layer, its drop is 0.

    Args:
        model: any module that can be copied; it is not changed.
        evaluate: a function of a model that gives its metric on validation data, a number or one for each
            task by name; the higher the better.
        options: treatments of a ``Plan``; also those that no kernel gains from.
        criterion, calibration, loss: as ``Pruner`` takes them; calibration is read once for each option.
        example_inputs: of the model, as ``convert`` takes them: by them the last layer is known, and
            those that meet.
        recalibrate: batches to measure the statistics of batch norms on before each evaluation of a pruned
            model, which otherwise falls further than it would after ``sparseops.recalibrate``.
        cache: a JSON file that keeps each result when it is there; a run that was interrupted goes on where
            it stopped. Results of other weights, options or criteria are not taken for these. What
            cannot be compared takes another file: evaluate, the data, and functions of one name as criteria.
        include, exclude: as in ``convert``.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a metric is not finite, or the tasks are not the same each time; a name pattern matches
            nothing; options are none; cache is some other file; or ``Pruner`` refuses.
        RuntimeError: the model cannot be copied.
    """
    trials = Trials(
        caller="sensitivity",
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
    rows = measure_options(trials, lambda donor: {})
    return Sensitivity(rows, trials.dense_metrics(), model=type(model).__name__)


def measure_options(trials: Trials, time: Callable[[nn.Module], Mapping[str, Row]]) -> list[OptionRow]:
    """A row for each layer and option. time: what ``convert`` says of the layers of a pruned model, by name;
    of those the ones that it leaves dense are not evaluated, nor are those that it could not time."""
    dense = trials.dense_metrics()
    layers = {option: trials.layers(option) for option in trials.options}
    for option, names in layers.items():
        if not names:
            warnings.warn(
                f"{trials.caller}: no layer of {type(trials.model).__name__} can have {option}", stacklevel=3
            )
    rows = []
    with _measure.progress("measuring", sum(map(len, layers.values()))) as advance:
        for option, names in layers.items():
            if not names:
                continue
            donor = trials.pruned(dict.fromkeys(names, option))
            times = time(donor)
            for name in names:
                row = _timed(name, option, times.get(name))
                if not row.reason:
                    found = trials.metrics_alone(name, option, donor)
                    row = replace(row, drop={task: dense[task] - value for task, value in found.items()})
                rows.append(row)
                advance()
    order = {name: number for number, (name, _) in enumerate(trials.model.named_modules())}
    return sorted(rows, key=lambda row: order[row.layer])


def _timed(name: str, option: Treatment, row: Row | None) -> OptionRow:
    """A layer with an option as ``convert`` reports it, if that was asked."""
    if row is None:
        return OptionRow(name, option)
    if row.ms_before is None or row.ms_after is None or not row.sparse:
        return OptionRow(name, option, None, row.ms_before, row.ms_after, row.reason)
    return OptionRow(name, option, None, row.ms_before, row.ms_after)


def as_given(metrics: Mapping[str, float]) -> float | dict[str, float]:
    """Metrics by task as a number where there is but one without a name."""
    return metrics[ONLY] if metrics.keys() == {ONLY} else dict(metrics)


def metrics_text(metrics: Mapping[str, float]) -> str:
    """Metrics or drops by task, for people."""
    return ", ".join(
        f"{value:.3g}" if task == ONLY else f"{task} {value:.3g}" for task, value in metrics.items()
    )


def _cell(row: OptionRow | None) -> str:
    if row is None:
        return ""
    words = [] if row.drop is None else [metrics_text(row.drop)]
    return ", ".join(words + ([] if row.speedup is None else [f"{row.speedup:.2f}x"]))
