"""What a pruner did to each weight, and why it left the others: as a table, JSON and a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from sparseops.report import Tabled, row_named


@dataclass(frozen=True)
class PruneRow:
    """One weight. name: of the parameter in the model, or of a layer that is left. kind: class of the layer.
    pattern: what is asked for, "" where the layer is left. dropped: share of its elements that is zero by the
    mask. energy_kept: of the squared weight what the masks kept each time that they were chosen, multiplied.
    reason: what to know of it, or why it is left."""

    name: str
    kind: str
    shape: tuple[int, ...]
    pattern: str = ""
    dropped: float = 0.0
    energy_kept: float = 1.0
    reason: str = ""

    @property
    def pruned(self) -> bool:
        """The plan prunes it."""
        return bool(self.pattern)


class PruneReport(Tabled):
    """Rows of ``PruneRow``; ``len``, iteration and indexing (by number or name) go over them.

    criterion, schedule: of the pruner. count, steps: where it stands. level: the share of the plan that is
    carried out.
    """

    def __init__(
        self,
        rows: Iterable[PruneRow],
        *,
        model: str,
        criterion: str,
        schedule: str,
        count: int,
        steps: int,
        level: float,
    ) -> None:
        self.rows = tuple(rows)
        self.model = model
        self.criterion, self.schedule = criterion, schedule
        self.count, self.steps, self.level = count, steps, level

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[PruneRow]:
        return iter(self.rows)

    def __getitem__(self, key: int | str) -> PruneRow:
        if isinstance(key, int):
            return self.rows[key]
        return row_named(self.rows, key)

    @property
    def pruned(self) -> tuple[PruneRow, ...]:
        """The rows of weights that the plan prunes."""
        return tuple(row for row in self.rows if row.pruned)

    def __repr__(self) -> str:
        return f"<PruneReport: {len(self.pruned)} weights, {self.level:.0%} of the plan>"

    def _table(self) -> Any:
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table

        title = f"{self.model}: {len(self.pruned)} weights pruned by {self.criterion}, "
        title += f"{self.level:.0%} of the plan"
        if self.schedule != "oneshot":
            title += f" ({self.schedule}, step {self.count} of {self.steps})"
        table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD)
        table.add_column("weight", overflow="fold")
        table.add_column("kind")
        table.add_column("shape")
        table.add_column("pattern", overflow="fold")
        table.add_column("dropped", justify="right")
        table.add_column("energy", justify="right")
        table.add_column("reason", overflow="fold")
        for row in self.rows:
            numbers = [f"{row.dropped:.1%}", f"{row.energy_kept:.1%}"] if row.pruned else ["", ""]
            table.add_row(
                escape(row.name or "(model)"),
                row.kind,
                "x".join(map(str, row.shape)),
                escape(row.pattern),
                *numbers,
                escape(row.reason),
                style="green" if row.pruned else "dim",
            )
        return table

    def to_json(self) -> str:
        """One object with ``weights`` and what is known of the whole."""
        whole = {name: value for name, value in vars(self).items() if name != "rows"}
        return json.dumps({**whole, "weights": [asdict(row) for row in self.rows]}, indent=2)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a picture to ``path`` (the ending chooses the type): of each pruned weight the share that is
        dropped, and the share of its squares that is kept."""
        from matplotlib.figure import Figure

        rows = self.pruned
        figure = Figure(figsize=(max(6.0, 0.45 * len(rows) + 2), 4.8), layout="constrained")
        axes = figure.subplots()
        places = range(len(rows))
        axes.bar([p - 0.2 for p in places], [row.dropped for row in rows], 0.4, label="dropped weights")
        axes.bar([p + 0.2 for p in places], [row.energy_kept for row in rows], 0.4, label="kept energy")
        axes.set_xticks(list(places), [row.name for row in rows], rotation=60, ha="right")
        axes.set_ylim(0, 1)
        axes.set_ylabel("share")
        axes.set_title(f"{self.model}: {self.level:.0%} of the plan, by {self.criterion}")
        axes.legend()
        figure.savefig(path)
