"""``python -m benchmarks.table``: the newest results as Markdown; ``--write`` puts them into
docs/benchmarks.md, and those of a few layers and networks into the README.

It never measures: it reads what ``benchmarks.run`` and ``benchmarks.end_to_end`` wrote with ``--csv``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.output import spliced
from benchmarks.provenance import RESULTS, TREE
from benchmarks.results import ChannelRow, Row, newest, read

MARKERS = "results"
PAGE = "docs/benchmarks.md"
HEADLINES = {
    *("HED (VGG16) 320x320", "512x1024->1024", "256x4096->4096", "8x4096->4096"),
    *("3x3 1x128@28->128", "3x3 1x256@14->256", "3x3 1x512@28->512", "1x1 1x256@14->1024"),
    *(
        f"resnet50 {b}x3x224x224, kept 50%, {how}"
        for b in (1, 8)
        for how in ("converted", "compacted", "together")
    ),
    *(f"vgg16 1x3x224x224, kept 50%, {how}" for how in ("converted", "compacted")),
    *("512x1024->1024, kept 512->512", "3x3 1x128@28->128, kept 64->64", "3x3 1x256@14->256, kept 128->128"),
    *(
        "3x3 1x512@28->512, kept 256->256",
        "1x1 1x256@14->1024, kept 128->512",
        "3x3 1x512@28->512, kept 512->256",
    ),
}
"""The works that the README shows."""
OP_ORDER = ("end_to_end", "nm24_linear", "nm24_conv", "channel_network", "channel_conv", "channel_linear")
CHANNEL_HEAD = (
    "",
    "| pruned channels | dense ms | compact ms | sparse ms | tax | ratio | ideal | at least | reached |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---|",
)
SETTING = ("machine", "isa", "threads", "torch", "commit")


def markdown(rows: Sequence[Row]) -> str:
    """One table for each machine, instruction set, thread count, torch version and commit among ``rows``."""
    if not rows:
        return "Nothing has been measured yet.\n"

    def setting(row: Row) -> tuple[str, ...]:
        return tuple(str(getattr(row, name)) for name in SETTING)

    def place(row: Row) -> tuple[object, ...]:
        return setting(row), OP_ORDER.index(row.op) if row.op in OP_ORDER else len(OP_ORDER)

    parts = []
    for key, group in groupby(sorted(rows, key=place), setting):
        machine, isa, threads, torch, commit = key
        threads += " thread" if threads == "1" else " threads"
        chosen = list(group)
        lines = [
            f"{machine}; {isa} kernels; {threads}; torch {torch}; commit `{commit or 'unknown'}`.",
        ]
        plain = [row for row in chosen if not isinstance(row, ChannelRow)]
        pruned = [row for row in chosen if isinstance(row, ChannelRow)]
        head = [
            "",
            "| work | dtype | dense ms | sparse ms | ratio | at least | aim | reached |",
            "|---|---|---:|---:|---:|---:|---:|---|",
        ]
        if plain:
            lines += [*head, *(f"| {' | '.join(_cells(row))} |" for row in plain)]
        if pruned:
            lines += [*CHANNEL_HEAD, *(f"| {' | '.join(_channel_cells(row))} |" for row in pruned)]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _cells(row: Row) -> tuple[str, ...]:
    aim = f"{row.aim:.2f}" if row.aim else ""
    times = (_ms(row.dense_ms), _ms(row.sparse_ms), f"**{row.ratio:.2f}**")
    return (_name(row), row.dtype, *times, f"{row.at_least:.2f}", aim, row.verdict)


def _channel_cells(row: ChannelRow) -> tuple[str, ...]:
    compact = "" if row.compact_ms is None else _ms(row.compact_ms)
    tax = "" if row.tax is None else f"{row.tax:.1%}"
    ratios = (f"**{row.ratio:.2f}**", f"{row.ideal:.2f}", f"{row.at_least:.2f}")
    return (_name(row), _ms(row.dense_ms), compact, _ms(row.sparse_ms), tax, *ratios, row.verdict)


def _name(row: Row) -> str:
    kind = {"linear": "linear", "conv": "convolution"}.get(row.op.rpartition("_")[2], "whole model:")
    return f"{kind} {row.work.replace('->', '→')}"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, or writes it into the pages."""
    what = "The newest results as Markdown."
    options = argparse.ArgumentParser("python -m benchmarks.table", description=what)
    add = options.add_argument
    add("--csv", type=Path, default=RESULTS, metavar="FOLDER", help="where the results are")
    add("--machine", default="", metavar="TEXT", help="only machines whose name contains TEXT")
    add("--threads", type=int, metavar="N", help="only rows of this thread count")
    add("--isa", metavar="NAME", help="only rows of this instruction set")
    add("--write", action="store_true", help=f"put it into {PAGE} and the README, between the markers")
    chosen = options.parse_args(argv)
    rows = [
        row
        for row in newest(read(chosen.csv))
        if chosen.machine in row.machine
        and chosen.threads in (None, row.threads)
        and chosen.isa in (None, row.isa)
    ]
    if not chosen.write:
        print(markdown(rows), end="")
        return 0
    headlines = [row for row in rows if row.work in HEADLINES]
    for name, shown in ((PAGE, rows), ("README.md", headlines)):
        page = TREE / name
        page.write_text(spliced(page.read_text(), MARKERS, markdown(shown)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
