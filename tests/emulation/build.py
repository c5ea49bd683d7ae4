"""Builds the emulator and the tests of the CUDA kernels on it: g++ alone, no GPU and no nvcc.

    python tests/emulation/build.py [plain] [asan] [race] [module] [test ...]

`plain`, `asan` and `race` are the three builds of each <test>_test.cpp (all three if none is named, all tests
if none is named); they lie in build/emulation/<build>/. `module` is sparseops._C_emulated, the module with
its CUDA kernels run by the emulator. test_support.h tells how to write and run a test.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

EMULATION = Path(__file__).resolve().parent
TREE = EMULATION.parent.parent
CSRC = TREE / "csrc"
FOLDER = TREE / "build" / "emulation"
sys.path.insert(0, str(TREE / "build_backend"))

import toolchain  # noqa: E402
from sources import cpu_steps  # noqa: E402

MODULE = "_C_emulated"
RACE_ONLY = ("happens_before", "memory_check", "memory_hooks", "traffic")
NOT_IN_MODULE = ("test_support",)

# -fno-strict-aliasing: kernels view bytes as they please, as nvcc lets them. No sibling calls, so that a
# return address names its caller. DWARF 4: binutils' addr2line mistakes files in g++'s DWARF 5.
COMMON = (
    "-std=c++20 -g1 -gdwarf-4 -fPIC -fno-strict-aliasing -fno-optimize-sibling-calls "
    "-Wall -Wextra -Wno-unknown-pragmas -Wno-psabi"
)
ADDRESS = "-fsanitize=address"
SANITIZE = f"{ADDRESS} -fsanitize=undefined -fno-sanitize-recover=undefined"
KNOWN = "-DEMU_SHARED_VARIABLES_KNOWN"


@dataclass(frozen=True)
class Build:
    """How one of the builds compiles: the emulator's own files, and the kernels with their tests."""

    emulator: str
    kernels: str
    link: str = "-pie"


BUILDS = {
    "plain": Build(f"-O1 {KNOWN}", f"-O1 {KNOWN}"),
    "asan": Build(f"-O1 {ADDRESS}", f"-O1 {SANITIZE}", f"-pie {SANITIZE}"),
    # The race check stands in for the ThreadSanitizer's library, so the link must not ask for that. Without
    # -fno-tree-sra a uint4 would be counted as four loads.
    "race": Build(
        f"-O2 -DEMU_CHECK_MEMORY {KNOWN}", f"-O1 -DEMU_CHECK_MEMORY {KNOWN} -fsanitize=thread -fno-tree-sra"
    ),
    "module": Build("-O2 -fvisibility=hidden", "-O2 -fvisibility=hidden"),
}
TEST_BUILDS = ("plain", "asan", "race")


def unsupported() -> str | None:
    """Why the emulator cannot run here, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the emulator of the CUDA kernels switches stacks on x86-64 Linux alone"
    try:
        compiler = toolchain.cxx()
    except SystemExit as missing:
        return str(missing)
    flags = "-std=c++20 -fsanitize=thread --param=tsan-instrument-func-entry-exit=0"  # g++ 12 has the last
    if not toolchain.cxx_accepts(compiler, flags):
        return f"{' '.join(compiler)} is not g++ 12 or later, whose -fsanitize=thread the emulator needs"
    return None


def wheel_folders() -> list[Path]:
    """Where NVIDIA's wheels are installed."""
    spec = importlib.util.find_spec("nvidia")
    return [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []


def cuda_include() -> Path:
    """CUDA's headers: those of nvcc's toolkit, else of NVIDIA's wheels."""
    nvcc, _ = toolchain.system_nvcc()
    folders = [nvcc.root() / "include"] if nvcc else []
    for folder in wheel_folders():
        folders += sorted(folder.glob("cu[0-9]*/include"), reverse=True)
    needed = ("cuda_runtime.h", "cuda.h", "cudaTypedefs.h", "cuda_fp8.h", "crt/host_defines.h", "nv/target")
    for folder in folders:
        if all((folder / name).exists() for name in needed):
            return folder
    return toolchain.stop(
        "CUDA's headers were not found: pip install 'nvidia-cuda-runtime==13.0.*' 'nvidia-cuda-crt==13.0.*' "
        "'nvidia-cuda-cccl==13.0.*', or install a toolkit"
    )


def tests() -> dict[str, Path]:
    return {path.stem: path for path in sorted(EMULATION.glob("*_test.cpp"))}


def programs() -> dict[str, Path]:
    """All that can be built: the tests, and the programs that are made for a GPU."""
    return {
        **tests(),
        "conformance": EMULATION / "conformance.cu",
        "wgmma_ceiling": TREE / "benchmarks" / "wgmma_ceiling.cu",
    }


def kernels_of(test: Path) -> list[str]:
    """The .cu files that a test links, without the ending: its first line, `// kernels: a b`, and device."""
    found = re.match(r"// kernels:(.*)", test.read_text())
    return ["device", *found[1].split()] if found else []


def program(build: str, test: str) -> Path:
    return FOLDER / build / test


def module_file() -> Path:
    return TREE / "sparseops" / (MODULE + sysconfig.get_config_var("EXT_SUFFIX"))


class Writer:
    """Collects the lines of build.ninja. Paths are relative to FOLDER: a copy of the tree builds the same."""

    def __init__(self) -> None:
        self.lines = [
            f"cxx = {toolchain_words()}",
            f"common = {COMMON} -I{relative(CSRC)} -I{relative(EMULATION)} -isystem {quoted(cuda_include())}",
            "rule cxx",
            "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = CXX $out",
            "rule link",
            "  command = $cxx -o $out $in $flags",
            "  description = LINK $out",
        ]

    def compile(self, source: Path, build: str, flags: str, after: str = "") -> str:
        target = f"{build}/obj/{relative_name(source)}.o"
        line = f"build {target}: cxx {relative(source)}{after}"
        if line not in self.lines:
            self.lines += [line, f"  flags = {flags}"]
        return target

    def emulator(self, build: str) -> list[str]:
        left_out = (() if build == "race" else RACE_ONLY) + (NOT_IN_MODULE if build == "module" else ())
        sources = [p for p in sorted(EMULATION.glob("*.cpp")) if p.stem not in (*left_out, *tests())]
        return [self.compile(source, build, f"$common {BUILDS[build].emulator}") for source in sources]

    def kernel(self, source: Path, build: str) -> str:
        # nvcc includes its runtime before everything, and we the emulator's, precompiled
        flags = f"{self.kernel_flags(build)} -I{build} -include cuda_emulation.h -x c++"
        flags += " '-DSPARSEOPS_CUDA_ARCHS=\"80;90a\"'"
        return self.compile(source, build, flags, f" | {build}/cuda_emulation.h.gch")

    def kernel_flags(self, build: str) -> str:
        return f"$common {BUILDS[build].kernels}"

    def precompile(self, build: str) -> None:
        header = relative(EMULATION / "cuda_emulation.h")
        flags = f"{self.kernel_flags(build)} -x c++-header"
        self.lines += [f"build {build}/cuda_emulation.h.gch: cxx {header}", f"  flags = {flags}"]

    def link(self, target: str, objects: list[str], flags: str) -> None:
        self.lines += [f"build {target}: link {' '.join(objects)}", f"  flags = {flags}"]

    def program(self, name: str, build: str) -> None:
        source = programs()[name]
        sources = [source, *(CSRC / "cuda" / f"{kernel}.cu" for kernel in kernels_of(source))]
        objects = [self.kernel(source, build) for source in sources]
        self.link(f"{build}/{name}", objects + self.emulator(build), BUILDS[build].link)

    def module(self) -> None:
        import pybind11

        includes = f"-I{relative(CSRC)} -isystem {quoted(pybind11.get_include())}"
        includes += f" -isystem {quoted(toolchain.python_include())}"
        flags = f"-std=c++17 -O2 -fPIC -fvisibility=hidden -fopenmp -Wall -Wextra {includes}"
        objects = [
            self.compile(CSRC / step.source, "module", f"{flags} -DSPARSEOPS_MODULE={MODULE} {step.flags}")
            for step in cpu_steps(CSRC, ["portable"])
        ]
        objects += [self.kernel(source, "module") for source in sorted((CSRC / "cuda").glob("*.cu"))]
        objects += self.emulator("module")
        self.link(relative(module_file()), objects, "-shared -fopenmp -Wl,-Bsymbolic")


def toolchain_words() -> str:
    return " ".join(toolchain.cxx()).replace("$", "$$")


def relative(path: Path) -> str:
    return os.path.relpath(path, FOLDER)


def relative_name(path: Path) -> str:
    return str(path.relative_to(TREE)).replace("/", ".")


def quoted(path: object) -> str:
    return f"'{path}'".replace("$", "$$")


def targets(builds: list[str], names: list[str]) -> list[str]:
    """Ninja's names of what was asked for."""
    wanted = [f"{build}/{name}" for build in builds if build in TEST_BUILDS for name in names]
    return wanted + ([relative(module_file())] if "module" in builds else [])


def build(builds: list[str], names: list[str]) -> int:
    """Builds these tests in these builds, as far as it can; returns ninja's exit code."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with toolchain.tree_lock(TREE):
        writer = Writer()
        for kind in TEST_BUILDS:
            writer.precompile(kind)
            for name in programs():
                writer.program(name, kind)
        if "module" in builds:
            writer.precompile("module")
            writer.module()
        (FOLDER / "build.ninja").write_text("\n".join([*writer.lines, ""]))
        jobs, _ = toolchain.jobs()
        command = [toolchain.ninja(), "-C", str(FOLDER), "-k", "0", "-j", str(jobs)]
        return subprocess.run([*command, *targets(builds, names)]).returncode


def main(arguments: list[str]) -> int:
    if reason := unsupported():
        toolchain.stop(reason)
    known = programs()
    builds = [argument for argument in arguments if argument in BUILDS]
    names = [Path(argument).stem for argument in arguments if argument not in BUILDS]
    names = [name if name in known else f"{name}_test" for name in names]
    for name in names:
        if name not in known:
            toolchain.stop(f"build.py: a test must be one of {', '.join(known)}, got {name!r}")
    if not builds or (builds == ["module"] and names):
        builds += TEST_BUILDS
    return build(builds, names or list(known))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
