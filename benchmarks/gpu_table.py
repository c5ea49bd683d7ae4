"""``python -m benchmarks.gpu_table``: what is known of each CUDA kernel, as Markdown; ``--write`` puts it
into docs/kernels.md, and what the kernels for sm_90a came to into docs/kernels/nm24_linear_sm90.md.

It never measures: it reads the runs that are kept under benchmarks/results. ``--keep FOLDER`` adds one, as
benchmarks/gpu.sh left it.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import gpu_ladder
from benchmarks.gpu_ladder import NEVER
from benchmarks.gpu_machine import DRY_RUN
from benchmarks.gpu_results import (
    CEILINGS,
    ENVIRONMENT,
    LAYERS,
    OK,
    OURS,
    POWER,
    POWER_LOG,
    STAGES,
    TESTS,
    WRONG,
    GpuRow,
    OpTests,
    environment,
    kept_runs,
    read,
)
from benchmarks.output import spliced
from benchmarks.provenance import RESULTS, TREE, folder_name
from sparseops.ops import REGISTRY, dispatch

PAGE = TREE / "docs" / "kernels.md"
MARKERS = "kernels"
LADDER_PAGE = TREE / "docs" / "kernels" / "nm24_linear_sm90.md"
LADDER_MARKERS = "ladder"
TILES = {
    "nm24_linear": dispatch.MATRIX_TILES,
    "nm24_linear_i8": dispatch.BYTE_TILES,
    "nm24_linear_f8": dispatch.F8_TILES,
    "nm24_conv": dispatch.CONV_TILES,
    "channel_conv": ("triton",),
    "channel_linear": ("triton",),
}
CONFORMANCE = TREE / "tests" / "emulation" / "conformance"
RECORDED = "conformance.txt"
STANDS_ON_DOCUMENTS = "stands on documents (cross-checks)"


@dataclass(frozen=True)
class Run:
    """What a kept run says."""

    gpu: str
    commit: str
    rows: list[GpuRow]
    tests: dict[str, OpTests]


def load(folder: Path) -> Run:
    facts = environment(folder)
    tests = {count.op: count for count in read(OpTests, folder / TESTS)}
    return Run(facts["machine"], facts["commit"], read(GpuRow, folder / LAYERS), tests)


def kernels() -> list[tuple[str, str]]:
    """Every CUDA kernel of the registry: its op and its tile, by name."""
    return [
        (op.name, tile)
        for op in sorted(REGISTRY.values(), key=lambda op: op.name)
        if any(device == "cuda" for device, _ in op.impls)
        for tile in TILES.get(op.name, ("",))
    ]


def newest(runs: Sequence[Run]) -> list[Run]:
    """The last run on each GPU."""
    return list({run.gpu: run for run in runs}.values())


def tests_of(run: Run, op: str) -> str:
    count = run.tests.get(op)
    if count is None or not count.passed + count.failed:
        return "none"
    return f"{count.passed} passed" + (f", {count.failed} failed" if count.failed else "")


def ratio_of(run: Run, op: str, tile: str) -> str:
    """Dense over sparse where the rule picks the tile: the median, and the worst and the best."""
    rows = [r for r in run.rows if r.op == op and r.contender == OURS and r.plan.partition("/")[0] == tile]
    wrong = sum(r.status.startswith(WRONG) for r in rows)
    if wrong:
        return f"**wrong at {wrong} of {len(rows)} calls**"
    picked = [r.ratio for r in rows if r.picked and r.status == OK and r.ratio]
    if not picked:
        return "never picked" if any(r.status == OK for r in rows) else "not measured"
    low, high = min(picked), max(picked)
    layers = "1 layer" if len(picked) == 1 else f"{len(picked)} layers"
    return f"{statistics.median(picked):.2f} ({low:.2f} to {high:.2f}, {layers})"


def lines(runs: Sequence[Run]) -> Iterator[str]:
    yield "| op | tile | GPU | commit | tests | times faster than dense |"
    yield "|---|---|---|---|---|---|"
    for op, tile in kernels():
        ran = [
            run
            for run in newest(runs)
            if tests_of(run, op) != "none" or any(r.op == op and r.status == OK for r in run.rows)
        ]
        for run in ran:
            ratio = ratio_of(run, op, tile)
            yield f"| {op} | {tile} | {run.gpu} | `{run.commit}` | {tests_of(run, op)} | {ratio} |"
        if not ran:
            yield f"| {op} | {tile} | {NEVER} | | | |"


def conformance() -> str:
    """Whether the emulated instructions were compared with a GPU's."""
    fixtures = sorted(file.name for file in CONFORMANCE.glob("*") if file.suffix != ".md")
    return f"recorded: {', '.join(fixtures)}" if fixtures else STANDS_ON_DOCUMENTS


def markdown(runs: Sequence[Run]) -> str:
    text = "\n".join(lines(runs))
    return f"{text}\n\nWhat the emulator makes of each instruction: {conformance()}.\n"


def pages() -> Iterator[tuple[Path, str, str]]:
    """What kept runs say: a page, the name of its markers, and what belongs between them."""
    runs = kept_runs()
    yield PAGE, MARKERS, markdown([load(run) for run in runs])
    yield LADDER_PAGE, LADDER_MARKERS, gpu_ladder.markdown([r for r in map(gpu_ladder.load, runs) if r])


def keep(folder: Path, root: Path, fixtures: Path) -> Path:
    """Copies the tables of a run to ``<root>/<gpu>/<date>-<commit>``, what it recorded of the instructions to
    ``<fixtures>/<gpu>.txt``. ValueError when it must not be kept."""
    facts = environment(folder)
    if not facts or facts.get("dry_run") or DRY_RUN in facts["machine"]:
        raise ValueError(f"--keep must name a run on a GPU, got {folder}")
    if facts["commit"] == "unknown":
        raise ValueError(f"--keep must name a run of a known commit, got none in {folder / ENVIRONMENT}")
    date = "".join(character for character in facts["date"] if character.isalnum())
    gpu = folder_name(facts["machine"])
    target = root / gpu / f"{date}-{facts['commit']}"
    target.mkdir(parents=True)
    for name in (ENVIRONMENT, STAGES, TESTS, LAYERS, CEILINGS, POWER, POWER_LOG, "summary.txt"):
        if (folder / name).exists():
            shutil.copy(folder / name, target / name)
    if (folder / RECORDED).exists():
        shutil.copy(folder / RECORDED, fixtures / f"{gpu}.txt")
    return target


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table, or writes it into the page."""
    what = "What is known of each CUDA kernel."
    options = argparse.ArgumentParser("python -m benchmarks.gpu_table", description=what)
    add = options.add_argument
    add("--keep", type=Path, metavar="FOLDER", help="first add this run to those that are kept")
    add("--write", action="store_true", help="put the tables into their pages, between the markers")
    chosen = options.parse_args(argv)
    if chosen.keep:
        try:
            print(keep(chosen.keep, RESULTS, CONFORMANCE), file=sys.stderr)
        except ValueError as error:
            print(f"benchmarks.gpu_table: {error}", file=sys.stderr)
            return 1
    for page, markers, table in pages():
        if chosen.write:
            page.write_text(spliced(page.read_text(), markers, table))
        else:
            print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
