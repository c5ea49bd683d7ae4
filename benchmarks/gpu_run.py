"""``python -m benchmarks.gpu_run OP``: an op's layers on a GPU, ours beside what torch offers.

Each result is checked before it is timed. Rows are written work by work. A contender that fails is a row
that says how; one that kills the process or hangs is one too: the layers are gone through in a child
process, which is started again behind it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_machine
from benchmarks.gpu_check import Parts, expected_parts, fault, judging, outputs
from benchmarks.gpu_contenders import (
    SPARSE_8_BIT_BYTES,
    SPARSE_BYTES,
    Contender,
    Inputs,
    channels_alone,
    inputs,
    ours,
    peers,
    plain,
    refusal,
)
from benchmarks.gpu_results import BASELINES, FAILED, LAYERS, OK, OURS, SKIPPED, WRONG, GpuRow, append, read
from benchmarks.gpu_shapes import WORKS, GpuWork, sweep_works, tiny_works
from benchmarks.gpu_time import Call, Clock, CpuClock, CudaClock, Sample, floor_ms, measure
from benchmarks.shapes import Pruned

# A child has all modules from the start. The parent must use neither the GPU nor torch's threads, which would
# not outlive a fork.
FORK = multiprocessing.get_context("fork")
DATA, TIMING = "preparing", "timing"  # what is no contender but can fail too
LOST = 70  # exit status of a child whose GPU answers no more
HUNG_SECONDS = 45
MOST_CRASHES = 8
LONGEST_WORK_SECONDS = 5  # until a work has taken longer


@dataclass(frozen=True)
class Crash:
    """A contender that took the process with it."""

    op: str
    work: str
    dtype: str
    contender: str
    plan: str
    how: str

    def hits(self, work: GpuWork, contender: str, plan: str) -> bool:
        return (self.op, self.work, self.dtype, self.contender, self.plan) == (
            work.op,
            work.name,
            work.tag,
            contender,
            plan,
        )


class Lost(Exception):
    """The GPU has not outlived a contender."""


class Journal:
    """What is going on now, in a file, for the parent of a process that dies; and who has died of what."""

    def __init__(self, file: Path, crashes: Sequence[Crash] = ()) -> None:
        self._file, self._crashes = file, crashes

    def at(self, work: GpuWork, contender: str, plan: str = "", how: str = "") -> None:
        now = Crash(work.op, work.name, work.tag, contender, plan, how)
        self._file.write_text(json.dumps(asdict(now)))

    def verdict(self, work: GpuWork, contender: str, plan: str = "") -> str | None:
        """Why a contender must not be tried again."""
        for crash in self._crashes:
            if crash.hits(work, contender, plan):
                return f"{FAILED}: {crash.how}"
        deaths = Counter(crash.contender for crash in self._crashes)
        if deaths[contender] > 1 and contender not in (OURS, DATA, TIMING):
            return f"{SKIPPED}: it took the process with it twice"
        return None


# ---- one work


def in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]


class Bench:
    """Goes through works one by one."""

    def __init__(self, clock: Clock, journal: Journal, dry_run: bool, wide: bool = False) -> None:
        self.clock, self.journal, self.wide = clock, journal, wide
        self.columns = {**gpu_machine.software(), **gpu_machine.machine(dry_run)}
        self.floor = floor_ms(clock)

    def run(self, work: GpuWork) -> list[GpuRow]:
        """The rows of a work: every contender prepared and checked, those that are right timed in turn."""
        nobody = Contender(OURS, lambda: lambda: torch.empty(0), picked=True)
        verdict = self.journal.verdict(work, DATA)
        if verdict is None:
            self.journal.at(work, DATA)
            try:
                data = inputs(work, self.clock.device)
                with judging(poison=False):
                    parts = expected_parts(work, data)
            except Exception as error:
                verdict = self._failed(work, DATA, "", error)
        if verdict is not None:
            return [self._row(work, nobody, verdict)]
        status: dict[Contender, str] = {}
        calls: dict[Contender, Call] = {}
        mine = self._ours(work, data)
        if isinstance(mine, str):
            status[nobody] = mine
        for contender in [*peers(work, data), *([] if isinstance(mine, str) else mine)]:
            status[contender] = self._prepare(work, contender, parts, calls)
        samples = self._measure(work, calls, status)
        mhz = gpu_machine.sm_mhz()
        baseline = next((samples[c].ms for c in samples if c.name == BASELINES[work.op]), None)
        rows = {c: replace(self._row(work, c, status[c]), sm_mhz=mhz) for c in status}
        timed = {c: self._times(work, c, data, samples[c], baseline) for c in samples}
        return [replace(rows[c], **timed.get(c, {})) for c in rows]

    def _ours(self, work: GpuWork, data: Inputs) -> list[Contender] | str:
        """Our contenders, or why there is none."""
        if reason := refusal(work, data):
            return f"{SKIPPED}: {reason}"
        if verdict := self.journal.verdict(work, OURS):
            return verdict
        self.journal.at(work, OURS)
        if isinstance(work.layer, Pruned):
            return channels_alone(work, data, self.clock.device.type != "cpu")
        weight_bytes = SPARSE_8_BIT_BYTES if work.dtype.itemsize == 1 else SPARSE_BYTES
        try:
            return ours(plain(work, data), weight_bytes, self.clock.device.type != "cpu", self.wide)
        except Exception as error:
            return self._failed(work, OURS, "", error)

    def _failed(self, work: GpuWork, contender: str, plan: str, error: Exception) -> str:
        """How it failed. A GPU that has not outlived it ends the process: all that follows would fail."""
        try:
            self.clock.wait()
        except Exception:
            self.journal.at(work, contender, plan, in_one_line(error))
            raise Lost from error
        return f"{FAILED}: {in_one_line(error)}"

    def _prepare(
        self,
        work: GpuWork,
        contender: Contender,
        parts: Parts,
        calls: dict[Contender, Call],
    ) -> str:
        plan = "" if contender.picked else contender.plan
        if verdict := self.journal.verdict(work, contender.name, plan):
            return verdict
        self.journal.at(work, contender.name, plan)
        try:
            call = contender.make()
            if contender.ours:
                with judging(poison=True):
                    y = call()
            else:
                y = call()
            self.clock.wait()
            # sums of fp8 are not kept in all of float32's bits: no bound for single elements holds
            strict = contender.ours and work.dtype is not torch.float8_e4m3fn
            wrong = fault(y, parts, strict) if contender.pruned else None
        except Exception as error:
            return self._failed(work, contender.name, plan, error)
        if wrong:
            return f"{WRONG}: {wrong}"
        calls[contender] = call
        return OK

    def _measure(
        self, work: GpuWork, calls: dict[Contender, Call], status: dict[Contender, str]
    ) -> dict[Contender, Sample]:
        verdict = self.journal.verdict(work, TIMING)
        if verdict is None:
            self.journal.at(work, TIMING)
            try:
                return measure(calls, self.clock)
            except Exception as error:
                verdict = self._failed(work, TIMING, "", error)
        status.update(dict.fromkeys(calls, f"{verdict}, while all were timed"))
        return {}

    def _row(self, work: GpuWork, contender: Contender, status: str) -> GpuRow:
        return GpuRow(
            **self.columns,
            sm_mhz=None,
            op=work.op,
            work=work.name,
            source=work.source,
            dtype=work.tag,
            contender=contender.name,
            plan=contender.plan,
            picked=int(contender.picked),
            status=status,
        )

    def _times(
        self, work: GpuWork, contender: Contender, data: Inputs, sample: Sample, baseline: float | None
    ) -> dict[str, Any]:
        moved = contender.weight_bytes * data.dense.numel() + data.x.nbytes + 2 * outputs(work, data)
        return {
            "rounds": sample.rounds,
            "ms": round(sample.ms, 5),
            "p20": round(sample.p20, 5),
            "p80": round(sample.p80, 5),
            "host_ms": round(sample.host_ms, 5),
            "floor_ms": round(self.floor, 5),
            "ratio": round(baseline / sample.ms, 3) if baseline else None,
            "tflops": round(work.layer.flops / sample.ms / 1e9, 2),
            "gbs": round(moved / sample.ms / 1e6, 1),
        }


# ---- all works


def works_of(op: str, tiny: bool, sweep: bool = False) -> list[GpuWork]:
    if sweep:
        return tiny_works(op)[:1] if tiny else sweep_works()
    return tiny_works(op) if tiny else WORKS[op]()


def child(op: str, folder: Path, until: float, dry_run: bool, sweep: bool, journal: Journal) -> None:
    """Goes through the works that have no row yet, as long as there is time."""
    file = folder / LAYERS
    torch.backends.cudnn.benchmark = True
    bench = Bench(CpuClock() if dry_run else CudaClock(), journal, dry_run, wide=sweep)
    longest = float(LONGEST_WORK_SECONDS)
    done = {row.key for row in read(GpuRow, file)}
    for work in works_of(op, dry_run, sweep):
        if (work.op, work.name, work.tag) in done:
            continue
        start = time.time()
        if start + longest > until:
            print(f"{op}: out of time before {work.name} {work.tag}", flush=True)
            break
        try:
            with torch.no_grad():
                append(file, bench.run(work))
        except Lost as error:
            print(f"{work.name}: {in_one_line(error.__cause__ or error)}", file=sys.stderr, flush=True)
            os._exit(LOST)  # torch's own way out would ask the GPU
        if not dry_run:
            torch.cuda.empty_cache()
        longest = max(longest, time.time() - start)


def watch(process: BaseProcess, marker: Path, until: float) -> str | None:
    """Waits for a child. None when it ended well; else how it died, by its own doing or because it hung."""
    started = time.time()
    while process.is_alive():
        process.join(0.1)
        now = time.time()
        last = max(started, marker.stat().st_mtime if marker.exists() else 0.0)
        if now > until or now - last > HUNG_SECONDS:
            process.kill()
            process.join()
            return "cut" if now > until else f"hung for {HUNG_SECONDS} s"
    return None if process.exitcode == 0 else f"the process died with status {process.exitcode}"


def supervise(op: str, folder: Path, until: float, dry_run: bool, sweep: bool = False) -> list[Crash]:
    """Runs children until one gets to the end."""
    folder.mkdir(parents=True, exist_ok=True)
    crashes = list[Crash]()
    with tempfile.TemporaryDirectory() as scratch:
        marker = Path(scratch, "now")
        while len(crashes) < MOST_CRASHES and time.time() < until:
            marker.unlink(missing_ok=True)
            journal = Journal(marker, tuple(crashes))
            process = FORK.Process(target=child, args=(op, folder, until, dry_run, sweep, journal))
            process.start()
            how = watch(process, marker, until)
            if how is None or how == "cut":
                break
            if not marker.exists():
                print(f"{op}: {how} before its first work", file=sys.stderr)
                break
            found = Crash(**json.loads(marker.read_text()))
            crashes.append(replace(found, how=found.how or how))
            print(f"{op}: {crashes[-1]}", file=sys.stderr, flush=True)
    return crashes


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status is 1 when one of our results was wrong or one of our kernels failed."""
    options = argparse.ArgumentParser("python -m benchmarks.gpu_run", description="Layers on a GPU.")
    add = options.add_argument
    add("op", choices=sorted(BASELINES))
    add("--out", type=Path, required=True, metavar="FOLDER", help=f"append the rows to FOLDER/{LAYERS}")
    add("--until", type=float, metavar="SECONDS", help="stop at this time (since 1970; in 9 minutes)")
    add("--sweep", action="store_true", help="nm24_linear alone: some layers, all tiles, splits and clusters")
    add("--dry-run", action="store_true", help="tiny layers on the CPU, to try the benchmark itself")
    chosen = options.parse_args(argv)
    if chosen.sweep and chosen.op != "nm24_linear":
        options.error(f"--sweep must go with nm24_linear, got {chosen.op}")
    until = chosen.until or time.time() + 540
    supervise(chosen.op, chosen.out, until, chosen.dry_run, chosen.sweep)
    all_works = works_of(chosen.op, chosen.dry_run, chosen.sweep)
    wanted = {(work.op, work.name, work.tag) for work in all_works}
    rows = [row for row in read(GpuRow, chosen.out / LAYERS) if row.key in wanted]
    mine = [row for row in rows if row.contender == OURS]
    bad = [row for row in mine if row.status.startswith((WRONG, FAILED))]
    refused = sum(row.status.startswith(SKIPPED) and row.picked for row in mine)
    theirs = sum(row.contender != OURS and row.status != OK for row in rows)
    for row in bad:
        print(f"{row.work} {row.dtype} {row.plan}: {row.status}")
    print(
        f"{len({row.key for row in rows})} of {len(all_works)} works, {len(bad)} wrong or failed of "
        f"{len(mine)} calls of ours, {refused} works without a kernel, {theirs} calls of peers failed"
    )
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
