"""The one module that reads the process environment; docs/env.md lists every variable read here."""

import os

Capability = tuple[int, int]

CPU_ISAS = ("portable", "avx2", "avx512", "avx512_bf16")
"""The instruction sets the CPU kernels are written for, from the lowest to the highest."""

IMPLS = (
    "auto",
    "few8",
    "few16",
    "small",
    "large",
    "sm90_128x8",
    "sm90_128x16",
    "sm90_128x32",
    "sm90_128x64",
    "sm90_128x128",
    "sm90_128x256",
    "sm90_256x128",
    "sm90_192x192",
    "sm90_rs_128x256",
    "sm90_rs_256x128",
    "triton",
    "dense",
)
"""What ``SPARSEOPS_IMPL`` may name: the tiles of the CUDA kernels, those in Triton, the dense expansion, or
the rule."""

EMULATED: dict[str, Capability | None] = {"0": None, "1": (8, 0), "8.0": (8, 0), "9.0": (9, 0)}
"""What ``SPARSEOPS_EMULATE`` may be, and the compute capability that it stands for."""


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
    value = os.environ.get("SPARSEOPS_FAST_PATH") or "1"
    if value not in ("0", "1"):
        raise ValueError(f"SPARSEOPS_FAST_PATH must be 0 or 1, got {value!r}")
    return value == "1"


def impl() -> str:
    """``SPARSEOPS_IMPL``: how products on a GPU run, ``auto`` (the default) by rule; with ``triton`` every op
    that has a kernel in Triton runs that.

    Raises:
        ValueError: the value is not one of ``IMPLS``.
    """
    value = os.environ.get("SPARSEOPS_IMPL") or "auto"
    if value not in IMPLS:
        raise ValueError(f"SPARSEOPS_IMPL must be one of {', '.join(IMPLS)}, got {value!r}")
    return value


def emulate() -> Capability | None:
    """``SPARSEOPS_EMULATE``: the compute capability of the GPU that the CPU stands for, for tests; ``None``,
    the default, for none. 1 is 8.0.

    Raises:
        ValueError: the value is none of ``EMULATED``.
    """
    value = os.environ.get("SPARSEOPS_EMULATE") or "0"
    if value not in EMULATED:
        raise ValueError(f"SPARSEOPS_EMULATE must be one of {', '.join(EMULATED)}, got {value!r}")
    return EMULATED[value]


def interpret() -> bool:
    """``TRITON_INTERPRET``, which Triton reads when it is first imported: whether its kernels are
    interpreted."""
    return (os.environ.get("TRITON_INTERPRET") or "0").lower() in ("1", "true", "yes", "on", "y")


def c_compiler() -> str | None:
    """``CC``: the C compiler that Triton is to take, None for the one it finds."""
    return os.environ.get("CC") or None


def tell_emulator(capability: Capability) -> None:
    """Let the emulated CUDA runtime, which reads the environment itself, be that of such a GPU."""
    os.environ["EMU_CAPABILITY"] = "{}.{}".format(*capability)
