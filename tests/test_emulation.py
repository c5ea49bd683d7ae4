"""The CUDA kernels on the CPU: every tests/emulation/*_test.cpp, in three builds and several orders.

Needs g++ 12 on x86-64 Linux, and CUDA's headers (the test extra brings them). tests/emulation/build.py builds
by hand what is run here.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from emulator import EMULATION, build, needs_emulator, run_build, run_program

# the plain build is quick, so it runs in four orders; the other two need no luck with them
RUNS = [("plain", seed) for seed in range(4)] + [("asan", 0), ("race", 0)]
RUN_IDS = [f"{kind}-seed{seed}" if kind == "plain" else kind for kind, seed in RUNS]


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

    def run(*arguments):  # on a device that has all instructions
        return run_program(build.program("plain", "conformance"), 0, arguments, EMU_CAPABILITY="9.0")

    return run


@needs_emulator
@pytest.mark.parametrize("file", RECORDED or [None], ids=lambda file: file.stem if file else "none")
def test_the_emulator_does_what_a_gpu_did(conformance, file):
    if file is None:
        pytest.skip("no GPU has been recorded yet: the emulator stands on the documents (conformance.cu)")
    result = conformance("replay", str(file))
    assert result.returncode == 0, result.stdout + result.stderr


@needs_emulator
def test_a_gpu_that_does_something_else_is_seen(conformance, tmp_path):
    recorded = conformance("record").stdout.splitlines()
    cases = [line.split()[1] for line in recorded if line.startswith("case ")]
    file = tmp_path / "gpu.txt"

    def wrong(lines):
        file.write_text("\n".join(lines) + "\n")
        said = conformance("replay", str(file)).stdout.splitlines()
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


@needs_emulator
def test_a_gpu_without_the_newest_instructions_is_replayed_too(conformance, tmp_path):
    older = run_program(build.program("plain", "conformance"), arguments=("record",), EMU_CAPABILITY="8.0")
    file = tmp_path / "gpu.txt"
    file.write_text(older.stdout)
    assert "compute capability 8.0" in older.stdout and "wgmma" not in older.stdout
    assert conformance("replay", str(file)).returncode == 0


def test_every_instruction_is_recorded():
    headers = (build.CSRC / "cuda" / name for name in ("ptx.cuh", "ptx_sm90.cuh", "wgmma_sp.cuh"))
    text = "".join(header.read_text() for header in headers)
    wrappers = re.findall(r"^SPARSEOPS_DEVICE \w+\*? (\w+)\(", text, re.M)
    assert len(wrappers) > 40
    program = "".join((EMULATION / name).read_text() for name in ("conformance.cu", "conformance_sm90.cuh"))
    assert [name for name in wrappers if not re.search(rf"ptx::{name}\b", program)] == []


def test_every_kernel_has_a_test():
    kernels = {path.stem for path in (build.CSRC / "cuda").glob("*.cu")}
    linked = {kernel for test in build.tests().values() for kernel in build.kernels_of(test)}
    assert {kernel for kernel in kernels if f"{kernel}_test" not in build.tests()} <= linked


@needs_emulator
def test_headers_come_from_the_wheels_where_there_is_no_toolkit(monkeypatch, tmp_path):
    headers = tmp_path / "nvidia" / "cu13" / "include"
    names = ("cuda_runtime.h", "cuda.h", "cudaTypedefs.h", "cuda_fp8.h", "crt/host_defines.h", "nv/target")
    for name in names:
        (headers / name).parent.mkdir(parents=True, exist_ok=True)
        (headers / name).touch()
    monkeypatch.setattr(build.toolchain, "system_nvcc", lambda: (None, "no nvcc was found"))
    monkeypatch.setattr(build, "wheel_folders", lambda: [tmp_path / "nvidia"])
    assert build.cuda_include() == headers
    (headers / "nv" / "target").unlink()
    with pytest.raises(SystemExit, match=r"CUDA's headers were not found: pip install 'nvidia-cuda-runtime"):
        build.cuda_include()
