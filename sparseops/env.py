"""The one module that reads the process environment; docs/env.md lists every variable read here."""

import os

CPU_ISAS = ("portable", "avx2", "avx512", "avx512_bf16")
"""The instruction sets the CPU kernels are written for, from the lowest to the highest."""

IMPLS = ("auto", "few8", "few16", "small", "large", "dense")
"""What ``SPARSEOPS_IMPL`` may name: the tiles of the CUDA kernels, the dense expansion, or the rule."""


def cpu_isa() -> str | None:
    """``SPARSEOPS_CPU_ISA``: the instruction set to force on the CPU kernels, ``None`` for the best one.

    Raises:
        ValueError: the value is not one of ``CPU_ISAS``.
    """
    value = os.environ.get("SPARSEOPS_CPU_ISA") or None
    if value is not None and value not in CPU_ISAS:
        raise ValueError(f"SPARSEOPS_CPU_ISA must be one of {', '.join(CPU_ISAS)}, got {value!r}")
    return value


def variables() -> dict[str, str]:
    """Every ``SPARSEOPS_*`` variable that is set, by name, whether this package knows it or not."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("SPARSEOPS_")}


def fast_path() -> bool:
    """``SPARSEOPS_FAST_PATH``: 0 sends every call through torch's dispatcher, 1 (the default) does not.

    Raises:
        ValueError: the value is neither 0 nor 1.
    """
    return _switch("SPARSEOPS_FAST_PATH", "1")


def impl() -> str:
    """``SPARSEOPS_IMPL``: how products on a GPU run, ``auto`` (the default) by rule.

    Raises:
        ValueError: the value is not one of ``IMPLS``.
    """
    value = os.environ.get("SPARSEOPS_IMPL") or "auto"
    if value not in IMPLS:
        raise ValueError(f"SPARSEOPS_IMPL must be one of {', '.join(IMPLS)}, got {value!r}")
    return value


def emulate() -> bool:
    """``SPARSEOPS_EMULATE``: 1 runs the CUDA kernels on the CPU, for tests; 0 is the default.

    Raises:
        ValueError: the value is neither 0 nor 1.
    """
    return _switch("SPARSEOPS_EMULATE", "0")


def _switch(name: str, default: str) -> bool:
    value = os.environ.get(name) or default
    if value not in ("0", "1"):
        raise ValueError(f"{name} must be 0 or 1, got {value!r}")
    return value == "1"
