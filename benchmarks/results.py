"""The CSV files of results: one row per comparison, one file per op, one folder per machine."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.compare import Comparison
from benchmarks.provenance import RESULTS, folder_name, provenance


@dataclass(frozen=True)
class Row:
    """One comparison. Times are milliseconds per call, ``*_p20`` and ``*_p80`` quantiles over the rounds."""

    date: str
    commit: str
    machine: str
    isa: str
    torch: str
    sparseops: str
    op: str
    work: str
    dtype: str
    threads: int
    rounds: int
    dense_format: str
    dense_ms: float
    dense_p20: float
    dense_p80: float
    sparse_format: str
    sparse_ms: float
    sparse_p20: float
    sparse_p80: float
    ratio: float
    at_least: float
    aim: float | None
    dense_gflops: float | None
    sparse_gflops: float | None  # dense-equivalent: the dense layer's operations over the sparse time

    @property
    def verdict(self) -> str:
        """What was reached of what is asked."""
        if self.aim is not None and self.ratio >= self.aim:
            return "aim"
        return "at least" if self.ratio >= self.at_least else "below"


@dataclass(frozen=True)
class ChannelRow(Row):
    """One of a layer or a network with pruned channels. ``compact_*``: a dense layer of the kept channels."""

    kept_macs: float
    compact_format: str
    compact_ms: float | None
    compact_p20: float | None
    compact_p80: float | None

    @property
    def ideal(self) -> float:
        """The ratio that the remaining products alone would give."""
        return 1 / self.kept_macs

    @property
    def tax(self) -> float | None:
        """What gathering and scattering cost, as a share of the compact dense layer's time."""
        return self.sparse_ms / self.compact_ms - 1 if self.compact_ms else None


def new_row(
    op: str,
    work: str,
    dtype: str,
    comparison: Comparison,
    *,
    threads: int,
    rounds: int,
    at_least: float,
    aim: float | None,
    flops: int | None = None,
    kept_macs: float | None = None,
) -> Row:
    """A row measured now, here. ``flops`` are those of the dense layer, ``kept_macs`` makes a ChannelRow."""
    dense, sparse, compact = comparison.dense, comparison.sparse, comparison.compact
    kind: type[Row] = Row
    more: dict[str, Any] = {}
    if kept_macs is not None:
        kind, more = ChannelRow, {"kept_macs": round(kept_macs, 4)}
        more["compact_format"] = compact.memory_format if compact else ""
        for name in ("p50", "p20", "p80"):
            column = f"compact_{name.replace('p50', 'ms')}"
            more[column] = round(getattr(compact, name), 4) if compact else None
    return kind(
        **more,
        **provenance(),
        op=op,
        work=work,
        dtype=dtype,
        threads=threads,
        rounds=rounds,
        dense_format=dense.memory_format,
        dense_ms=round(dense.p50, 4),
        dense_p20=round(dense.p20, 4),
        dense_p80=round(dense.p80, 4),
        sparse_format=sparse.memory_format,
        sparse_ms=round(sparse.p50, 4),
        sparse_p20=round(sparse.p20, 4),
        sparse_p80=round(sparse.p80, 4),
        ratio=round(comparison.ratio, 3),
        at_least=at_least,
        aim=aim,
        dense_gflops=None if flops is None else round(flops / dense.p50 / 1e6, 1),
        sparse_gflops=None if flops is None else round(flops / sparse.p50 / 1e6, 1),
    )


def append(rows: Iterable[Row], root: Path = RESULTS) -> list[Path]:
    """Adds rows to ``<root>/<machine>/<op>.csv``; returns the files."""
    files: dict[Path, None] = {}
    for row in rows:
        file = root / folder_name(row.machine) / f"{row.op}.csv"
        file.parent.mkdir(parents=True, exist_ok=True)
        is_new = not file.exists()
        with file.open("a", newline="") as stream:
            writer = csv.DictWriter(stream, [field.name for field in fields(row)], lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(asdict(row))
        files[file] = None
    return list(files)


def read(root: Path = RESULTS) -> list[Row]:
    """Every row under ``root``, oldest first; tables of other columns, those of a GPU, are passed over."""
    rows: list[Row] = []
    for file in sorted(root.glob("*/*.csv")):
        with file.open(newline="") as stream:
            for line in csv.DictReader(stream):
                kinds = [k for k in (ChannelRow, Row) if {f.name for f in fields(k)} <= line.keys()]
                rows += [_parse(kind, line) for kind in kinds[:1]]
    return sorted(rows, key=lambda row: row.date)


def _parse(kind: type[Row], line: dict[str, str]) -> Row:
    # Annotations are strings here; the first word of each names its type.
    casts = {"str": str, "int": int, "float": float}
    values: dict[str, Any] = {}
    for field in fields(kind):
        text = line[field.name]
        cast = casts[str(field.type).split()[0]]
        values[field.name] = None if text == "" and cast is float else cast(text)
    return kind(**values)


def newest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each machine, instruction set, thread count, op, work and dtype."""
    last = {(r.machine, r.isa, r.threads, r.op, r.work, r.dtype): r for r in rows}
    return list(last.values())
