"""Which file under csrc is compiled how: one compile step per object, instruction sets included."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

from archs import Arch, file_archs
from toolchain import cxx_accepts, say, stop

_AVX2 = "-mavx2 -mfma -mf16c"
_AVX512 = f"{_AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512"

# Instruction sets, poorest first, and the flags of each. Objects are linked in this order too: of an inline
# function that several of them hold the linker keeps the first copy, and that must be one that runs anywhere.
ISA_FLAGS = {
    "portable": "",
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512_bf16": f"{_AVX512} -mavx512bf16",
}


@dataclass(frozen=True)
class Step:
    """One compile step. Paths are relative: `source` to csrc, `object` to the build folder's obj."""

    rule: str  # "cxx" or "nvcc"
    source: str
    object: str
    flags: str = ""


def is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def buildable_isas(compiler: list[str]) -> list[str]:
    """The instruction sets that the compiler can target; one that it does not know is named in the log."""
    if not is_x86():
        return ["portable"]
    known = [isa for isa, flags in ISA_FLAGS.items() if cxx_accepts(compiler, flags)]
    for isa in ISA_FLAGS.keys() - known:
        say(f"{compiler[-1]} does not know {ISA_FLAGS[isa]}: kernels for {isa} are left out")
    return known


def file_isas(source: Path) -> list[str]:
    """The instruction sets on a file's first line, `// isa: portable avx2`; none for a plain file."""
    line = source.read_text().partition("\n")[0]
    found = re.fullmatch(r"//\s*isa:\s*(.*)", line.strip())
    names = found[1].split() if found else []
    for name in names if found else []:
        if name not in ISA_FLAGS:
            stop(f"{source.name} must list instruction sets out of {', '.join(ISA_FLAGS)}, got {name!r}")
    return names


def has_isa_flags(isas: list[str]) -> str:
    """Macros by which plain files know what was built: -DSPARSEOPS_HAS_AVX2 and so on."""
    return " ".join(f"-DSPARSEOPS_HAS_{isa.upper()}" for isa in isas)


def cpu_steps(csrc: Path, isas: list[str]) -> list[Step]:
    """Plain files once, the others once per instruction set, in the order in which they are linked."""
    plain, variants = [], []
    for source in [csrc / "bindings.cpp", *sorted((csrc / "cpu").glob("*.cpp"))]:
        name = source.relative_to(csrc)
        sets = file_isas(source)
        if not sets:
            plain.append(Step("cxx", str(name), f"{name.with_suffix('')}.o", has_isa_flags(isas)))
        for isa in [isa for isa in isas if isa in sets]:
            flags = f"-DSPARSEOPS_ISA={isa} {ISA_FLAGS[isa]}".strip()
            variants.append((isa, Step("cxx", str(name), f"{name.with_suffix('')}.{isa}.o", flags)))
    variants.sort(key=lambda variant: isas.index(variant[0]))
    return plain + [step for _, step in variants]


def cuda_steps(csrc: Path, archs: list[Arch]) -> list[Step]:
    """Every .cu for the architectures it asks for; without CUDA, the file that says so."""
    if not archs:
        return [Step("cxx", "cuda/absent.cpp", "cuda/absent.o")]
    steps = []
    for source in sorted((csrc / "cuda").glob("*.cu")):
        gencode = " ".join(arch.gencode() for arch in file_archs(source, archs))
        steps.append(Step("nvcc", f"cuda/{source.name}", f"cuda/{source.stem}.cu.o", gencode))
    return steps
