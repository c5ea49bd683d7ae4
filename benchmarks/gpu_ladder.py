"""What became of the kernels for sm_90a: the steps of docs/kernels/nm24_linear_sm90.md with their predictions
and what kept runs say of them. ``python -m benchmarks.gpu_table`` writes it there.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_results import (
    CEILINGS,
    LAYERS,
    OK,
    OURS,
    POWER,
    WRONG,
    Ceiling,
    GpuRow,
    Power,
    environment,
    read,
)

CAPABILITY = "9.0"
NEVER = "never run on hardware"
SQUARE = "8192x8192->8192"
SMALL_TOKENS, SMALL_OUTPUTS = (64, 256), (3584, 4608)


@dataclass(frozen=True)
class Run:
    """What a kept run says."""

    gpu: str
    commit: str
    rows: list[GpuRow]
    ceilings: list[Ceiling]
    power: list[Power]


def load(folder: Path) -> Run | None:
    """A run on a GPU that has these kernels, None for others."""
    facts = environment(folder)
    if facts.get("capability") != CAPABILITY:
        return None
    return Run(
        facts["machine"],
        facts["commit"],
        read(GpuRow, folder / LAYERS),
        read(Ceiling, folder / CEILINGS),
        read(Power, folder / POWER),
    )


# ---- outcomes


def split_plan(plan: str) -> tuple[str, int]:
    """A plan's tile and cluster."""
    tile, *numbers = plan.split("/")
    return tile, int(numbers[1]) if len(numbers) > 1 else 1


def at_square(*tiles: str, cluster: int | None = None) -> Callable[[Run], str]:
    """The best of some tiles at 8192 cubed in bf16."""

    def outcome(run: Run) -> str:
        rows = [
            row
            for row in run.rows
            if (row.op, row.work, row.dtype, row.contender) == ("nm24_linear", SQUARE, "bf16", OURS)
            and split_plan(row.plan)[0] in tiles
            and cluster in (None, split_plan(row.plan)[1])
        ]
        if wrong := sum(row.status.startswith(WRONG) for row in rows):
            return f"**wrong in {wrong} of {len(rows)} plans**"
        best = min((row for row in rows if row.ms), key=lambda row: row.ms or 0.0, default=None)
        return f"{best.tflops:.0f}, {best.ratio:.2f}x (`{best.plan}`)" if best else "not measured"

    return outcome


def picked_ratio(op: str, wanted: Callable[[str], bool]) -> Callable[[Run], str]:
    """The times faster than the dense baseline that plain calls are at some works: median, worst and best."""

    def outcome(run: Run) -> str:
        rows = [
            row
            for row in run.rows
            if row.op == op and row.contender == OURS and row.picked and wanted(row.work)
        ]
        ratios = [row.ratio for row in rows if row.status == OK and row.ratio]
        if not ratios:
            return "not measured"
        low, high = min(ratios), max(ratios)
        return f"{statistics.median(ratios):.2f}x ({low:.2f} to {high:.2f}, {len(ratios)} layers)"

    return outcome


def is_small(work: str) -> bool:
    tokens, _, layer = work.partition("x")
    _, _, outputs = layer.partition("->")
    low, high = SMALL_OUTPUTS
    return int(tokens) in SMALL_TOKENS and low <= int(outputs) <= high


def is_wide_3x3(work: str) -> bool:
    """A 3x3 convolution of 256 channels and more, such as ``3x3 32x256@14->256``."""
    kernel, _, rest = work.partition(" ")
    return kernel == "3x3" and int(rest.partition("x")[2].partition("@")[0]) >= 256


@dataclass(frozen=True)
class Step:
    """A step of the ladder. TFLOP/s are dense-equivalent, of an H100 SXM at 1830 MHz."""

    what: str
    prediction: str
    outcome: Callable[[Run], str]


SS_TILES = ("sm90_128x64", "sm90_128x128", "sm90_128x256", "sm90_256x128", "sm90_192x192")
RS_TILES = ("sm90_rs_128x256", "sm90_rs_256x128")
LADDER = (
    Step("`mma.sp`, the kernel of sm_80", "0.62x, as its like", at_square("small", "large")),
    Step("`wgmma.sp`, 128x128", "at most 960 to 1540", at_square("sm90_128x128")),
    Step("128x256", "800 to 900; at most 1110 to 1740", at_square("sm90_128x256", cluster=1)),
    Step("128x256, clusters of two", "900 to 950", at_square("sm90_128x256", cluster=2)),
    Step("256x128", "at most 1090 to 1540", at_square("sm90_256x128")),
    Step("192x192", "1000 to 1100; at most 1160 to 1670", at_square("sm90_192x192")),
    Step("128x256, weight in registers", "at most 1210 to 1330", at_square("sm90_rs_128x256")),
    Step("256x128, weight in registers", "1100 to 1250; at most 1290 to 1580", at_square("sm90_rs_256x128")),
    Step("the best of all", "1.25x, then 1.4x; cuSPARSELt: 1.20x to 1.22x", at_square(*SS_TILES, *RS_TILES)),
    Step(
        "64 and 256 tokens, 3584 to 4608 outputs",
        "more than 1x; cuSPARSELt: 0.54x to 1.0x",
        picked_ratio("nm24_linear", is_small),
    ),
    Step("3x3 convolutions, 256 channels and more", "1.3x", picked_ratio("nm24_conv", is_wide_3x3)),
)


# ---- tables


def ladder(runs: Sequence[Run]) -> Iterator[str]:
    heads = [f"{run.gpu}, `{run.commit}`" for run in runs] or ["outcome"]
    yield "| step | prediction | " + " | ".join(heads) + " |"
    yield "|---|---|" + "---|" * len(heads)
    for step in LADDER:
        cells = [step.outcome(run) for run in runs] or [NEVER]
        yield f"| {step.what} | {step.prediction} | " + " | ".join(cells) + " |"


def ceilings(run: Run) -> Iterator[str]:
    """What a loop of nothing but products takes."""
    yield f"Nothing but products in a loop on {run.gpu}: the share of the peak beside those of two models."
    yield ""
    yield "| operands | tile | warpgroups | fills | clocks | share | if fills are free | if not |"
    yield "|---|---|---:|---|---:|---:|---:|---:|"
    for row in run.ceilings:
        fills = {0: "none", 1: "each block its own"}.get(row.cluster, f"clusters of {row.cluster}")
        share = "**wrong sums**" if row.wrong else f"{row.peak:.3f}"
        yield (
            f"| {row.form} | {row.features}x{row.tokens} | {row.consumers} | {fills} | {row.clocks:.1f} | "
            f"{share} | {row.if_free:.3f} | {row.if_shared:.3f} |"
        )


def power(run: Run) -> Iterator[str]:
    """What a moment and seconds of 8192 cubed take."""
    yield f"8192 cubed in bf16 on {run.gpu}, for 10 ms and for seconds."
    yield ""
    yield "| contender | plan | run | TFLOP/s | MHz | share of its peak then | W | pJ per operation |"
    yield "|---|---|---|---:|---:|---:|---:|---:|"

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    for row in run.power:
        yield (
            f"| {row.contender} | {row.plan} | {row.run} | {row.tflops:.0f} | {cell(row.sm_mhz, 'd')} | "
            f"{cell(row.peak, '.2f')} | {cell(row.watts, '.0f')} | {cell(row.pj_per_flop, '.2f')} |"
        )


def layers(run: Run) -> Iterator[str]:
    """Dense over sparse for every linear layer, the best plan of ours and the best of cuSPARSELt."""
    of_op = [row for row in run.rows if (row.op, row.dtype) == ("nm24_linear", "bf16")]
    yield f"Times faster than cuBLAS in bf16 on {run.gpu}: a plain call, our best plan, cuSPARSELt's best."
    yield ""
    yield "| layer | call | best plan | cuSPARSELt | plan |"
    yield "|---|---:|---:|---:|---|"
    for work in dict.fromkeys(row.work for row in of_op):
        rows = [row for row in of_op if row.work == work]
        mine = [row for row in rows if row.contender == OURS and row.ratio]
        theirs = [row.ratio for row in rows if row.contender.startswith("cusparselt") and row.ratio]
        if not mine:
            continue
        best = max(mine, key=lambda row: row.ratio or 0.0)
        call = next((f"{row.ratio:.2f}" for row in mine if row.picked), "")
        peer = f"{max(theirs):.2f}" if theirs else ""
        yield f"| {work} | {call} | {best.ratio:.2f} | {peer} | `{best.plan}` |"


def markdown(runs: Sequence[Run]) -> str:
    """All of it, from the last run on each GPU."""
    newest = list({run.gpu: run for run in runs}.values())
    blocks = ["\n".join(ladder(newest))]
    for run in newest:
        tables = ((run.ceilings, ceilings), (run.power, power), (run.rows, layers))
        blocks += ["\n".join(table(run)) for rows, table in tables if rows]
    return "\n\n".join(blocks) + "\n"
