"""Clock and power of the first GPU, as the driver tells them while something runs.

The driver's library is asked directly (NVML, through ctypes: nothing has to be installed), nvidia-smi where
it cannot be. What neither tells is None.
"""

from __future__ import annotations

import ctypes
import threading
import time
from ctypes import byref, c_uint, c_ulonglong, c_void_p
from typing import Any, Protocol

from benchmarks import gpu_machine
from benchmarks.gpu_results import PowerReading

LIBRARY = "libnvidia-ml.so.1"
SM_CLOCK = 1  # NVML_CLOCK_SM
PERIOD_SECONDS = 0.02


class Meter(Protocol):
    """Something that can be read."""

    def read(self) -> tuple[int | None, float | None, float | None, str]:
        """The clock of the multiprocessors in MHz, watts, joules since some day, and what holds the clock
        down."""


class Nvml:
    """The driver's library. OSError or RuntimeError when there is none or it knows no GPU."""

    def __init__(self, library: str = LIBRARY) -> None:
        self._library = ctypes.CDLL(library)
        self._gpu = c_void_p()
        for status in (
            self._library.nvmlInit_v2(),
            self._library.nvmlDeviceGetHandleByIndex_v2(c_uint(0), byref(self._gpu)),
        ):
            if status:
                raise RuntimeError(f"NVML answers with status {status}")

    def _ask(self, name: str, value: Any, *arguments: Any) -> int | None:
        function = getattr(self._library, name, None)
        if function is None or function(self._gpu, *arguments, byref(value)):
            return None
        return int(value.value)

    def read(self) -> tuple[int | None, float | None, float | None, str]:
        mhz = self._ask("nvmlDeviceGetClockInfo", c_uint(), c_uint(SM_CLOCK))
        milliwatts = self._ask("nvmlDeviceGetPowerUsage", c_uint())
        millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption", c_ulonglong())
        limits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons", c_ulonglong())
        return (
            mhz,
            None if milliwatts is None else milliwatts / 1e3,
            None if millijoules is None else millijoules / 1e3,
            "" if limits is None else f"{limits:#x}",
        )


class Smi:
    """nvidia-smi, several times a second at best."""

    def read(self) -> tuple[int | None, float | None, float | None, str]:
        mhz, watts, limits = gpu_machine.smi("clocks.sm", "power.draw", "clocks_throttle_reasons.active")
        return int(mhz) if mhz.isdecimal() else None, _number(watts), None, limits


class Silent:
    """Where there is no GPU."""

    def read(self) -> tuple[int | None, float | None, float | None, str]:
        return None, None, None, ""


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def meter(dry_run: bool) -> Meter:
    """The best there is."""
    if dry_run:
        return Silent()
    try:
        return Nvml()
    except (OSError, RuntimeError, AttributeError):
        return Smi()


class Log(threading.Thread):
    """Reads a meter as long as the block runs, beside it."""

    def __init__(self, contender: str, source: Meter) -> None:
        super().__init__(daemon=True)
        self._contender, self._source, self._over = contender, source, threading.Event()
        self._start = time.perf_counter()
        self.readings: list[PowerReading] = []

    def _read(self) -> None:
        reading = self._source.read()
        seconds = round(time.perf_counter() - self._start, 4)
        self.readings.append(PowerReading(self._contender, seconds, *reading))

    def run(self) -> None:
        while not self._over.wait(PERIOD_SECONDS):
            self._read()

    def __enter__(self) -> Log:
        self._start = time.perf_counter()
        self._read()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()
        self._read()
