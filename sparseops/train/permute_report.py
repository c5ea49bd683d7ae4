"""What ``permute_channels`` did: a row for each layer that the plan makes 2:4."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from sparseops.report import Tabled, change_text, row_named


class Code(str, enum.Enum):
    """What became of the order of a layer's input channels. The value is stable, JSON carries it."""

    PERMUTED = "permuted"
    """They have another order."""
    BEST = "best"
    """No better order was found."""
    KEPT = "kept"
    """They cannot change places; the reason says why."""
    DENSE = "dense"
    """``convert`` would not make the layer 2:4; the reason says why."""

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class PermuteRow:
    """One layer. name: in the model. kind: class name. channels: its inputs, 0 where it is not known. energy:
    share of the squared weight that 2:4 by magnitude keeps, before and after, None where convert would leave
    the layer dense or the weight is not finite. reason: what to know of it, or why it stays."""

    name: str
    kind: str
    code: Code
    channels: int
    energy: tuple[float, float] | None
    reason: str


class PermuteReport(Tabled):
    """layers: in the order of the model's modules. energy: share of the squared weight of all of them that
    2:4 keeps, before and after. by: who drew the model's graph. reason: why the whole model stays as it is,
    "" if it does not.

    ``str(report)`` is the plain text, ``print`` the coloured one, ``to_json`` the same as data.
    """

    def __init__(
        self,
        layers: Iterable[PermuteRow],
        *,
        model: str,
        energy: tuple[float, float],
        by: str = "",
        reason: str = "",
    ) -> None:
        self.layers = tuple(layers)
        self.model, self.energy, self.by, self.reason = model, energy, by, reason

    def __getitem__(self, name: str) -> PermuteRow:
        """The row of a layer (KeyError when there is none)."""
        return row_named(self.layers, name)

    def __repr__(self) -> str:
        return f"<PermuteReport: {self._summary()}>"

    def _summary(self) -> str:
        if self.reason:
            return f"unchanged: {self.reason}"
        permuted = sum(row.code is Code.PERMUTED for row in self.layers)
        words = f"{permuted} of {len(self.layers)} layers permuted"
        return f"{words}, 2:4 keeps {change_text(*self.energy, _share)} of the squared weight"

    def _table(self) -> Any:
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table

        title = escape(f"{self.model}: {self._summary()}")
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        for column in ("layer", "kind", "code"):
            table.add_column(column, overflow="fold")
        for column in ("inputs", "energy kept"):
            table.add_column(column, justify="right")
        table.add_column("reason", overflow="fold")
        for row in self.layers:
            energy = change_text(*row.energy, _share) if row.energy is not None else ""
            cells = [escape(row.name or "(model)"), escape(row.kind), row.code.value]
            cells += [str(row.channels or ""), energy, escape(row.reason)]
            table.add_row(*cells, style=_STYLES[row.code])
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can carry: strings, numbers, None, lists and dicts."""
        return {
            "model": self.model,
            "by": self.by,
            "reason": self.reason,
            "energy": list(self.energy),
            "layers": [asdict(row) | {"code": row.code.value} for row in self.layers],
        }

    def to_json(self) -> str:
        """The report as a JSON text, one object with ``layers`` and ``energy``."""
        return json.dumps(self.to_dict(), indent=2)


_STYLES = {Code.PERMUTED: "green", Code.BEST: "dim", Code.KEPT: "yellow", Code.DENSE: "dim"}


def _share(value: float) -> str:
    return f"{value:.2%}"
