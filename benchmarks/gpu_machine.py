"""``python -m benchmarks.gpu_machine``: the GPU and the software that a run is made with.

--arch       prints the architecture to build for, as TORCH_CUDA_ARCH_LIST takes it
--out FOLDER writes environment.json
--dry-run    describes this processor in place of a GPU
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import sparseops
from benchmarks import provenance
from benchmarks.gpu_results import ENVIRONMENT
from sparseops import _native

DRY_RUN = "stand-in for a GPU"
ONE_CHIP = (9, 10)  # generations whose architectures are built for one chip alone, 9.0a, to have all of it


def arch(capability: tuple[int, int]) -> str:
    """The architecture of a GPU, as the build takes it."""
    major, minor = capability
    return f"{major}.{minor}" + ("a" if major in ONE_CHIP else "")


def commit() -> str:
    """That of this tree: COMMIT, for a copy without its history, else what git says."""
    return os.environ.get("COMMIT") or provenance.commit() or "unknown"


def smi(*fields: str) -> list[str]:
    """What nvidia-smi tells of the first GPU, "" for what it does not."""
    query = [f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        answer = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return [""] * len(fields)
    values = [value.strip() for value in answer.stdout.strip().split(",")]
    return values if answer.returncode == 0 and len(values) == len(fields) else [""] * len(fields)


def sm_mhz() -> int | None:
    """The clock of the multiprocessors now."""
    (text,) = smi("clocks.sm")
    return int(text) if text.isdecimal() else None


def _version(command: str) -> str:
    path = shutil.which(command) or shutil.which(f"/usr/local/cuda/bin/{command}")
    if not path:
        return ""
    answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20)
    lines = answer.stdout.splitlines()
    return next((line.strip() for line in lines if "release" in line or "ersion" in line), "")


def _sparselt() -> str:
    module = getattr(torch.backends, "cusparselt", None)
    try:
        return str(module.version()) if module and module.is_available() else ""
    except (AttributeError, RuntimeError):
        return ""


def _build() -> dict[str, Any]:
    return dict(_native.C.build_info()) if _native.C is not None else {}


def software() -> dict[str, str]:
    """The columns of a row that say what it was measured with."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "commit": commit(),
        "cuda": torch.version.cuda or "",
        "torch": torch.__version__,
        "sparseops": sparseops.__version__,
        "archs": str(_build().get("cuda_archs", "")),
    }


def machine(dry_run: bool) -> dict[str, str]:
    """The columns of a row that say where it was measured."""
    if dry_run:
        return {"machine": f"{DRY_RUN}: {provenance.processor()}", "driver": ""}
    (driver,) = smi("driver_version")
    return {"machine": torch.cuda.get_device_name(0), "driver": driver}


def facts(dry_run: bool) -> dict[str, Any]:
    """All of it."""
    found: dict[str, Any] = {**machine(dry_run), **software(), "dry_run": dry_run}
    found |= {"python": platform.python_version(), "system": platform.platform(), "nvcc": _version("nvcc")}
    found |= {"cudnn": str(torch.backends.cudnn.version() or ""), "cusparselt": _sparselt()}
    found["compute_sanitizer"] = _version("compute-sanitizer")
    if dry_run:
        return found
    properties = torch.cuda.get_device_properties(0)
    found |= {
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(0)),
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
    }
    names = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
    return found | {f"smi {name}": value for name, value in zip(names, smi(*names), strict=True)}


def main(argv: Sequence[str] | None = None) -> int:
    """Prints or writes."""
    options = argparse.ArgumentParser(
        "python -m benchmarks.gpu_machine", description="The GPU and the software."
    )
    add = options.add_argument
    add("--arch", action="store_true", help="print the architecture to build for")
    add("--out", type=Path, metavar="FOLDER", help=f"write FOLDER/{ENVIRONMENT}")
    add("--dry-run", action="store_true", help="this processor in place of a GPU")
    chosen = options.parse_args(argv)
    if not chosen.dry_run and not torch.cuda.is_available():
        print("benchmarks.gpu_machine: torch sees no GPU", file=sys.stderr)
        return 1
    if chosen.arch:
        print(arch(torch.cuda.get_device_capability(0)))
        return 0
    found = facts(chosen.dry_run)
    text = json.dumps(found, indent=1) + "\n"
    if chosen.out:
        chosen.out.mkdir(parents=True, exist_ok=True)
        (chosen.out / ENVIRONMENT).write_text(text)
    print(found["machine"], "driver", found["driver"] or "unknown", "commit", found["commit"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
