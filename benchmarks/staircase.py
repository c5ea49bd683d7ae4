"""``python -m benchmarks.staircase``: time of a dense convolution against its kept width, channel by channel.

It goes down in stairs, since kernels work in steps of channels: between two stairs a smaller layer is not a
faster one. That is why ``Channels`` rounds kept counts (``round_to``). Plain torch alone is timed.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import isa
from benchmarks.compare import LAYOUTS, Call, alternate, times
from benchmarks.provenance import provenance
from sparseops import Channels

DEFAULT = Path("staircase.png")


def calls(channels: int, side: int, widths: Sequence[int]) -> dict[tuple[int, str], Call]:
    """3x3 convolutions of ``width`` to ``width`` channels by width and memory format."""
    torch.manual_seed(0)
    found: dict[tuple[int, str], Call] = {}
    whole, weights = torch.randn(1, channels, side, side), torch.randn(channels, channels, 3, 3)
    for width in widths:
        for name, layout in LAYOUTS.items():
            x, w = (t.contiguous(memory_format=layout) for t in (whole[:, :width], weights[:width, :width]))
            found[width, name] = partial(F.conv2d, x, w, padding=1)
    return found


def measure(channels: int, side: int, widths: Sequence[int], rounds: int) -> dict[int, float]:
    """Median milliseconds by width, in the faster memory format."""
    with torch.inference_mode():
        samples = alternate(calls(channels, side, widths), rounds)
    found: dict[int, float] = {}
    for (width, name), sample in samples.items():
        found[width] = min(found.get(width, float("inf")), times(name, sample).p50)
    return found


def write(file: Path, milliseconds: dict[int, float], layer: str, rounds: int) -> None:
    """A row per width, each with where and when it was measured."""
    columns = {**provenance(), "layer": layer, "threads": torch.get_num_threads(), "rounds": rounds}
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([*columns, "width", "ms"])
        writer.writerows([*columns.values(), width, round(ms, 4)] for width, ms in milliseconds.items())


def draw(file: Path, milliseconds: dict[int, float], layer: str) -> None:
    """Time against width; widths that ``Channels`` would choose are marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6), layout="constrained", facecolor="white")
    axes = figure.subplots()
    widths, round_to = sorted(milliseconds), Channels().round_to
    largest = widths[-1]
    axes.plot(widths, [milliseconds[w] for w in widths], color="#8d99ae", marker=".", label="every width")
    rounded = [w for w in widths if w % round_to == 0]
    axes.plot(
        rounded,
        [milliseconds[w] for w in rounded],
        "o",
        color="#e4572e",
        label=f"multiples of {round_to} (round_to)",
    )
    axes.plot(
        widths,
        [milliseconds[largest] * (w / largest) ** 2 for w in widths],
        ":",
        color="black",
        label="in proportion to the multiply-adds",
    )
    where = provenance()
    axes.set_title(
        f"{layer}, dense, torch {where['torch']}\n{where['machine']}, {where['isa']}, "
        f"threads: {torch.get_num_threads()}, commit {where['commit'] or 'unknown'}",
        fontsize=9,
    )
    axes.set_xlabel("kept width (input and output channels)")
    axes.set_ylabel("ms per call")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=130)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, writes the CSV and the picture beside each other, and says how much odd widths cost."""
    options = argparse.ArgumentParser("python -m benchmarks.staircase", description="Time against width.")
    add = options.add_argument
    add("--plot", type=Path, default=DEFAULT, metavar="FILE", help=f"the picture ({DEFAULT}), beside a .csv")
    add("--channels", type=int, default=128, metavar="N", help="the widest layer (128)")
    add("--lowest", type=int, default=32, metavar="N", help="the narrowest one (32)")
    add("--step", type=int, default=1, metavar="N", help="from width to width (1)")
    add("--side", type=int, default=28, metavar="PX", help="height and width of the images (28)")
    add("--rounds", type=int, default=9, metavar="N", help="alternating samples of each width (9)")
    add("--threads", type=int, metavar="N", help="CPU threads (torch's default)")
    chosen = options.parse_args(argv)
    if not 0 < chosen.lowest < chosen.channels:
        options.error(f"--lowest must be from 1 to below --channels, got {chosen.lowest}")
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    widths = range(chosen.channels, chosen.lowest - 1, -chosen.step)
    layer = f"3x3 convolution, 1xwidth@{chosen.side}->width"
    found = measure(chosen.channels, chosen.side, widths, chosen.rounds)
    table = chosen.plot.with_suffix(".csv")
    write(table, found, layer, chosen.rounds)
    draw(chosen.plot, found, layer)
    slower = [w for w in found if w % 8 and found[w] > found.get(-(-w // 8) * 8, float("inf"))]
    odd = sum(1 for w in found if w % 8)
    print(f"{isa.current()}: {len(slower)} of {odd} widths between multiples of 8 are slower than the next")
    print(f"{table.resolve()}\n{chosen.plot.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
