"""The instruction set of the CPU kernels, for benchmarks that compare them."""

from __future__ import annotations

from sparseops import _native, env


def names() -> tuple[str, ...]:
    """Every instruction set the kernels are written for, lowest first."""
    return env.CPU_ISAS


def current() -> str:
    """The one in use."""
    return _native.require("benchmarks").cpu_isa()


def use(name: str) -> None:
    """Switch to ``name``. ValueError when it was not built or the processor lacks it."""
    _native.require("benchmarks").cpu_use_isa(name)


def reaches(name: str) -> bool:
    """Whether the one in use is ``name`` or higher."""
    return names().index(current()) >= names().index(name)
