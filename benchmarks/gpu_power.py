"""``python -m benchmarks.gpu_power``: the product of 8192 cubed on a GPU for a moment and for seconds: dense,
cuSPARSELt's and ours, with the clock and the power that go with it.

A moment (10 ms at most) is over before the GPU lowers its clock, so it tells what the kernel is worth; after
seconds the board's power sets the clock, so it tells what a user gets who multiplies all day. Run it behind
the layers of nm24_linear: the plan that was best there is ours.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks import gpu_contenders, gpu_machine
from benchmarks.gpu_contenders import Contender, Inputs, inputs, peers, plain
from benchmarks.gpu_meter import Log, Meter, meter
from benchmarks.gpu_results import (
    LAYERS,
    OK,
    OURS,
    POWER,
    POWER_LOG,
    GpuRow,
    Power,
    PowerReading,
    append,
    read,
)
from benchmarks.gpu_run import in_one_line
from benchmarks.gpu_shapes import GpuWork
from benchmarks.gpu_time import Call
from benchmarks.shapes import Linear

SIZE, TINY_SIZE = 8192, 256
RIVALS = ("cublas", "cusparselt")
SPIN_CYCLES = 2_000_000
DENSE_FLOPS = 4096  # of a multiprocessor and clock, in 16 bits; twice that with a 2:4 weight


@dataclass(frozen=True)
class Lengths:
    """Of the parts, in seconds."""

    moment: float = 0.01
    sustained: float = 2.5
    settled: float = 0.5  # what is left out at the beginning of a sustained run
    rest: float = 0.3  # before a moment; three times that before a sustained run
    moments: int = 3


DRY = Lengths(0.001, 0.05, 0.01, 0.0, 2)


class Marks(Protocol):
    """Moments in what the GPU does."""

    def delay(self) -> None:
        """Keeps the GPU waiting, so that what follows is in its queue before it begins."""

    def mark(self) -> Any:
        """A moment that comes when all before it is done."""

    def wait(self, mark: Any) -> None:
        """Returns when it has come."""

    def ms(self, start: Any, end: Any) -> float:
        """Between two that have come."""

    def mhz(self) -> int | None:
        """The clock of the multiprocessors right behind all that was started."""


class CudaMarks:
    """Events, and a kernel that waits for a number of clocks."""

    def delay(self) -> None:
        torch.cuda._sleep(SPIN_CYCLES)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def ms(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end)

    def mhz(self) -> int | None:
        start = self.mark()
        torch.cuda._sleep(SPIN_CYCLES)
        end = self.mark()
        self.wait(end)
        return round(SPIN_CYCLES / self.ms(start, end) / 1e3)


class CpuMarks:
    """Stands in for a GPU, to try this module itself."""

    def delay(self) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def wait(self, mark: float) -> None:
        pass

    def ms(self, start: float, end: float) -> float:
        return max((end - start) * 1e3, 1e-6)

    def mhz(self) -> int | None:
        return None


def burst(call: Call, count: int, marks: Marks) -> tuple[float, int | None]:
    """Milliseconds per call, and the clock right behind them."""
    marks.delay()
    start = marks.mark()
    for _ in range(count):
        call()
    end = marks.mark()
    mhz = marks.mhz()
    marks.wait(end)
    return marks.ms(start, end) / count, mhz


def stretch(call: Call, ms: float, seconds: float, marks: Marks) -> tuple[int, list[tuple[float, float]]]:
    """Calls for so long, the GPU always busy: how many there are in a part, when each part ended, and what a
    call took in it, in milliseconds."""
    count = max(1, round(40 / ms))
    ends = [marks.mark()]
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        for _ in range(count):
            call()
        ends.append(marks.mark())
        if len(ends) > 3:
            marks.wait(ends[-3])  # so that the queue does not run ahead
    marks.wait(ends[-1])
    parts = zip(ends, ends[1:], strict=False)
    return count, [(marks.ms(ends[0], end), marks.ms(start, end) / count) for start, end in parts]


def mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


@dataclass(frozen=True)
class Bench:
    """Measures one contender after the other at one work."""

    work: GpuWork
    marks: Marks
    source: Meter
    lengths: Lengths
    multiprocessors: int

    def moment(self, contender: Contender, call: Call) -> Power:
        """For a moment, several times, rested; the median counts."""
        burst(call, 2, self.marks)
        ms, _ = burst(call, 2, self.marks)
        count = max(1, int(self.lengths.moment * 1e3 / ms))
        found = []
        for _ in range(self.lengths.moments):
            time.sleep(self.lengths.rest)
            found.append(burst(call, count, self.marks))
        ms, mhz = sorted(found, key=lambda one: one[0])[len(found) // 2]
        return self._row(contender, "short", count, ms, mhz, None, None)

    def sustained(self, contender: Contender, call: Call, ms: float) -> tuple[Power, list[PowerReading]]:
        """For seconds, with what the driver says meanwhile."""
        time.sleep(3 * self.lengths.rest)
        with Log(contender.name, self.source) as log:
            count, parts = stretch(call, ms, self.lengths.sustained, self.marks)
        settled = [ms for end, ms in parts if end > self.lengths.settled * 1e3] or [parts[-1][1]]
        ours = [r for r in log.readings[1:-1] if r.seconds > self.lengths.settled]
        first, last = log.readings[0].joules, log.readings[-1].joules
        joules = None if first is None or last is None else last - first
        mhz, watts = mean([r.sm_mhz for r in ours]), mean([r.watts for r in ours])
        clock = None if mhz is None else round(mhz)
        row = self._row(
            contender, "sustained", count * len(parts), statistics.fmean(settled), clock, watts, joules
        )
        return row, log.readings

    def _row(
        self,
        contender: Contender,
        run: str,
        calls: int,
        ms: float,
        mhz: int | None,
        watts: float | None,
        joules: float | None,
    ) -> Power:
        flops = self.work.layer.flops
        most = DENSE_FLOPS if contender.name == RIVALS[0] else 2 * DENSE_FLOPS
        peak = flops / ms * 1e3 / (self.multiprocessors * most * mhz * 1e6) if mhz else None
        return Power(
            contender=contender.name,
            plan=contender.plan,
            run=run,
            calls=calls,
            ms=round(ms, 5),
            tflops=round(flops / ms / 1e9, 1),
            sm_mhz=mhz,
            watts=None if watts is None else round(watts, 1),
            joules=None if joules is None else round(joules, 1),
            pj_per_flop=None if joules is None else round(joules / calls / flops * 1e12, 3),
            peak=None if peak is None else round(peak, 3),
        )


# ---- who is measured


def best_plan(rows: Sequence[GpuRow], work: GpuWork) -> str:
    """The plan of ours that was fastest at a work, "" if none was measured."""
    done = [
        row
        for row in rows
        if row.key == (work.op, work.name, work.tag) and row.contender == OURS and row.status == OK and row.ms
    ]
    return min(done, key=lambda row: row.ms or 0.0).plan if done else ""


def contenders(work: GpuWork, data: Inputs, plan: str, on_gpu: bool) -> list[Contender]:
    """The dense one, cuSPARSELt, and ours as the best plan has it or else as a plain call does."""
    rivals = [contender for contender in peers(work, data) if contender.name in RIVALS]
    mine = gpu_contenders.ours(plain(work, data), gpu_contenders.SPARSE_BYTES, on_gpu, wide=True)
    return [*rivals, next((contender for contender in mine if contender.plan == plan), mine[0])]


def measure(bench: Bench, chosen: Sequence[Contender], folder: Path, until: float) -> int:
    """Writes a contender's rows when it is done; how many were."""
    done = 0
    for contender in chosen:
        need = bench.lengths.sustained + 4 * bench.lengths.rest + 2
        if time.time() + need > until:
            print(f"out of time before {contender.name}")
            break
        try:
            call = contender.make()
            short = bench.moment(contender, call)
            long, readings = bench.sustained(contender, call, short.ms)
        except Exception as error:
            print(f"{contender.name} {contender.plan}: {in_one_line(error)}")
            continue
        append(folder / POWER, [short, long])
        append(folder / POWER_LOG, readings)
        done += 1
        for row in (short, long):
            print(
                f"{row.contender} {row.plan} {row.run}: {row.tflops} TFLOP/s at {row.sm_mhz} MHz, "
                f"{row.watts} W, {row.pj_per_flop} pJ per operation"
            )
    return done


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status is 1 when ours or the dense one could not be measured."""
    what = "A large product for a moment and for seconds, with clock and power."
    options = argparse.ArgumentParser("python -m benchmarks.gpu_power", description=what)
    add = options.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help=f"write FOLDER/{POWER} and {POWER_LOG}")
    add("--until", type=float, metavar="SECONDS", help="stop at this time (since 1970; in a minute)")
    add("--dry-run", action="store_true", help="a tiny product on the CPU, to try the benchmark itself")
    chosen = options.parse_args(argv)
    until = chosen.until or time.time() + 60
    size = TINY_SIZE if chosen.dry_run else SIZE
    work = GpuWork(Linear(size, size, size), "square", torch.bfloat16)
    for name in (POWER, POWER_LOG):
        (chosen.out / name).unlink(missing_ok=True)
    if chosen.dry_run:
        marks: Marks = CpuMarks()
        device, multiprocessors, lengths = torch.device("cpu"), 1, DRY
    else:
        marks, device, lengths = CudaMarks(), torch.device("cuda", 0), Lengths()
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    bench = Bench(work, marks, meter(chosen.dry_run), lengths, multiprocessors)
    with torch.no_grad():
        data = inputs(work, device)
        plan = best_plan(read(GpuRow, chosen.out / LAYERS), work)
        mine = contenders(work, data, plan, not chosen.dry_run)
        order = [mine[0], mine[-1], *mine[1:-1]]  # cuSPARSELt last: the others are needed
        measure(bench, order, chosen.out, until)
    rows = read(Power, chosen.out / POWER)
    by = {(row.contender, row.run): row for row in rows}
    print(
        f"{gpu_machine.machine(chosen.dry_run)['machine']}, TFLOP/s for a moment and for seconds: "
        + ", ".join(
            f"{name} {by[name, 'short'].tflops:.0f} and {by[name, 'sustained'].tflops:.0f}"
            for name in dict.fromkeys(row.contender for row in rows)
        )
    )
    return 0 if {RIVALS[0], OURS} <= {row.contender for row in rows} else 1


if __name__ == "__main__":
    sys.exit(main())
