"""What ``compact`` did: a row for each layer, and one for each edge between two of them."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import IO, Any

from sparseops.compact.cost import Totals
from sparseops.report import change_text, plain_text, row_named, show, size_text


class Code(str, enum.Enum):
    """What became of a layer or an edge. The value is stable, JSON carries it."""

    WHOLE = "whole"
    """Nothing to remove: every channel varies and is read."""
    COMPACTED = "compacted"
    """Only channels that vary and are read are left."""
    JOINED = "joined"
    """Smaller, but with channels that one side does not need: it gathers, scatters or computes with zeros."""
    KEPT = "kept"
    """As it was; the reason says why."""

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class LayerRow:
    """A linear, convolution or embedding layer.

    inputs, outputs: channels on its edges, before and after. macs: multiply-adds on the example, before and
    after.
    """

    name: str
    kind: str
    code: Code
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    macs: tuple[int, int]
    reason: str


@dataclass(frozen=True)
class EdgeRow:
    """What one layer hands to the next. consumer: a layer, or in parentheses an op that stops the pass.
    channels: before and after."""

    producer: str
    consumer: str
    code: Code
    channels: tuple[int, int]
    reason: str


class CompactReport:
    """layers: in the order of the model's modules. edges: in that of execution. before, after: totals on the
    example, None where the model has no graph. by: who drew that graph. reason: why the whole model stays as
    it is, "" if it does not.

    ``str(report)`` is the plain text, ``print`` the coloured one, ``to_json`` the same as data.
    """

    def __init__(  # noqa: PLR0913
        self,
        layers: Iterable[LayerRow],
        edges: Iterable[EdgeRow] = (),
        *,
        model: str = "",
        by: str = "",
        reason: str = "",
        before: Totals | None = None,
        after: Totals | None = None,
    ) -> None:
        self.layers, self.edges = tuple(layers), tuple(edges)
        self.model, self.by, self.reason = model, by, reason
        self.before, self.after = before, after

    def __getitem__(self, name: str) -> LayerRow:
        """The row of a layer (KeyError when there is none)."""
        return row_named(self.layers, name)

    def edge(self, producer: str, consumer: str) -> EdgeRow:
        """The row of an edge (KeyError when there is none)."""
        for row in self.edges:
            if (row.producer, row.consumer) == (producer, consumer):
                return row
        raise KeyError((producer, consumer))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CompactReport) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<CompactReport: {self._summary()}>"

    def __str__(self) -> str:
        return "\n\n".join(map(plain_text, self._tables()))

    def print(self, file: IO[str] | None = None) -> None:
        """Print both tables to ``file`` (standard output by default)."""
        for table in self._tables():
            show(table, file)

    def _summary(self) -> str:
        whole = {Code.COMPACTED, Code.WHOLE}
        small = sum(row.code is Code.COMPACTED for row in self.edges)
        words = f"{small} of {len(self.edges)} edges compacted, "
        words += f"{sum(row.code not in whole for row in self.edges)} with channels that stay"
        return f"unchanged: {self.reason}" if self.reason else words

    def _tables(self) -> list[Any]:
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table

        title = f"{self.model or 'model'}: {self._summary()}"
        if self.before is not None and self.after is not None:
            before, after = self.before, self.after
            title += (
                f"\nparameters {change_text(before.parameters, after.parameters, _count)}; on the example: "
            )
            title += f"multiply-adds {change_text(before.macs, after.macs, _count)}, "
            title += f"activations {change_text(before.activations, after.activations, size_text)}"
        layers = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD)
        for column in ("layer", "kind", "code"):
            layers.add_column(column, overflow="fold")
        for column in ("inputs", "outputs", "multiply-adds"):
            layers.add_column(column, justify="right")
        layers.add_column("reason", overflow="fold")
        for layer in self.layers:
            cells = [escape(layer.name or "(model)"), escape(layer.kind), layer.code.value]
            cells += [change_text(*layer.inputs, str), change_text(*layer.outputs, str)]
            cells += [change_text(*layer.macs, _count), escape(layer.reason)]
            layers.add_row(*cells, style=_STYLES[layer.code])
        edges = Table(title="edges", title_justify="left", box=SIMPLE_HEAD)
        for column in ("from", "to", "code"):
            edges.add_column(column, overflow="fold")
        edges.add_column("channels", justify="right")
        edges.add_column("reason", overflow="fold")
        for edge in self.edges:
            cells = [escape(edge.producer or "(model)"), escape(edge.consumer or "(model)"), edge.code.value]
            cells += [change_text(*edge.channels, str), escape(edge.reason)]
            edges.add_row(*cells, style=_STYLES[edge.code])
        return [layers, edges] if self.edges else [layers]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can carry: strings, numbers, None, lists and dicts."""
        totals = {"before": self.before, "after": self.after}
        return {
            "model": self.model,
            "by": self.by,
            "reason": self.reason,
            "layers": [asdict(row) | {"code": row.code.value} for row in self.layers],
            "edges": [asdict(row) | {"code": row.code.value} for row in self.edges],
            "total": {name: None if its is None else asdict(its) for name, its in totals.items()},
        }

    def to_json(self) -> str:
        """The report as a JSON text, one object with ``layers``, ``edges`` and ``total``."""
        return json.dumps(self.to_dict(), indent=2)


_STYLES = {Code.WHOLE: "dim", Code.COMPACTED: "green", Code.JOINED: "cyan", Code.KEPT: "yellow"}


def _count(number: float) -> str:
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.0f}{unit}" if unit == "" else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.1f}G"
