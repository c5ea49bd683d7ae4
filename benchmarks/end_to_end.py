"""``python -m benchmarks.end_to_end``: the demo's network, as a row beside the other results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.compare import Comparison, times
from benchmarks.output import console
from benchmarks.provenance import RESULTS
from benchmarks.results import append, new_row
from benchmarks.run import cells, table
from sparseops import demo

AT_LEAST = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the row; the exit status is 1 when the network cannot be loaded."""
    options = argparse.ArgumentParser("python -m benchmarks.end_to_end", description="A whole network.")
    add = options.add_argument
    add("--size", type=int, default=320, metavar="PX", help="pixels on each side of a photograph (320)")
    add("--photos", type=int, default=4, metavar="N", help="how many photographs (4)")
    add("--rounds", type=int, default=7, metavar="N", help="timed runs over all photographs (7)")
    add("--threads", type=int, metavar="N", help="CPU threads of both sides (torch's default)")
    add("--csv", type=Path, nargs="?", const=RESULTS, metavar="FOLDER", help="append the row to a CSV there")
    chosen = options.parse_args(argv)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    try:
        photos = [demo.load_photo(file, chosen.size) for file in demo.photo_files(chosen.photos)]
        result = demo.run(photos, chosen.rounds)
    except demo.DemoError as error:
        print(error, file=sys.stderr)
        return 1
    sides = (times(side.memory_format, side.samples) for side in (result.dense, result.sparse))
    row = new_row(
        "end_to_end",
        f"HED (VGG16) {chosen.size}x{chosen.size}",
        "f32",
        Comparison(*sides),
        threads=result.threads,
        rounds=len(result.dense.samples),
        at_least=AT_LEAST,
        aim=None,
    )
    out = console()
    summary = table(f"{row.machine}, {row.isa}, threads: {row.threads}, torch {row.torch}")
    summary.add_row(*cells(row))
    out.print(summary)
    if chosen.csv:
        for file in append([row], chosen.csv):
            out.print(f"appended to {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
