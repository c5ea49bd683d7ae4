"""Where a number comes from: machine, commit, versions. Every row of a CSV carries these."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import sparseops
from benchmarks import isa

TREE = Path(__file__).resolve().parent.parent
RESULTS = TREE / "benchmarks" / "results"


def processor() -> str:
    """The processor's own name, with the family and model that a virtual machine's short name may hide."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    pairs = [line.partition(":") for line in lines]
    facts = {key.strip(): value.strip() for key, _, value in reversed(pairs)}
    name = facts.get("model name") or platform.machine()
    if "cpu family" in facts:
        name += f" (family {facts['cpu family']}, model {facts.get('model', '?')})"
    return name


def machine() -> str:
    """Processor and number of cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{processor()}, {cores} cores"


def folder_name(machine_name: str) -> str:
    """The machine's folder under ``benchmarks/results``."""
    return re.sub(r"[^a-z0-9]+", "-", machine_name.lower()).strip("-")


def commit() -> str:
    """Short hash of the checked-out commit, "" outside git.

    ``-dirty`` is added when tracked files other than the results and the README differ from it.
    """
    revision = _git("rev-parse", "--short=10", "HEAD")
    others = (".", ":!benchmarks/results", ":!README.md")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *others)
    return f"{revision}-dirty" if revision and changed else revision


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", "-C", str(TREE), *words], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def provenance() -> dict[str, str]:
    """The columns that say where and when a row was measured."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "commit": commit(),
        "machine": machine(),
        "isa": isa.current(),
        "torch": torch.__version__,
        "sparseops": sparseops.__version__,
    }
