"""The tests of the ops once more, with the CUDA kernels run on the CPU: all that lies between the two."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparseops import _native, env

TREE = Path(__file__).resolve().parent.parent

# Of test_ops.py what does not depend on how a kernel computes, and so is worth seeing for these too. What
# test_gpu_ops.py repeats is left out.
OPS = (
    "test_opcheck or test_fake_tensors or test_stored_buffers or test_inference_mode or test_vmap or "
    "test_asking or test_nan_and_infinity"
)


def run(*arguments, **variables):
    ours = {name: value for name, value in os.environ.items() if not name.startswith("SPARSEOPS_")}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**ours, "OMP_NUM_THREADS": "1", **variables},
        cwd=TREE,
        capture_output=True,
        text=True,
        timeout=1800,
    )


@pytest.fixture(scope="module")
def module():
    """The package's module with emulated kernels, built."""
    if _native.emulated:
        pytest.skip("these tests run in processes of their own")
    built = run("tests/emulation/build.py", "module")
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]


def pytest_run(*arguments, capability="8.0"):
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, SPARSEOPS_EMULATE=capability)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1]), done.stdout


@pytest.mark.parametrize("half", ["test_every or test_gradients", "not test_every and not test_gradients"])
def test_kernels_from_python(module, half):
    passed, said = pytest_run("tests/test_gpu_ops.py", "-k", half)
    assert passed > 200 and "skipped" not in said


def test_kernels_for_sm90_from_python(module):
    # the gradients' kernels and the tiles of mma.sp are the same as on other GPUs
    files = "tests/test_gpu_sm90.py", "tests/test_gpu_ops.py"
    passed, said = pytest_run(*files, "-k", "not test_every and not test_gradients", capability="9.0")
    assert passed > 400 and "skipped" not in said


def test_ops(module):
    passed, _ = pytest_run("tests/test_ops.py", "-k", OPS)
    assert passed > 200


CHILD = """
import torch
import sparseops
from sparseops import _native
from sparseops.ops import cuda, registry
layer = sparseops.SparseLinear(40, 24).half()
print(_native.C.emulated(), registry.FAST, layer.kernel)
if _native.emulated:
    print(cuda.multiprocessors(torch.device("cpu")))
"""


def test_a_layer_says_that_it_is_emulated(module):
    for value, instruction, count in (("1", "mma.sp", 108), ("8.0", "mma.sp", 108), ("9.0", "wgmma.sp", 132)):
        done = run("-c", CHILD, SPARSEOPS_EMULATE=value)
        assert done.stdout == f"True False cuda {instruction} (emulated)\n{count}\n", done.stderr
    done = run("-c", CHILD)
    assert done.stdout.startswith("False True "), done.stderr


@pytest.mark.parametrize(
    ("value", "capability"), [("0", None), ("1", (8, 0)), ("8.0", (8, 0)), ("9.0", (9, 0))]
)
def test_the_gpu_that_is_emulated(value, capability, monkeypatch):
    monkeypatch.setenv("SPARSEOPS_EMULATE", value)
    assert env.emulate() == _native._configure(_native.C).emulate == capability


def test_the_emulator_is_told_which_gpu_it_is(monkeypatch):
    monkeypatch.setenv("EMU_CAPABILITY", "none yet")
    found = SimpleNamespace(origin=str(Path(_native.__file__).parent / "_C_emulated.so"))
    monkeypatch.setattr(_native.importlib.util, "find_spec", lambda name: found)
    told = []

    def module(name):
        told.append(os.environ["EMU_CAPABILITY"])

    monkeypatch.setattr(_native.importlib, "import_module", module)
    for capability in ((8, 0), (9, 0), None):
        _native._load(capability)
    assert told == ["8.0", "9.0", "9.0"], "before it is loaded"


def test_without_the_module(monkeypatch):
    monkeypatch.setattr(_native.importlib.util, "find_spec", lambda name: None)
    found, reason = _native._load(emulate=True)
    assert found is None
    assert reason.endswith(
        "has no module with emulated CUDA kernels: run `python tests/emulation/build.py module` in a source "
        "tree, or unset SPARSEOPS_EMULATE"
    )
