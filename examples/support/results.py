"""What an example prints and writes: a table, the networks timed in turn, where the numbers come from."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sparseops import demo
from support.packages import DataError

TREE = Path(__file__).resolve().parents[2]
MIN_ROUNDS = 5


@dataclass
class Row:
    """One network. value: of the metric. kept: its non-zero parameters, as a share of the dense network's.
    size: bytes of its parameters and buffers. ms: median time of the example batch. others:
    further metrics, by name."""

    name: str
    value: float
    kept: float
    size: int
    ms: float = 0.0
    others: dict[str, float] = field(default_factory=dict)


class Results:
    """The rows of an example; the first one is the dense network.

    metric: its name and unit. example: the input of one timed batch, several inputs as a tuple.
    """

    def __init__(self, title: str, metric: str, example: Tensor | tuple[Any, ...]) -> None:
        self.title, self.metric, self.example = title, metric, example
        self.rows: list[Row] = []
        self._models: list[nn.Module] = []
        self._dense = 0

    def add(self, name: str, value: float, model: nn.Module, **others: float) -> None:
        """A row: what the network scored, and the network as it is shipped, which is timed at the end; so
        hand over a copy of one that is trained on. others: further metrics, the same in each row."""
        weights = nonzero(model)
        self._dense = self._dense or sum(p.numel() for p in model.parameters())
        self.rows.append(Row(name, value, weights / self._dense, stored(model), others=others))
        self._models.append(model.eval())

    def time(self, seconds: float) -> None:
        """Times all networks in alternating runs, for about so long each."""
        for row, ms in zip(self.rows, median_ms(self._models, self.example, seconds), strict=True):
            row.ms = ms

    def print(self) -> None:
        table = Table(title=f"{self.title} (threads: {torch.get_num_threads()})", title_justify="left")
        table.add_column("network")
        others = self.rows[0].others if self.rows else ()
        for column in (self.metric, *others, "non-zero", "MB", "ms per batch"):
            table.add_column(column, justify="right")
        for row in self.rows:
            metrics = (f"{value:.4g}" for value in (row.value, *row.others.values()))
            table.add_row(
                row.name, *metrics, f"{100 * row.kept:.1f}%", f"{row.size / 1e6:.2f}", f"{row.ms:.2f}"
            )
        (Console() if sys.stdout.isatty() else Console(width=110)).print(table)

    def write(self, file: Path, seed: int) -> None:
        """JSON: the rows, and the machine, versions, commit, seed and threads that they come from."""
        facts = {"title": self.title, "metric": self.metric, "seed": seed, "threads": torch.get_num_threads()}
        rows = [asdict(row) for row in self.rows]
        file.write_text(json.dumps({**facts, **provenance(), "rows": rows}, indent=2) + "\n")


def nonzero(model: nn.Module) -> int:
    """How many parameters are not zero."""
    return sum(int(p.count_nonzero()) for p in model.parameters())


def stored(model: nn.Module) -> int:
    """Bytes of what ``torch.save(model.state_dict())`` writes."""
    return sum(t.nbytes for t in model.state_dict().values() if isinstance(t, Tensor))


def median_ms(models: Sequence[nn.Module], example: Any, seconds: float) -> list[float]:
    """Median milliseconds of each, run in turn so that a busy machine is equally unfair to all."""
    inputs = example if isinstance(example, tuple) else (example,)
    times: list[list[float]] = [[] for _ in models]
    deadline = time.perf_counter() + seconds * len(models)
    with torch.inference_mode():
        for model in models:
            model(*inputs)
        while len(times[0]) < MIN_ROUNDS or time.perf_counter() < deadline:
            for model, taken in zip(models, times, strict=True):
                start = time.perf_counter()
                model(*inputs)
                taken.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(taken) for taken in times]


def provenance() -> dict[str, str]:
    """Date, commit, machine and versions, as the benchmarks write them."""
    if str(TREE) not in sys.path:
        sys.path.append(str(TREE))
    from benchmarks import provenance as found

    return found.provenance()


def run(
    example: Callable[[argparse.Namespace], Results],
    text: str,
    argv: Sequence[str] | None,
    **files: str,
) -> dict[str, float]:
    """Parses the command line, runs the example, prints its table, and returns the metric by row, and others
    by "row, metric".

    example: is given the options ``quick`` and ``seed``. text: of ``--help``. files: further options, which
    name a file or are None, and the help of each. Exits with the cure where a package, a file or the network
    is missing.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less data, few steps: to see it run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="torch's own number otherwise")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there, too")
    for name, use in files.items():
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=use)
    options = parser.parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    try:
        results = example(options)
    except (DataError, demo.DemoError) as error:
        sys.exit(str(error))
    results.time(0.1 if options.quick else 3.0)
    results.print()
    if options.json is not None:
        results.write(options.json, options.seed)
    found = {}
    for row in results.rows:
        found[row.name] = row.value
        found |= {f"{row.name}, {name}": value for name, value in row.others.items()}
    return found
