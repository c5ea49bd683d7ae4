"""The files of a run on a GPU: what they are called, what their rows hold, how they are written and read.

A run is a folder. Every file in it is written as its stage goes on or ends, so that a run that was cut off is
a run with fewer rows.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.provenance import RESULTS

ENVIRONMENT, STAGES, TESTS, LAYERS = "environment.json", "stages.csv", "tests.csv", "layers.csv"
CEILINGS, POWER, POWER_LOG = "ceilings.csv", "power.csv", "power_log.csv"
OK, WRONG, FAILED, SKIPPED = "ok", "wrong", "failed", "not run"
OURS = "sparseops"
BASELINES = {
    "nm24_linear": "cublas",
    "nm24_linear_i8": "cublas int8",
    "nm24_linear_f8": "cublas fp8",
    "nm24_conv": "cudnn",
    "channel_conv": "cudnn",
    "channel_linear": "cublas",
}
COMPACT = ", compact"
"""Behind the baseline's name: the same of a dense layer of the kept channels alone."""


@dataclass(frozen=True)
class GpuRow:
    """One contender at one work. Times are milliseconds per call; those of one work were taken in turn."""

    date: str
    commit: str
    machine: str
    driver: str
    cuda: str
    torch: str
    sparseops: str
    archs: str
    sm_mhz: int | None
    op: str
    work: str
    source: str
    dtype: str
    contender: str
    plan: str  # the tile, how many blocks shared one, and how many made a cluster if several did
    picked: int  # 1: what a plain call does
    status: str  # "ok", or "wrong", "failed", "not run" and why
    rounds: int | None = None
    ms: float | None = None
    p20: float | None = None
    p80: float | None = None
    host_ms: float | None = None  # of Python, per call
    floor_ms: float | None = None  # what an empty call measures
    ratio: float | None = None  # the dense baseline's time over this one
    tflops: float | None = None  # dense-equivalent: the dense layer's operations over the time
    gbs: float | None = None  # the fewest bytes that the call can move, over the time

    @property
    def key(self) -> tuple[str, str, str]:
        """The work."""
        return self.op, self.work, self.dtype


@dataclass(frozen=True)
class Stage:
    """How a stage of the run ended."""

    stage: str
    status: str  # "ok", "failed", "cut", "not run"
    seconds: int
    note: str


@dataclass(frozen=True)
class OpTests:
    """Outcomes of the tests of an op."""

    op: str
    passed: int
    failed: int
    skipped: int


@dataclass(frozen=True)
class Ceiling:
    """How fast wgmma.sp went in a loop (benchmarks/wgmma_ceiling.cu), beside what two models say."""

    form: str  # SS: the weight from shared memory, RS: from registers
    features: int  # of a multiprocessor at a time, as the tile of a kernel
    tokens: int
    consumers: int  # warpgroups
    cluster: int  # 0: nothing was filled; else blocks that shared what was
    clocks: float  # per instruction and multiprocessor: the median of the multiprocessors
    slowest: float
    wrong: int  # threads with wrong sums
    peak: float  # the share of the tensor cores' peak
    if_free: float  # what it should be if only reads take turns at shared memory
    if_shared: float  # and if fills take turns with them


@dataclass(frozen=True)
class Power:
    """Many calls in a row: how fast, at which clock, for how much energy."""

    contender: str
    plan: str
    run: str  # short or sustained
    calls: int
    ms: float  # per call
    tflops: float  # dense-equivalent
    sm_mhz: int | None  # short: measured by a kernel right behind; sustained: the mean of what was logged
    watts: float | None
    joules: float | None  # of all calls
    pj_per_flop: float | None  # of the dense layer
    peak: float | None  # share of the tensor cores' peak at that clock, a 2:4 one for a sparse weight


@dataclass(frozen=True)
class PowerReading:
    """What the driver said during a sustained run."""

    contender: str
    seconds: float
    sm_mhz: int | None
    watts: float | None
    joules: float | None  # of a counter that began some day
    limits: str  # a bit for each reason that holds the clock down, in hexadecimal


Kind = TypeVar("Kind", GpuRow, Stage, OpTests, Ceiling, Power, PowerReading)


def append(file: Path, rows: Iterable[Kind]) -> None:
    """Adds rows to a CSV file, which gets its header with the first of them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="") as stream:
        writer = None
        for row in rows:
            if writer is None:
                writer = csv.DictWriter(stream, [f.name for f in fields(row)], lineterminator="\n")
                if stream.tell() == 0:
                    writer.writeheader()
            writer.writerow(asdict(row))


def read(kind: type[Kind], file: Path) -> list[Kind]:
    """The rows of a CSV file; none where there is no file. A last line that was cut off is left out."""
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    return [_parse(kind, line) for line in lines if None not in line.values()]


def _parse(kind: type[Kind], line: dict[str, str]) -> Kind:
    casts = {"str": str, "int": int, "float": float}
    values: dict[str, Any] = {}
    for field in fields(kind):
        text, type_name = line[field.name], str(field.type)
        cast = casts[type_name.split()[0]]
        values[field.name] = None if text == "" and type_name.endswith("None") else cast(text)
    return kind(**values)


def kept_runs(root: Path = RESULTS) -> list[Path]:
    """The runs kept under ``benchmarks/results``, one folder each under its GPU's, oldest first."""
    return sorted((file.parent for file in root.glob(f"*/*/{ENVIRONMENT}")), key=lambda run: run.name)


def environment(run: Path) -> dict[str, Any]:
    """Where and with what a run was made; empty where that was not written."""
    file = run / ENVIRONMENT
    return json.loads(file.read_text()) if file.exists() else {}
