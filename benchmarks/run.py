"""``python -m benchmarks.run``: the table of dense and sparse times. Options: ``--help``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from benchmarks import isa
from benchmarks.compare import WrongResult, compare
from benchmarks.output import console
from benchmarks.provenance import RESULTS, machine
from benchmarks.results import ChannelRow, Row, append, new_row
from benchmarks.shapes import CHANNEL_WORKS, DTYPE_TAGS, Pruned, Work
from benchmarks.shapes import WORKS as NM24_WORKS

WORKS = (*NM24_WORKS, *CHANNEL_WORKS)
VERDICT_STYLE = {"aim": "green", "at least": "yellow", "below": "red"}


NUMBERS = (
    "dense ms",
    "GFLOP/s",
    "sparse ms",
    "GFLOP/s*",
    "compact ms",
    "tax",
    "ratio",
    "ideal",
    "at least",
    "aim",
)


def parser() -> argparse.ArgumentParser:
    """The options."""
    what = "Dense and sparse, side by side."
    options = argparse.ArgumentParser("python -m benchmarks.run", description=what)
    add = options.add_argument
    add("--op", choices=sorted({work.op for work in WORKS}), help="only this op")
    add("--dtype", choices=sorted(set(DTYPE_TAGS.values())), help="only this dtype")
    add("--work", default="", metavar="TEXT", help="only works whose name contains TEXT, such as @14")
    add("--threads", type=int, metavar="N", help="CPU threads of both sides (torch's default)")
    add("--isa", choices=isa.names(), help="instruction set of the sparse kernels (the processor's best)")
    add("--rounds", type=int, default=21, metavar="N", help="alternating samples of each contender (21)")
    add(
        "--csv",
        type=Path,
        nargs="?",
        const=RESULTS,
        metavar="FOLDER",
        help="append the rows to FOLDER/<machine>/<op>.csv (benchmarks/results)",
    )
    return options


def chosen(options: argparse.Namespace) -> list[Work]:
    """The works that the options leave."""
    return [
        work
        for work in WORKS
        if options.op in (None, work.op) and options.dtype in (None, work.tag) and options.work in work.name
    ]


def measure(work: Work, rounds: int) -> Row:
    """Compares one work and makes its row."""
    return new_row(
        work.op,
        work.name,
        work.tag,
        compare(work, rounds),
        threads=torch.get_num_threads(),
        rounds=rounds,
        at_least=work.at_least,
        aim=work.aim,
        flops=work.layer.flops,
        kept_macs=work.layer.kept_macs if isinstance(work.layer, Pruned) else None,
    )


def table(title: str) -> Table:
    """An empty table of results."""
    result = Table(title=title, title_justify="left")
    for heading in ("op", "work", "dtype"):
        result.add_column(heading, no_wrap=True)
    for heading in NUMBERS:
        result.add_column(heading, justify="right", no_wrap=True)
    result.add_column("reached", no_wrap=True)
    return result


def cells(row: Row) -> list[str]:
    """A row of the table."""
    pruned = row if isinstance(row, ChannelRow) else None
    return [
        row.op,
        row.work,
        row.dtype,
        f"{row.dense_ms:.3f}",
        f"{row.dense_gflops:.1f}" if row.dense_gflops else "",
        f"{row.sparse_ms:.3f}",
        f"{row.sparse_gflops:.1f}" if row.sparse_gflops else "",
        f"{pruned.compact_ms:.3f}" if pruned and pruned.compact_ms else "",
        "" if pruned is None or pruned.tax is None else f"{pruned.tax:.1%}",
        f"{row.ratio:.2f}",
        f"{pruned.ideal:.2f}" if pruned else "",
        f"{row.at_least:.2f}",
        f"{row.aim:.2f}" if row.aim else "",
        row.verdict,
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; the exit status is 1 when a result was wrong."""
    options = parser().parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.isa:
        isa.use(options.isa)
    out = console()
    threads = torch.get_num_threads()
    result = table(f"{machine()}, {isa.current()}, threads: {threads}, torch {torch.__version__}")
    rows, wrong = [], 0
    works = chosen(options)
    with out.status("") as status:
        for number, work in enumerate(works, 1):
            name = (work.op, work.name, work.tag)
            status.update(f"{number} of {len(works)}: {' '.join(name)}")
            if work.isa and not isa.reaches(work.isa):
                result.add_row(*name, *[""] * len(NUMBERS), f"not run: needs {work.isa}", style="dim")
                continue
            try:
                row = measure(work, options.rounds)
            except WrongResult as error:
                wrong += 1
                result.add_row(*name, *[""] * len(NUMBERS), "WRONG RESULT, not timed", style="bold red")
                out.print(error, style="bold red", markup=False)
                continue
            rows.append(row)
            result.add_row(*cells(row), style=VERDICT_STYLE[row.verdict])
    out.print(result)
    out.print("* dense-equivalent: the dense layer's operations over the sparse time")
    if any(isinstance(row, ChannelRow) for row in rows):
        out.print("compact: a dense layer of the kept channels alone; tax: what gather and scatter add to it")
    if options.csv:
        for file in append(rows, options.csv):
            out.print(f"appended to {file}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
