"""The CUDA kernels on the CPU: every tests/emulation/*_test.cpp, in three builds and several orders.

Needs g++ 12 on x86-64 Linux, and CUDA's headers (the test extra brings them). tests/emulation/build.py builds
by hand what is run here.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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

# the plain build is quick, so it runs in four orders; the other two need no luck with them
RUNS = [("plain", seed) for seed in range(4)] + [("asan", 0), ("race", 0)]
RUN_IDS = [f"{kind}-seed{seed}" if kind == "plain" else kind for kind, seed in RUNS]


def run_program(program, seed=0, arguments=()):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EMU_")}
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


@pytest.fixture(scope="session")
def results(request):
    """What the collected tests will ask for: built at once, run two at a time, waited for one by one."""
    asked = [
        tuple(item.callspec.params[name] for name in ("name", "run"))
        for item in request.session.items
        if item.function is test_kernel
    ]
    names = sorted({name for name, _ in asked})
    kinds = sorted({kind for _, (kind, _) in asked})
    all_built = run_build(*kinds, *names).returncode == 0

    def result_of(name, kind, seed):
        # ninja leaves an old program where the new one does not compile
        if not all_built and (built := run_build(kind, name)).returncode:
            return built
        return run_program(build.program(kind, name), seed)

    with ThreadPoolExecutor(max_workers=2) as pool:
        futures = {(name, run): pool.submit(result_of, name, *run) for name, run in asked}
        yield futures
        for future in futures.values():
            future.cancel()


@needs_emulator
@pytest.mark.parametrize("run", RUNS, ids=RUN_IDS)
@pytest.mark.parametrize("name", build.tests())
def test_kernel(results, name, run):
    result = results[name, run].result()
    # the failed cases, and what a sanitizer says; the cases that passed are of no interest
    report = [line for line in result.stdout.splitlines() if not line.startswith("ok ")]
    assert result.returncode == 0, "\n".join([*report, result.stderr])
    assert "ok " in result.stdout


# ---- the emulated instructions against those of a GPU


RECORDED = sorted((EMULATION / "conformance").glob("*.txt"))


@pytest.fixture(scope="session")
def conformance():
    built = run_build("plain", "conformance")
    assert built.returncode == 0, built.stdout + built.stderr
    return build.program("plain", "conformance")


@needs_emulator
@pytest.mark.parametrize("file", RECORDED or [None], ids=lambda file: file.stem if file else "none")
def test_the_emulator_does_what_a_gpu_did(conformance, file):
    if file is None:
        pytest.skip("no GPU has been recorded yet: the emulator stands on the documents (conformance.cu)")
    result = run_program(conformance, arguments=("replay", str(file)))
    assert result.returncode == 0, result.stdout + result.stderr


@needs_emulator
def test_a_gpu_that_does_something_else_is_seen(conformance, tmp_path):
    recorded = run_program(conformance, arguments=("record",)).stdout.splitlines()
    cases = [line.split()[1] for line in recorded if line.startswith("case ")]
    file = tmp_path / "gpu.txt"

    def wrong(lines):
        file.write_text("\n".join(lines) + "\n")
        said = run_program(conformance, arguments=("replay", str(file))).stdout.splitlines()
        assert len(said) == len(cases) + 1
        return [line.split(":")[0].removeprefix("FAIL ") for line in said if line.startswith("FAIL ")]

    def with_flipped(bit):  # in the last result of each case
        for line, after in zip(recorded, [*recorded[1:], "case"], strict=True):
            if line.startswith("out ") and after.startswith("case"):
                first, _, last = line.rpartition(" ")
                line = f"{first} {int(last, 16) ^ 1 << bit:08x}"
            yield line

    assert wrong(recorded) == []
    assert wrong(list(with_flipped(31))) == cases
    assert wrong(list(with_flipped(0))) == [case for case in cases if not case.endswith(("near_one", "any"))]
    assert wrong(recorded[: recorded.index(f"case {cases[-1]}")]) == cases[-1:]


def test_every_instruction_is_recorded():
    wrappers = re.findall(
        r"^SPARSEOPS_DEVICE \w+\*? (\w+)\(", (build.CSRC / "cuda" / "ptx.cuh").read_text(), re.M
    )
    assert len(wrappers) > 8
    program = (EMULATION / "conformance.cu").read_text()
    assert [name for name in wrappers if not re.search(rf"ptx::{name}\b", program)] == []


def test_every_kernel_has_a_test():
    kernels = {path.stem for path in (build.CSRC / "cuda").glob("*.cu")} - {"device"}
    assert kernels <= {name.removesuffix("_test") for name in build.tests()}


@needs_emulator
def test_headers_come_from_the_wheels_where_there_is_no_toolkit(monkeypatch, tmp_path):
    headers = tmp_path / "nvidia" / "cu13" / "include"
    for name in ("cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h", "crt/host_defines.h", "nv/target"):
        (headers / name).parent.mkdir(parents=True, exist_ok=True)
        (headers / name).touch()
    monkeypatch.setattr(build.toolchain, "system_nvcc", lambda: (None, "no nvcc was found"))
    monkeypatch.setattr(build, "wheel_folders", lambda: [tmp_path / "nvidia"])
    assert build.cuda_include() == headers
    (headers / "nv" / "target").unlink()
    with pytest.raises(SystemExit, match=r"CUDA's headers were not found: pip install 'nvidia-cuda-runtime"):
        build.cuda_include()
