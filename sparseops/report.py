"""The layer report: one row per layer, saying what happened to it and why.

``sparseops.convert`` leaves a :class:`Report` on the model it returns and ``sparseops.explain(model)`` hands
it out. Bytes are those of the weight (values and metadata, without the bias), times are medians in
milliseconds.
"""

from __future__ import annotations

import enum
import io
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import IO, Any, Protocol, TypeVar


class Code(str, enum.Enum):
    """Why a layer is what it is. The value is stable, JSON carries it; the explanation is for people."""

    explanation: str

    def __new__(cls, value: str, explanation: str) -> Code:
        code = str.__new__(cls, value)
        code._value_ = value
        code.explanation = explanation
        return code

    def __str__(self) -> str:
        return str(self.value)

    @classmethod
    def of(cls, value: str) -> Code:
        """The code with this value (ValueError when there is none)."""
        code: Code = cls._value2member_map_.get(value)  # type: ignore[assignment]
        if code is None:
            raise ValueError(f"Code: value must be one of {', '.join(c.value for c in cls)}, got {value!r}")
        return code

    CONVERTED = "converted", "the layer runs on a sparse weight"
    ALREADY_SPARSE = "already_sparse", "the layer was sparse before this call and is left as it is"
    ELIGIBLE = "eligible", "convert would make this layer sparse"

    EXCLUDED = "excluded", "include, exclude or the plan leaves the layer out"
    KIND = "kind", "there is no sparse module for this kind of layer"
    TOO_SMALL = "too_small", "the layer has too little work for a sparse kernel to win anything"
    DEPTHWISE = (
        "depthwise",
        "a depthwise convolution has one input channel per group, so nothing to leave out",
    )
    GROUPED = "grouped", "the groups of the convolution are too narrow for a sparse kernel to win anything"
    DTYPE = "dtype", "the weight must be float32, float16 or bfloat16"
    COMPLEX = "complex", "the weight is complex"
    META_DEVICE = "meta_device", "the weight has no data yet (meta device), so there is nothing to pack"
    LAZY = "lazy", "the layer does not know its shape before its first forward"
    QUANTIZED = "quantized", "the layer is quantized"
    TENSOR_KIND = "tensor_kind", "the weight is not an ordinary dense tensor"
    SHARED_WEIGHT = "shared_weight", "another layer uses the same weight and would not see the sparse one"
    PARAMETRIZED = "parametrized", "the weight is computed from other tensors at each forward"
    SUBCLASS = "subclass", "the class adds behaviour of its own, which a replacement would lose"
    PATCHED = "patched", "the layer's methods were replaced on the instance, which a replacement would lose"
    EXTRA_STATE = "extra_state", "the layer holds parameters, buffers or modules besides weight and bias"
    HOOKS = "hooks", "hooks of the layer expect its dense weight"
    WEIGHT_READ = (
        "weight_read",
        "code outside the layer reads its weight, so the sparse kernel would not be used",
    )
    TORCHSCRIPT = "torchscript", "the children of a TorchScript module cannot be replaced"
    SLOWER = "slower", "the sparse layer was measured and is not faster"
    WHOLE = "whole", "the pruning drops none of the layer's channels"
    UNSTRUCTURED = "unstructured", "its zeros lie in no pattern that a kernel gains from"


SPARSE_CODES = frozenset({Code.CONVERTED, Code.ALREADY_SPARSE})


@dataclass(frozen=True)
class Row:
    """One layer.

    name: qualified name in the model, "" for the model itself. kind: class name. shape: of the dense weight.
    format, kernel: of the sparse layer (for an eligible one: those it would get), "" for a dense one.
    energy_kept: share of the squared weight that is kept, in [0, 1], None where unknown.
    bytes_before, bytes_after: of the weight. ms_before, ms_after: medians, None when not measured.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    format: str
    kernel: str
    code: Code
    reason: str
    energy_kept: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    ms_before: float | None = None
    ms_after: float | None = None

    @property
    def sparse(self) -> bool:
        """The layer runs on a sparse weight."""
        return self.code in SPARSE_CODES

    @property
    def speedup(self) -> float | None:
        """Dense time over sparse time, None when not measured."""
        return self.ms_before / self.ms_after if self.ms_before and self.ms_after else None

    @property
    def label(self) -> str:
        return self.name or "(model)"


class Tabled:
    """What is a table to people: ``str`` is the plain one, ``print`` the coloured one."""

    def __str__(self) -> str:
        return plain_text(self._table())

    def print(self, file: IO[str] | None = None) -> None:
        """Print the table to ``file`` (standard output by default): coloured and fitted in a terminal, else
        plain."""
        show(self._table(), file)

    def _table(self) -> Any:
        """A rich table."""
        raise NotImplementedError


class Report(Tabled):
    """Rows in the order of ``model.named_modules()``; ``len``, iteration and indexing go over them.

    ``str(report)`` is the plain table, ``print`` the coloured one, ``to_json`` / ``from_json`` and ``plot``
    the rest. model: class name of the model. pattern: the one asked for. threads: torch's at the time of the
    measurement, None when nothing was measured. torch: its version then.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        *,
        model: str = "",
        pattern: str = "2:4",
        threads: int | None = None,
        torch: str | None = None,
    ) -> None:
        self.rows = tuple(rows)
        self.model = model
        self.pattern = pattern
        self.threads = threads
        self.torch = torch

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, key: int | str) -> Row:
        """The row at a position, or of a layer by its name (KeyError when there is none)."""
        if isinstance(key, int):
            return self.rows[key]
        return row_named(self.rows, key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Report) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    @property
    def sparse_rows(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.sparse)

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    @property
    def measured(self) -> tuple[Row, ...]:
        """The rows with times."""
        return tuple(row for row in self.rows if row.ms_before is not None and row.ms_after is not None)

    @property
    def ms_before(self) -> float | None:
        """Dense time of the measured layers together, None when none was."""
        return sum(row.ms_before or 0.0 for row in self.measured) if self.measured else None

    @property
    def ms_after(self) -> float | None:
        """Time of the measured layers together as the model now runs them: those that were slower stayed
        dense."""
        if not self.measured:
            return None
        return sum((row.ms_after if row.sparse else row.ms_before) or 0.0 for row in self.measured)

    @property
    def speedup(self) -> float | None:
        """Of the measured layers together, as the model now runs them."""
        before, after = self.ms_before, self.ms_after
        return before / after if before and after else None

    def __repr__(self) -> str:
        return f"<Report: {len(self.sparse_rows)} of {len(self)} layers sparse>"

    def _table(self) -> Any:
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table

        measured = bool(self.measured)
        title = f"{self.model or 'model'}, pattern {self.pattern}: "
        title += f"{len(self.sparse_rows)} of {len(self)} layers sparse"
        if eligible := sum(row.code is Code.ELIGIBLE for row in self.rows):
            title += f", {eligible} more can be"
        if measured:
            title += f" (times: {self.threads} thread{'s' if self.threads != 1 else ''}, torch {self.torch})"
        table = Table(title=escape(title), title_justify="left", show_footer=True, box=SIMPLE_HEAD)
        table.add_column("layer", footer="total", overflow="fold")
        table.add_column("kind")
        table.add_column("weight")
        table.add_column("code")
        table.add_column("kernel", overflow="fold")
        table.add_column("energy", justify="right")
        table.add_column(
            "bytes", justify="right", footer=change_text(self.bytes_before, self.bytes_after, size_text)
        )
        if measured:
            table.add_column(
                "ms", justify="right", footer=change_text(self.ms_before, self.ms_after, ms_text)
            )
            table.add_column("speed-up", justify="right", footer=_times(self.speedup))
        table.add_column("reason", overflow="fold")
        for row in self.rows:
            cells = [
                escape(row.label),
                escape(row.kind),
                "x".join(map(str, row.shape)),
                row.code.value,
                escape(row.kernel),
                "" if row.energy_kept is None else f"{100 * row.energy_kept:.1f}%",
                change_text(row.bytes_before, row.bytes_after, size_text),
            ]
            if measured:
                cells += [change_text(row.ms_before, row.ms_after, ms_text), _times(row.speedup)]
            cells.append(escape(row.reason))
            style = "green" if row.sparse else "cyan" if row.code is Code.ELIGIBLE else "dim"
            table.add_row(*cells, style=style)
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can carry: strings, numbers, None, lists and dicts."""
        return {
            "model": self.model,
            "pattern": self.pattern,
            "threads": self.threads,
            "torch": self.torch,
            "layers": [
                _finite(asdict(row) | {"code": row.code.value, "speedup": row.speedup}) for row in self.rows
            ],
            "total": _finite(
                {
                    "layers": len(self),
                    "sparse": len(self.sparse_rows),
                    "bytes_before": self.bytes_before,
                    "bytes_after": self.bytes_after,
                    "ms_before": self.ms_before,
                    "ms_after": self.ms_after,
                    "speedup": self.speedup,
                }
            ),
        }

    def to_json(self) -> str:
        """The report as a JSON text, one object with ``layers`` and ``total``; ``from_json`` reads it."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that ``to_json`` wrote. Derived numbers (total, speedup) are computed again, not
        trusted."""
        data = json.loads(text)
        names = {field.name for field in fields(Row)}
        rows = []
        for layer in data["layers"]:
            values = {name: value for name, value in layer.items() if name in names}
            rows.append(Row(**values | {"code": Code.of(values["code"]), "shape": tuple(values["shape"])}))
        return cls(
            rows, model=data["model"], pattern=data["pattern"], threads=data["threads"], torch=data["torch"]
        )

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a picture to ``path`` (the ending chooses the type): per layer the dense and the sparse time,
        or, when nothing was measured, the bytes of the weight before and after.

        Raises ValueError when the report has no rows, and what matplotlib raises for a path it cannot write.
        """
        if not self.rows:
            raise ValueError("plot: report must have at least one layer, got none")
        from matplotlib.figure import Figure

        measured = bool(self.measured)
        rows = self.measured or self.rows
        before = [(row.ms_before if measured else row.bytes_before / 2**20) or 0.0 for row in rows]
        after = [(row.ms_after if measured else row.bytes_after / 2**20) or 0.0 for row in rows]
        colors = ["tab:green" if row.sparse else "tab:gray" for row in rows]
        # A Figure of its own, not pyplot: no window system, no global state left behind.
        figure = Figure(figsize=(max(6.0, 0.45 * len(rows) + 2), 4.8), layout="constrained")
        axes = figure.subplots()
        places = range(len(rows))
        axes.bar([p - 0.2 for p in places], before, 0.4, color="tab:blue", label="dense")
        axes.bar([p + 0.2 for p in places], after, 0.4, color=colors, label="sparse (gray: not used)")
        axes.set_xticks(list(places), [row.label for row in rows], rotation=60, ha="right")
        unit = f"ms ({self.threads} threads)" if measured else "MiB of weight"
        axes.set_ylabel(unit)
        total = (
            _times(self.speedup) if measured else change_text(self.bytes_before, self.bytes_after, size_text)
        )
        axes.set_title(
            f"{self.model or 'model'}: {len(self.sparse_rows)} of {len(self)} layers sparse, {total}"
        )
        axes.legend()
        figure.savefig(path)


class _Named(Protocol):
    @property
    def name(self) -> str: ...


R = TypeVar("R", bound=_Named)


def row_named(rows: Iterable[R], name: str) -> R:
    """The first row of this name (KeyError when there is none)."""
    for row in rows:
        if row.name == name:
            return row
    raise KeyError(name)


def plain_text(table: Any) -> str:
    """A rich table as plain text, so wide that no cell wraps: it is read in logs and by other programs."""
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=1000, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())


def show(table: Any, file: IO[str] | None = None) -> None:
    """Print a rich table to ``file`` (standard output by default): coloured and fitted in a terminal, else
    plain."""
    from rich.console import Console

    console = Console(file=file)
    if console.is_terminal:
        console.print(table)
    else:
        print(plain_text(table), file=file)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def size_text(count: float) -> str:
    """A number of bytes, for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def ms_text(value: float) -> str:
    """A time in milliseconds, for people."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def change_text(before: float | None, after: float | None, say: Callable[[float], str]) -> str:
    """A quantity before and after in the words of ``say``, once where it stays; "" where it is unknown."""
    if before is None or after is None:
        return "" if before is None else say(before)
    return say(before) if before == after else f"{say(before)} → {say(after)}"


def _times(speedup: float | None) -> str:
    return "" if speedup is None else f"{speedup:.2f}x"
