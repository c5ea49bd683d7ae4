"""Building and running the programs of tests/emulation: what several tests share."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EMULATION = Path(__file__).resolve().parent / "emulation"
TIMEOUT = 300  # seconds: a kernel that never ends must not hold up the rest


def load(name):
    """A module of tests/emulation, whose names are too common to import."""
    spec = importlib.util.spec_from_file_location(f"emulation_{name}", EMULATION / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build = load("build")
UNSUPPORTED = build.unsupported()
needs_emulator = pytest.mark.skipif(UNSUPPORTED is not None, reason=str(UNSUPPORTED))


def run_program(program, seed=0, arguments=(), **emulator):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EMU_")}
    environment.update(emulator)
    command = [str(program), *arguments]
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
            env={**environment, "EMU_SEED": str(seed)},
        )
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"").decode(errors="replace")
        return subprocess.CompletedProcess(command, 124, said, f"still running after {TIMEOUT} s")


def run_build(*arguments):
    command = [sys.executable, str(EMULATION / "build.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)
