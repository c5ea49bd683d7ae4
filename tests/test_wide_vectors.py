"""The CPU kernels with 64-byte vectors and a bfloat16 dot product, on any processor.

Few machines have AVX-512, and the kernels are written once for any width of vector, so the wide ones are
compiled here for this machine's plain instructions (the compiler splits vectors wider than the processor's,
the dot product is emulated) and run through every case of every op. What this leaves to a machine that has
AVX-512 are the few intrinsics of csrc/cpu/vector.h.
"""

import importlib.util
import os
import shlex
import subprocess
import sysconfig
from pathlib import Path

import pybind11
import pytest
from conftest import CASES, LAYERS, every_dtype

from sparseops import _native
from sparseops.testing import assert_close, expect

CSRC = Path(__file__).parents[1] / "csrc"
KERNELS = ["panel", "few_tokens", "nm24_linear", "nm24_conv", "bf16_pairs", "channel_copy"]
WIDE = [
    "-DSPARSEOPS_ISA=portable",
    "-DSPARSEOPS_VECTOR_BYTES=64",
    "-DSPARSEOPS_EMULATE_BF16_DOT",
    "-Wno-psabi",
]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """The extension module with wide kernels in the place of the portable ones."""
    folder = tmp_path_factory.mktemp("wide")
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    sources = {CSRC / "cpu" / f"{kernel}.cpp": WIDE for kernel in KERNELS}
    sources |= {CSRC / name: includes for name in ("bindings.cpp", "cpu/dispatch.cpp", "cuda/absent.cpp")}
    base = ["-std=c++17", f"-I{CSRC}", "-O1", "-fPIC", "-fopenmp", "-fvisibility=hidden"]
    objects = []
    for source, flags in sources.items():
        objects.append(folder / f"{source.stem}.o")
        subprocess.run([*compiler, *base, *flags, "-c", source, "-o", objects[-1]], check=True)
    module = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([*compiler, "-shared", "-fopenmp", *objects, "-o", module], check=True)
    spec = importlib.util.spec_from_file_location("_C", module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@every_dtype
@pytest.mark.parametrize(("op", "case"), [case for case in CASES if case.values[0] in LAYERS])
def test_wide_vectors(op, case, dtype, wide, monkeypatch):
    monkeypatch.setattr(_native, "C", wide)
    args, kwargs = case.make(dtype)
    assert_close(op.fn(*args, **kwargs), expect(op, args, kwargs))
