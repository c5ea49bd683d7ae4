"""``doctor``: what is installed, what the machine has, and for every kernel that is off the reason and the
cure."""

from __future__ import annotations

import io
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparseops import _native, env, triton
from sparseops.ops import cuda, registry

_CPU_FLAGS = "avx2 fma avx512f avx512bw avx512vl avx512_bf16 amx_bf16 asimd sve bf16".split()


@dataclass(frozen=True)
class Kernel:
    """Whether the kernel of an op is on for a kind of device; if not, why, and what to do about it.
    ``exists``: this version has one."""

    op: str
    device: str
    on: bool
    kernel: str
    reason: str = ""
    cure: str = ""
    exists: bool = True


@dataclass(frozen=True)
class Diagnosis:
    """What ``doctor`` found. ``ok``: every kernel that there is for the CPU is on."""

    versions: dict[str, str]
    cpu: dict[str, Any]
    instruction_sets: dict[str, str]
    cuda: dict[str, Any]
    environment: dict[str, str]
    kernels: tuple[Kernel, ...]
    problems: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        return all(kernel.on for kernel in self.kernels if kernel.device == "cpu" and kernel.exists)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON can carry."""
        return asdict(self) | {"ok": self.ok, "kernels": [asdict(kernel) for kernel in self.kernels]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        console = Console(file=text, width=1000, color_system=None, force_terminal=False)
        for table in self._tables():
            console.print(table)
        return "\n".join(line.rstrip() for line in text.getvalue().rstrip().splitlines())

    def print(self, file: IO[str] | None = None) -> None:
        """Print the tables to ``file`` (standard output by default): coloured and fitted in a terminal, else
        plain."""
        from rich.console import Console

        console = Console(file=file)
        if not console.is_terminal:
            print(self, file=file)
            return
        for table in self._tables():
            console.print(table)

    def _tables(self) -> list[Any]:
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table

        tables = []
        for title, facts in (
            ("versions", self.versions),
            ("processor", self.cpu),
            ("CPU instruction sets", self.instruction_sets),
            ("CUDA", self.cuda),
            ("environment", self.environment),
        ):
            table = Table(
                title=title,
                title_justify="left",
                show_header=False,
                box=None,
                title_style="bold",
                padding=(0, 2),
            )
            for name, value in facts.items():
                shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
                table.add_row(name, escape(shown), style=None)
            if facts:
                tables.append(table)
        table = Table(title="kernels", title_justify="left", box=SIMPLE_HEAD, title_style="bold")
        for column in ("op", "device", "kernel", "why not", "cure"):
            table.add_column(column, overflow="fold")
        for kernel in self.kernels:
            state = escape(kernel.kernel) if kernel.on else "off (plain torch runs)"
            style = "green" if kernel.on else "yellow"
            table.add_row(
                kernel.op, kernel.device, state, escape(kernel.reason), escape(kernel.cure), style=style
            )
        tables.append(table)
        if self.problems:
            table = Table(
                title="problems",
                title_justify="left",
                show_header=False,
                box=None,
                title_style="bold",
                padding=(0, 2),
            )
            for problem in self.problems:
                table.add_row(escape(problem), style="red")
            tables.append(table)
        return tables


def doctor() -> Diagnosis:
    """Look at the installation and the machine. Works without the built module; that is what it is for."""
    return Diagnosis(
        versions=_versions(),
        cpu=_cpu(),
        instruction_sets=_instruction_sets(),
        cuda=_cuda(),
        environment=env.variables(),
        kernels=tuple(_kernel(op, device) for op in registry.REGISTRY.values() for device in ("cpu", "cuda")),
        problems=tuple(text for text in (_native.error, _native.config_error) if text is not None),
    )


def _versions() -> dict[str, str]:
    try:
        version = metadata.version("sparseops")
    except metadata.PackageNotFoundError:
        version = "not installed (run from a source tree)"
    return {
        "sparseops": version,
        "sparseops from": str(Path(__file__).resolve().parent),
        "built module": "missing" if _native.C is None else str(_native.C.__file__),
        "compiler": "none" if _native.C is None else str(_native.C.build_info()["compiler"]),
        "torch": str(torch.__version__),
        "triton": triton.installed_version() or "not installed",
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def _cpu() -> dict[str, Any]:
    name, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = set(value.split())
    return {
        "name": name,
        "features": [flag for flag in _CPU_FLAGS if flag in flags],
        "cores seen": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "kernels use OpenMP": bool(_native.C is not None and _native.C.build_info()["openmp"]),
    }


def _instruction_sets() -> dict[str, str]:
    """State of each instruction set the CPU kernels are written for."""
    if _native.C is None:
        return {}
    built, used = _native.C.build_info()["isas"], _native.C.cpu_isa()
    states = {}
    for isa in env.CPU_ISAS:
        if isa not in built:
            states[isa] = "not built (the compiler or the architecture does not know it)"
        elif not _native.C.cpu_supports(isa):
            states[isa] = "built; this processor does not have it"
        else:
            states[isa] = "in use" if isa == used else "available"
    return states


def _cuda() -> dict[str, Any]:
    facts: dict[str, Any] = {"torch built with CUDA": torch.version.cuda or "no"}
    if _native.C is not None:
        build = _native.C.build_info()
        facts["sparseops built with CUDA"] = "yes" if build["cuda"] else "no"
        facts["architectures built"] = build["cuda_archs"] or "none"
        facts["kernels for sm_90a built"] = "yes" if cuda.has_sm90(build["cuda_archs"]) else "no"
        probe = _native.C.cuda_probe()
        facts["driver"] = _cuda_version(probe["driver"])
        facts["runtime"] = _cuda_version(probe["runtime"])
        facts["devices"] = probe["devices"]
        if probe["error"] is not None:
            facts["error"] = probe["error"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            facts[f"device {index}"] = (
                f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
            )
            with FakeTensorMode():
                reason = triton.no_triton_reason(torch.empty(0, device=f"cuda:{index}"))
            facts[f"device {index} runs kernels in Triton"] = "yes" if reason is None else f"no: {reason}"
            if _native.C is not None and cuda.gpu_reason(index) is None:
                reason = cuda.no_sm90_reason(torch.device("cuda", index))
                facts[f"device {index} runs wgmma.sp"] = "yes" if reason is None else f"no: {reason}"
    return facts


def _cuda_version(number: int) -> str:
    """CUDA encodes 13.0 as 13000."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


def _kernel(op: registry.Op, device: str) -> Kernel:
    # A fake tensor stands for one on a device that need not be there.
    with FakeTensorMode():
        x = torch.empty((8, 16), dtype=op.dtype, device=device)
        reason = op.supports(x)
        by_triton = cuda.by_triton(x) or (registry.on_gpu(x) and not _has_cuda_kernel(op))
    if reason is not None:
        return Kernel(op.name, device, False, "", reason, _cure(op, device, reason), op.runs_on(device))
    if by_triton and ("cuda", "triton") in op.impls:
        note = f"triton, {op.impls['cuda', 'triton']}"
        return Kernel(op.name, device, True, note, exists=op.runs_on(device))
    notes = [note for (kind, _), note in op.impls.items() if kind == device]
    if device == "cpu" and _native.emulated:
        return Kernel(op.name, device, True, "the CUDA kernel, emulated", exists=op.runs_on(device))
    on_isa = any((device, isa) in op.impls for isa in env.CPU_ISAS)
    return Kernel(op.name, device, True, registry.cpu_isa() if on_isa else notes[0])


def _has_cuda_kernel(op: registry.Op) -> bool:
    """Whether there is one that is not in Triton."""
    return any(device == "cuda" and by != "triton" for device, by in op.impls)


def _cure(op: registry.Op, device: str, reason: str) -> str:
    if reason == _native.config_error:
        return "correct or unset the variable"
    if not op.runs_on(device):
        return "none in this version; the plain torch reference runs"
    if device == "cuda" and _native.C is not None and _has_cuda_kernel(op):
        if not _native.C.build_info()["cuda"]:
            return (
                "reinstall with SPARSEOPS_CUDA=1"
                if torch.version.cuda
                else "none needed: torch has no CUDA either"
            )
        if reason == _native.C.cuda_probe()["error"]:
            return "install or update the NVIDIA driver, and check that nvidia-smi lists the GPU"
    if reason == cuda.DENSE_REASON:
        return "unset SPARSEOPS_IMPL"
    # The sentences that know a cure end in it.
    return reason.rpartition(": ")[2] if ": " in reason else "none; the plain torch reference runs"
