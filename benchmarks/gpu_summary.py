"""``python -m benchmarks.gpu_summary FOLDER``: a run in at most 66 lines.

A cell is how many times faster than the dense baseline ours is, a slash, and how many times the best of
torch's sparse peers is.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.gpu_results import (
    BASELINES,
    CEILINGS,
    COMPACT,
    FAILED,
    LAYERS,
    OK,
    OURS,
    POWER,
    STAGES,
    TESTS,
    WRONG,
    Ceiling,
    GpuRow,
    OpTests,
    Power,
    Stage,
    environment,
    read,
)

MOST_LINES, WIDTH = 66, 110
SHOWN_MISSES, SHOWN_FAULTS = 2, 2
CHANNEL_RATIO, CHANNEL_TAX = 1.8, 0.03  # asked at 50 % of the products, and of gather and scatter
MISS = 1.05  # how much faster another plan has to be to be named

Works = dict[tuple[str, str, str], list[GpuRow]]
"""The rows of each work."""


def by_work(rows: Iterable[GpuRow]) -> Works:
    works: Works = {}
    for row in rows:
        works.setdefault(row.key, []).append(row)
    return works


def picked(rows: Iterable[GpuRow]) -> GpuRow | None:
    """Ours as a plain call runs it."""
    return next((row for row in rows if row.contender == OURS and row.picked), None)


def best_peer(rows: Sequence[GpuRow]) -> float | None:
    """The best ratio of the peers that take a sparse weight."""
    dense = BASELINES[rows[0].op]
    ratios = [r.ratio for r in rows if r.contender != OURS and not r.contender.startswith(dense) and r.ratio]
    return max(ratios, default=None)


def cell(rows: Sequence[GpuRow] | None) -> str:
    """A work in a few characters."""
    if not rows:
        return ""
    mine, peer = picked(rows), best_peer(rows)
    if mine is None or mine.ratio is None:
        words = {WRONG: "WRONG", FAILED: "FAILED"}
        text = next((words[w] for w in words if mine is not None and mine.status.startswith(w)), "-")
    else:
        text = f"{mine.ratio:.2f}"
    return f"{text}/{peer:.2f}" if peer else text


def table(
    works: Works, op: str, dtype: str, split: Callable[[str], tuple[str, str]]
) -> tuple[list[str], dict[str, dict[str, str]]]:
    """The columns, and each line's cells by column; ``split`` cuts a work's name into line and column."""
    lines: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for (work_op, name, work_dtype), rows in works.items():
        if (work_op, work_dtype) == (op, dtype):
            line, column = split(name)
            lines.setdefault(line, {})[column] = cell(rows)
            columns[column] = None
    ordered = sorted(columns, key=lambda c: (not c.isdecimal(), int(c) if c.isdecimal() else 0))
    return ordered, lines


def linear_name(name: str) -> tuple[str, str]:
    """``16x4096->14336`` is column 16 of line ``4096->14336``; a square is its own."""
    tokens, _, rest = name.partition("x")
    return ("square", tokens) if rest == f"{tokens}->{tokens}" else (rest, tokens)


def conv_name(name: str) -> tuple[str, str]:
    """``3x3 32x256@14->256`` is column 32 of line ``3x3 256@14->256``."""
    kernel, _, rest = name.partition(" ")
    batch, _, layer = rest.partition("x")
    return f"{kernel} {layer}", batch


def linear_lines(works: Works, op: str) -> list[str]:
    text: list[str] = []
    for dtype in ("bf16", "f16", "i8", "f8"):
        columns, lines = table(works, op, dtype, linear_name)
        squares = lines.pop("square", {})
        if squares:
            sizes = "  ".join(f"{size} {squares[size]}" for size in columns if size in squares)
            text.append(f"{op} {dtype} squares: {sizes}")
        layer_columns = [column for column in columns if any(column in line for line in lines.values())]
        if not lines:
            continue
        if dtype == "bf16":
            heads = "".join(f"{column:>11}" for column in layer_columns)
            text.append(f"{op + ' ' + dtype + ' tokens':<24}{heads}")
            for name, cells in lines.items():
                text.append(f"  {name:<22}" + "".join(f"{cells.get(c, ''):>11}" for c in layer_columns))
        else:
            medians = "  ".join(f"{c} tokens {_median(works, op, dtype, c)}" for c in layer_columns)
            text.append(f"{op} {dtype} layers, median: {medians}")
    return text


def _median(works: Works, op: str, dtype: str, tokens: str) -> str:
    chosen = [
        rows
        for (o, name, d), rows in works.items()
        if (o, d) == (op, dtype) and linear_name(name)[1] == tokens and linear_name(name)[0] != "square"
    ]
    ratios = [mine.ratio for rows in chosen if (mine := picked(rows)) and mine.ratio]
    return f"{statistics.median(ratios):.2f}" if ratios else "-"


def conv_lines(works: Works) -> list[str]:
    """Two layers on a line."""
    columns, lines = table(works, "nm24_conv", "f16", conv_name)
    if not lines:
        return []
    cells = [
        f"{name:<21}" + "".join(f"{line.get(column, ''):>7}" for column in columns)
        for name, line in lines.items()
    ]
    head = f"nm24_conv f16, batch {' '.join(columns)}"
    half = (len(cells) + 1) // 2
    pairs = zip(cells[:half], [*cells[half:], ""], strict=False)
    return [head, *(f"  {left}   {right}".rstrip() for left, right in pairs)]


def kept_share(name: str) -> float:
    """``3x3 32x256@14->512, kept 128->256`` has 25 % of the products."""
    layer, _, kept = name.partition(", kept ")
    before, after = ([int(n) for n in re.findall(r"\d+", text)] for text in (layer, kept))
    outputs = int(layer.partition("->")[2].split()[0])
    inputs = before[3] if "@" in layer else before[1]
    return after[0] / inputs * after[1] / outputs


def channel_lines(works: Works, op: str) -> list[str]:
    """A line for each share of the products: how many times faster than dense, and what gather and scatter
    cost against a dense layer of the kept channels: the median, the worst, and what is asked."""
    shares: dict[float, list[tuple[float, float | None]]] = {}
    for (work_op, name, _), rows in works.items():
        mine = picked(rows)
        if work_op != op or mine is None or not mine.ratio or not mine.ms:
            continue
        compact = next((row.ms for row in rows if row.contender.endswith(COMPACT)), None)
        tax = mine.ms / compact - 1 if compact else None
        shares.setdefault(kept_share(name), []).append((mine.ratio, tax))
    lines = []
    for share, found in sorted(shares.items(), reverse=True):
        ratios, taxes = [ratio for ratio, _ in found], [tax for _, tax in found if tax is not None]
        asked = f", asked {CHANNEL_RATIO:.2f}" if share == 0.5 else ""
        text = f"{op} at {share:.0%} of the products: {statistics.median(ratios):.2f}"
        text += f" (from {min(ratios):.2f}, {len(ratios)} layers{asked})"
        if taxes:
            text += f", tax {statistics.median(taxes):.1%} (to {max(taxes):.1%}, asked {CHANNEL_TAX:.0%})"
        lines.append(text)
    return lines


def misses(works: Works) -> list[str]:
    """Where another plan than the rule's was faster, worst first."""
    found = []
    for (op, name, dtype), rows in works.items():
        mine = picked(rows)
        if mine is None or mine.ms is None:
            continue
        others = [row for row in rows if row.contender == OURS and not row.picked and row.ms]
        best = min(others, key=lambda row: row.ms or 0.0, default=None)
        if best is not None and best.ms and mine.ms > MISS * best.ms:
            found.append((mine.ms / best.ms, f"{op} {name} {dtype}: {best.plan}, not {mine.plan}"))
    found.sort(key=lambda miss: miss[0], reverse=True)
    lines = [f"  {gain:.2f}x {text}" for gain, text in found[:SHOWN_MISSES]]
    return [f"other plans were faster at {len(found)} of {len(works)} works:", *lines] if found else []


def faults(rows: Sequence[GpuRow]) -> list[str]:
    """Ours first, then each peer's most common failure."""
    lines = [
        f"  {r.op} {r.work} {r.dtype} {r.plan}: {r.status}"
        for r in rows
        if r.contender == OURS and r.status != OK
    ]
    shown = [*lines[:SHOWN_FAULTS], f"  and {len(lines) - SHOWN_FAULTS} more"]
    text = [f"ours, not ok: {len(lines)}", *(shown if len(lines) > SHOWN_FAULTS else lines)]
    for contender in dict.fromkeys(r.contender for r in rows if r.contender != OURS):
        theirs = [r for r in rows if r.contender == contender]
        bad = [r.status for r in theirs if r.status != OK]
        if bad:
            common = statistics.mode(bad)
            text.append(f"{contender}: {len(bad)} of {len(theirs)} not ok, such as {common}")
    return text


def ceiling_lines(rows: Sequence[Ceiling]) -> list[str]:
    """A line for weights from shared memory and one for those from registers: a tile's shares of the peak,
    without fills and with them in clusters of 1, 2, 4."""
    lines = []
    for form in dict.fromkeys(row.form for row in rows):
        tiles: dict[str, list[str]] = {}
        for row in rows:
            if row.form == form:
                share = "WRONG" if row.wrong else f"{row.peak:.2f}"
                tiles.setdefault(f"{row.features}x{row.tokens}", []).append(share)
        shares = "  ".join(f"{tile} {'/'.join(of)}" for tile, of in tiles.items())
        lines.append(f"wgmma.sp {form}, of the peak: {shares}")
    return lines


def power_lines(rows: Sequence[Power]) -> list[str]:
    """A line: TFLOP/s for a moment, then for seconds with clock and energy per operation."""
    contenders: dict[str, list[str]] = {}
    for row in rows:
        clock = "" if row.sm_mhz is None else f" at {row.sm_mhz} MHz"
        energy = "" if row.pj_per_flop is None else f" {row.pj_per_flop:.2f} pJ"
        contenders.setdefault(row.contender, []).append(f"{row.tflops:.0f}{clock}{energy}")
    text = ", ".join(f"{name} {'/'.join(of)}" for name, of in contenders.items())
    return [f"power: {text}"] if rows else []


def summary(run: Path) -> list[str]:
    """The lines."""
    facts = environment(run)
    rows = read(GpuRow, run / LAYERS)
    works = by_work(rows)
    lines = [
        ", ".join(
            f"{name} {facts.get(name) or 'unknown'}" for name in ("machine", "driver", "commit", "date")
        ),
        ", ".join(f"{name} {facts.get(name) or 'none'}" for name in ("cuda", "torch", "cudnn", "cusparselt")),
    ]
    for stage in read(Stage, run / STAGES):
        lines.append(f"{stage.stage:<12} {stage.status:<8} {stage.seconds:>4} s  {stage.note}")
    counts = read(OpTests, run / TESTS)
    if counts:
        lines.append("tests passed/failed: " + ", ".join(f"{c.op} {c.passed}/{c.failed}" for c in counts))
    lines += ceiling_lines(read(Ceiling, run / CEILINGS)) + power_lines(read(Power, run / POWER))
    for op in BASELINES:
        if op.startswith("channel"):
            lines += channel_lines(works, op)
        else:
            lines += linear_lines(works, op) if op.startswith("nm24_linear") else conv_lines(works)
    lines += misses(works) + (faults(rows) if rows else [])
    return [line[:WIDTH].rstrip() for line in lines[:MOST_LINES]]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints it."""
    options = argparse.ArgumentParser("python -m benchmarks.gpu_summary", description="A run, shortly.")
    options.add_argument("folder", type=Path, help="what benchmarks/gpu.sh wrote")
    print("\n".join(summary(options.parse_args(argv).folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
