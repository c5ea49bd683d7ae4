"""Writes build.ninja and runs it: objects, then one shared object `_C.so` in the build folder.

Nothing is compiled again when nothing changed, though pip hands out a fresh build environment each time. The
folder build/ninja-* stays in the tree. Links in it stand for the paths of that environment, so that command
lines stay the same. Headers of Python, pybind11 and CUDA, new files each time, are no dependencies: small
files that hold their versions stand in for them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import toolchain
from archs import DEFAULT_ARCHS, Arch, check_known, parse_archs
from sources import Step, buildable_isas, cpu_steps, cuda_steps
from toolchain import Nvcc, say, stop

CUDA_LIBRARY_FOLDERS = ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")


@dataclass(frozen=True)
class Tools:
    """Everything a build.ninja depends on besides the sources."""

    cxx: list[str]
    isas: list[str]
    nvcc: Nvcc | None
    archs: list[Arch]

    @classmethod
    def find(cls) -> Tools:
        """Looks for the compilers; stops with one sentence when one that is needed is missing."""
        cxx = toolchain.cxx()
        nvcc = toolchain.find_nvcc()
        return cls(cxx, buildable_isas(cxx), nvcc, wanted_archs(nvcc) if nvcc else [])

    def describe(self) -> str:
        cuda = f"{self.nvcc} for {';'.join(map(str, self.archs))}" if self.nvcc else "no CUDA"
        return f"{' '.join(self.cxx)} for {' '.join(self.isas)}; {cuda}"


def wanted_archs(nvcc: Nvcc) -> list[Arch]:
    """TORCH_CUDA_ARCH_LIST or the default, checked against what this nvcc can build."""
    archs, left_out = parse_archs(toolchain.variable(toolchain.ARCHS, DEFAULT_ARCHS))
    if left_out:
        names = ", ".join(map(str, left_out))
        say(f"{toolchain.ARCHS} holds {names}, older than any kernel of sparseops: left out")
    check_known(archs, nvcc.known_archs(), nvcc.release)
    return archs


def build_folder(tree: Path) -> Path:
    """Where the objects lie: one folder for each kind of Python that builds in this tree."""
    return tree / "build" / f"ninja-{sysconfig.get_config_var('EXT_SUFFIX').split('.')[1]}"


def build(tree: Path, output: Path) -> None:
    """Compiles what changed under tree/csrc and puts the module at `output`."""
    with toolchain.tree_lock(tree):
        tools = Tools.find()
        folder = build_folder(tree)
        folder.mkdir(parents=True, exist_ok=True)
        jobs, nvcc_jobs = toolchain.jobs()
        say(f"{tools.describe()}; jobs: {jobs}")
        _place_links(folder, tools)
        steps = cpu_steps(tree / "csrc", tools.isas) + cuda_steps(tree / "csrc", tools.archs)
        csrc = os.path.relpath(tree / "csrc", folder)
        _write(folder / "build.ninja", render(steps, tools, csrc, nvcc_jobs))
        if subprocess.run([toolchain.ninja(), "-C", str(folder), "-j", str(jobs)]).returncode:
            without_cuda = f" ({toolchain.CUDA}=0 builds without CUDA)" if tools.nvcc else ""
            stop(f"compiling failed, see above{without_cuda}")
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "_C.so", output)


def _place_links(folder: Path, tools: Tools) -> None:
    import pybind11

    _link(folder / "python", toolchain.python_include())
    _link(folder / "pybind11", pybind11.get_include())
    _write(folder / "cxx_version.h", f"// {toolchain.cxx_version(tools.cxx)}\n")
    _write(folder / "python_version.h", f"// pybind11 {pybind11.__version__}, Python {sys.version!r}\n")
    if tools.nvcc:
        _link(folder / "cuda", str(tools.nvcc.root()))
        _write(folder / "cuda_version.h", f"// {tools.nvcc.release}\n")


def _link(link: Path, target: str) -> None:
    if link.is_symlink() and os.readlink(link) == target:
        return
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def _write(file: Path, text: str) -> None:
    if not file.exists() or file.read_text() != text:
        file.write_text(text)


def render(steps: list[Step], tools: Tools, csrc: str, nvcc_jobs: int) -> str:
    """The text of build.ninja; `csrc` is the sources' folder as seen from the build folder."""
    lines = _cxx_rule(tools, csrc) + _link_rule(tools)
    if tools.nvcc:
        lines += _nvcc_rule(tools, csrc, nvcc_jobs)
    for step in steps:
        versions = "cxx_version.h"
        versions += " python_version.h" if step.source == "bindings.cpp" else ""
        versions += " cuda_version.h" if step.rule == "nvcc" else ""
        lines += [
            f"build obj/{step.object}: {step.rule} {csrc}/{step.source} | {versions}",
            f"  flags = {step.flags}",
        ]
    objects = " ".join(f"obj/{step.object}" for step in steps)
    return "\n".join([*lines, f"build _C.so: link {objects}", "default _C.so", ""])


def _openmp() -> str:
    return "" if sys.platform == "darwin" else "-fopenmp"


def _cxx_rule(tools: Tools, csrc: str) -> list[str]:
    flags = f"-std=c++17 -O3 -fPIC -fvisibility=hidden {_openmp()} -ffp-contract=fast -Wall -Wextra"
    includes = f"-I{csrc} -isystem pybind11 -isystem python"
    return [
        f"cxx = {_escape(' '.join(tools.cxx))}",
        f"cxxflags = {flags} {includes} {_escape(toolchain.variable('CXXFLAGS'))}",
        "rule cxx",
        "  command = $cxx -MMD -MF $out.d $cxxflags $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = CXX $out",
    ]


def _nvcc_rule(tools: Tools, csrc: str, nvcc_jobs: int) -> list[str]:
    archs = ";".join(map(str, tools.archs))
    return [
        "pool nvcc",
        f"  depth = {nvcc_jobs}",
        f"nvcc = cuda/bin/nvcc -ccbin {_escape(toolchain.ccbin(tools.cxx))}",
        f"nvccflags = -std=c++17 -O3 -lineinfo -cudart static --threads 1 -I{csrc} "
        f"-Xcompiler -fPIC,-fvisibility=hidden,-Wall,-Wextra '-DSPARSEOPS_CUDA_ARCHS=\"{archs}\"'",
        "rule nvcc",
        # What nvcc says stays beside the object: with exit status 0 ptxas tells when it makes a kernel slow.
        # nvcc lists its own headers too, as cuda/...; cuda_version.h stands for them.
        "  command = $nvcc -MMD -MF $out.d $nvccflags $flags -c $in -o $out >$out.log 2>&1; "
        "status=$$?; cat $out.log; [ $$status = 0 ] && sed -i '/^ *cuda\\//d' $out.d",
        "  depfile = $out.d",
        "  deps = gcc",
        "  pool = nvcc",
        "  description = NVCC $out",
    ]


def _link_rule(tools: Tools) -> list[str]:
    if sys.platform == "darwin":
        flags = "-bundle -undefined dynamic_lookup"
    else:
        sections = "-Wl,--as-needed -Wl,-Bsymbolic -Wl,--exclude-libs,ALL -Wl,--gc-sections -s"
        flags = f"-shared {_openmp()} {sections}"
    libraries = ""
    if tools.nvcc:
        libraries = f"-Lcuda/{_cuda_library_folder(tools.nvcc.root())} -lcudart_static -ldl -lrt -lpthread"
    return [
        f"ldflags = {flags} {_escape(toolchain.variable('LDFLAGS'))}",
        f"libraries = {libraries}",
        "rule link",
        "  command = $cxx -o $out $in $ldflags $libraries",
        "  description = LINK $out",
    ]


def _cuda_library_folder(root: Path) -> str:
    for folder in CUDA_LIBRARY_FOLDERS:
        if (root / folder / "libcudart_static.a").exists():
            return folder
    return stop(f"libcudart_static.a was not found under {root}: install the toolkit's development files")


def _escape(text: str) -> str:
    return text.replace("$", "$$")
