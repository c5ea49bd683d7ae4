"""``python -m benchmarks.overhead``: what a call costs beside its arithmetic.

Microseconds of processor time of the calling thread, one thread, on a layer so small that nothing but the
call is left: x [1, 8], w [8, 8], float32. Wall time would say the same with more noise.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from benchmarks import isa
from benchmarks.output import console
from benchmarks.provenance import machine
from sparseops import ops
from sparseops.formats import NM24

CALLS, SAMPLES = 2000, 15
AIM_US = 4.0
MODES = {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad, "grad enabled": torch.enable_grad}


def calls() -> dict[str, Callable[[], Tensor]]:
    """The same tiny layer called three ways."""
    torch.manual_seed(0)
    x, packed = torch.randn(1, 8), NM24.from_dense(torch.randn(8, 8), prune="magnitude")
    w, values, meta = packed.to_dense(), packed.values, packed.meta
    dispatched = torch.ops.sparseops.nm24_linear.default
    return {
        "F.linear": lambda: F.linear(x, w),
        "nm24_linear": lambda: ops.nm24_linear(x, values, meta),
        "nm24_linear through the dispatcher": lambda: dispatched(x, values, meta, None, None, "none"),
    }


def microseconds(call: Callable[[], Tensor], count: int = CALLS, samples: int = SAMPLES) -> float:
    """Median processor time per call."""
    for _ in range(count):
        call()
    times = []
    for _ in range(samples):
        start = time.thread_time_ns()
        for _ in range(count):
            call()
        times.append((time.thread_time_ns() - start) / count / 1e3)
    return statistics.median(times)


def measure(count: int = CALLS, samples: int = SAMPLES) -> dict[str, dict[str, float]]:
    """Microseconds per call with one thread, by way of calling and gradient mode."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        result: dict[str, dict[str, float]] = {}
        for name, call in calls().items():
            for mode, context in MODES.items():
                with context():
                    result.setdefault(name, {})[mode] = microseconds(call, count, samples)
        return result
    finally:
        torch.set_num_threads(threads)


def main() -> int:
    """Prints the table."""
    title = f"us per call of a tiny layer: {machine()}, {isa.current()}, torch {torch.__version__}"
    table = Table(title=title, title_justify="left")
    table.add_column("call", no_wrap=True)
    for mode in MODES:
        table.add_column(mode, justify="right")
    for name, times in measure().items():
        table.add_row(name, *(f"{us:.2f}" for us in times.values()))
    out = console()
    out.print(table)
    out.print(f"aim for nm24_linear: {AIM_US} us where F.linear takes 1.8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
