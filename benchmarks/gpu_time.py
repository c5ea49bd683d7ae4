"""Times on a GPU: events, the cache emptied before every sample, contenders in turn.

A sample is one call. Before it a large buffer is overwritten, so that weights come from memory as they do
in a model, and the GPU is kept waiting, so that the call is in its queue before it gets there: what is
timed is the GPU's work and not Python's. How long Python takes is measured apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from benchmarks.compare import times

Key = TypeVar("Key")
Call = Callable[[], Tensor]

WARM_UPS = 3
FEWEST, MOST = 7, 31  # samples of a contender
BUDGET_MS = 400.0  # of a work's samples
CYCLES_PER_MS = 2_000_000  # about: GPUs run at 1 to 2 GHz, and waiting too long does no harm
SMALLEST_FLUSH = 256 << 20
LONGEST_DELAY_MS = 2.0


@dataclass(frozen=True)
class Sample:
    """Milliseconds of the GPU per call, as quantiles, and of Python to start it."""

    ms: float
    p20: float
    p80: float
    host_ms: float
    rounds: int


class Clock(Protocol):
    """Something that times calls."""

    device: torch.device

    def wait(self) -> None:
        """Returns when all that was started is done."""

    def sample(self, call: Call, delay_ms: float) -> Callable[[], float]:
        """Starts a call; the answer gives its milliseconds once ``wait`` has returned."""


class CudaClock:
    """The first GPU."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(max(4 * cache, SMALLEST_FLUSH), dtype=torch.uint8, device=self.device)

    def wait(self) -> None:
        torch.cuda.synchronize()

    def sample(self, call: Call, delay_ms: float) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.fill_(1)
        torch.cuda._sleep(int(delay_ms * CYCLES_PER_MS))
        start.record()
        call()
        end.record()
        return lambda: start.elapsed_time(end)


class CpuClock:
    """Stands in for a GPU, to try the benchmarks themselves."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def wait(self) -> None:
        pass

    def sample(self, call: Call, delay_ms: float) -> Callable[[], float]:
        start = time.perf_counter()
        call()
        milliseconds = (time.perf_counter() - start) * 1e3
        return lambda: milliseconds


def floor_ms(clock: Clock) -> float:
    """What a call that does nothing measures."""
    nothing = torch.empty(0)
    samples = [clock.sample(lambda: nothing, 0.1) for _ in range(FEWEST)]
    clock.wait()
    return times("", [sample() for sample in samples]).p50


def _host_ms(call: Call, clock: Clock) -> float:
    clock.wait()
    start = time.perf_counter()
    call()
    milliseconds = (time.perf_counter() - start) * 1e3
    clock.wait()
    return milliseconds


def measure(calls: Mapping[Key, Call], clock: Clock) -> dict[Key, Sample]:
    """Times the contenders in turn, backwards in every other round: what came before is another one then."""
    host, round_ms = {}, 0.0
    for key, call in calls.items():
        for _ in range(WARM_UPS):
            call()
        host[key] = min(_host_ms(call, clock) for _ in range(WARM_UPS))
        first = clock.sample(call, 0.1)
        clock.wait()
        round_ms += first()
    rounds = max(FEWEST, min(MOST, int(BUDGET_MS / max(round_ms, 1e-6))))
    delay = min(3 * max(host.values(), default=0.0) + 0.05, LONGEST_DELAY_MS)
    found: dict[Key, list[float]] = {key: [] for key in calls}
    for number in range(rounds):
        turn = list(calls) if number % 2 == 0 else list(calls)[::-1]
        samples = {key: clock.sample(calls[key], delay) for key in turn}
        clock.wait()
        for key, sample in samples.items():
            found[key].append(sample())
    quantiles = {key: times("", sample) for key, sample in found.items()}
    return {key: Sample(q.p50, q.p20, q.p80, host[key], rounds) for key, q in quantiles.items()}
