"""GPU architectures: reads TORCH_CUDA_ARCH_LIST and a .cu file's own list, writes nvcc's -gencode flags."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from toolchain import ARCHS, ARCHS_HELP, CUDA, stop, variable

# PTX of 8.0 is what every later GPU can translate for itself, so that those without machine code of their own
# (10.3, 11.0, what comes after) run it; PTX of 9.0a or 10.0a would serve those chips alone.
DEFAULT_ARCHS = "8.0+PTX;9.0a;10.0a;12.0"
OLDEST = 80  # bf16 arithmetic and mma.sp begin there

# torch's names for GPU generations, as the architectures whose kernels this package has
GENERATIONS = {
    "volta": "7.0",
    "turing": "7.5",
    "ampere": "8.0;8.6",
    "ada": "8.9",
    "hopper": "9.0a",
    "blackwell": "10.0a;12.0",
}


@dataclass(frozen=True)
class Arch:
    """One architecture: "80", "90a"; `ptx` asks for PTX beside the machine code."""

    name: str
    ptx: bool = False

    @property
    def number(self) -> int:
        return int(self.name.rstrip("af"))

    def __str__(self) -> str:
        return self.name + ("+PTX" if self.ptx else "")

    def gencode(self) -> str:
        """nvcc's flags for this architecture."""
        flags = f"-gencode arch=compute_{self.name},code=sm_{self.name}"
        return flags + (f" -gencode arch=compute_{self.name},code=compute_{self.name}" if self.ptx else "")


def parse_arch(text: str) -> Arch:
    """Reads "8.0", "80", "sm_80", "9.0a" or "120+PTX"; anything else stops the build."""
    found = re.fullmatch(r"(?:sm_)?(?:(\d{1,2})\.(\d)|(\d{2,3}))([af]?)(\+ptx)?", text.lower())
    if not found:
        stop(f"{ARCHS_HELP} must list architectures such as 8.0;9.0a;12.0+PTX, got {text!r}")
    major, minor, digits, suffix, ptx = found.groups()
    return Arch((digits or major + minor) + suffix, ptx=bool(ptx))


def parse_archs(text: str) -> tuple[list[Arch], list[Arch]]:
    """Reads a whole list, separated by semicolons, commas or spaces.

    Returns the architectures to build, in the order given and each once, and those left out because they are
    older than anything sparseops has kernels for (torch's own builds list them, so they are no mistake).
    """
    wanted: dict[str, Arch] = {}
    for item in re.split(r"[;,\s]+", text.strip()):
        generation, plus, ptx = item.lower().partition("+")
        for name in GENERATIONS.get(generation, generation).split(";") if item else []:
            arch = parse_arch(name + plus + ptx)
            known = wanted.get(arch.name, arch)
            wanted[arch.name] = Arch(arch.name, ptx=arch.ptx or known.ptx)
    archs = [arch for arch in wanted.values() if arch.number >= OLDEST]
    left_out = [arch for arch in wanted.values() if arch.number < OLDEST]
    if not archs:
        stop(f"{ARCHS_HELP} must hold one of at least 8.0, got {text!r} ({CUDA}=0 builds without CUDA)")
    return archs, left_out


def check_list() -> None:
    """Stops when TORCH_CUDA_ARCH_LIST cannot be read."""
    parse_archs(variable(ARCHS, DEFAULT_ARCHS))


def check_known(archs: list[Arch], known: list[int], version: str) -> None:
    """Stops when nvcc, which lists the numbers `known`, cannot build one of `archs`."""
    for arch in archs:
        if arch.number not in known:
            numbers = " ".join(map(str, known))
            stop(f"{ARCHS_HELP} must name what nvcc {version} can build ({numbers}), got {arch}")


def file_archs(source: Path, wanted: list[Arch]) -> list[Arch]:
    """The wanted architectures that a .cu file is for.

    Its first line says so: `// archs: all`, `// archs: 80+` (that and later) or names, `// archs: 90a 100a`.
    A file for which none is wanted is built for the first of them, since its host code must link.
    """
    line = source.read_text().partition("\n")[0]
    found = re.fullmatch(r"//\s*archs:\s*(\S.*)", line.strip())
    if not found:
        stop(f"{source.name} must begin with a line such as `// archs: all`, got {line!r}")
    items = found[1].split()
    for item in items:
        if item != "all" and not re.fullmatch(r"\d{2,3}([af]?|\+)", item):
            stop(f"{source.name} must list archs such as all, 80+ or 90a, got {item!r}")
    return [arch for arch in wanted if any(_matches(arch, item) for item in items)] or wanted[:1]


def _matches(arch: Arch, item: str) -> bool:
    if item.endswith("+"):
        return arch.number >= int(item[:-1])
    return item in ("all", arch.name)
