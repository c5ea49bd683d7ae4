"""``python -m benchmarks.plot``: draws the newest results. It never measures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.provenance import RESULTS
from benchmarks.results import Row, newest, read

COLORS = {"aim": "#2a9d8f", "at least": "#e9c46a", "below": "#e76f51"}
LABELS = {"aim": "aim reached", "at least": "at least reached", "below": "below both"}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Writes one panel per machine, instruction set and thread count: a bar per work, its targets as marks.

    Raises ValueError when there are no rows.
    """
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if not rows:
        raise ValueError("plot: rows must hold at least one result, got none")

    def setting(row: Row) -> tuple[str, str, int]:
        return row.machine, row.isa, row.threads

    panels = [(key, list(group)) for key, group in groupby(sorted(rows, key=setting), setting)]
    longest = max(len(group) for _, group in panels)
    size = (8.5 * len(panels), 0.34 * longest + 1.9)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    for axes, (key, group) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for place, row in enumerate(group):
            axes.barh(place, row.ratio, 0.7, color=COLORS[row.verdict])
            for target, color in ((row.at_least, "#555555"), (row.aim, "black")):
                if target is not None:
                    axes.vlines(target, place - 0.42, place + 0.42, colors=color)
            axes.text(0.03, place, f"{row.ratio:.2f}", va="center", fontsize=8)
        axes.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(group)), [f"{row.work} {row.dtype}" for row in group], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("dense time / sparse time")
        machine, isa, threads = key
        commits = sorted({row.commit for row in group})
        axes.set_title(f"{machine}\n{isa}, threads: {threads}, commit {', '.join(commits)}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    handles: list[Artist] = [Patch(color=color, label=LABELS[verdict]) for verdict, color in COLORS.items()]
    handles += [Line2D([], [], color="#555555", label="at least"), Line2D([], [], color="black", label="aim")]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> int:
    """Draws the rows under ``--csv`` into ``--out``."""
    what = "Draws the newest results."
    options = argparse.ArgumentParser("python -m benchmarks.plot", description=what)
    add = options.add_argument
    add("--csv", type=Path, default=RESULTS, metavar="FOLDER", help="where the results are")
    add(
        "--out",
        type=Path,
        default=Path("benchmarks.png"),
        metavar="PATH",
        help="the picture (benchmarks.png)",
    )
    chosen = options.parse_args(argv)
    rows = newest(read(chosen.csv))
    if not rows:
        print(f"plot: --csv must hold results, got none in {chosen.csv}", file=sys.stderr)
        return 1
    draw(rows, chosen.out)
    print(chosen.out.resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
