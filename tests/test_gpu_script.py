"""benchmarks/gpu.sh with programs that stand for Python, nvcc, compute-sanitizer and nvidia-smi."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import program

TREE = Path(__file__).resolve().parent.parent
sys.path.append(str(TREE))  # behind everything else, as in test_benchmarks.py

from benchmarks import (  # noqa: E402
    gpu_results,
    gpu_shapes,
    gpu_table,
)
from benchmarks.gpu_results import GpuRow, OpTests, Power, Stage  # noqa: E402

TINY = gpu_shapes.tiny_works("nm24_linear")[0]
CPU = torch.device("cpu")


# ---- the script

SCRIPT = TREE / "benchmarks" / "gpu.sh"

# Python in the place of Python: notes what it is asked, and passes on what needs no GPU.
FAKE_PYTHON = """
echo "$* | $TORCH_CUDA_ARCH_LIST$SPARSEOPS_IMPL" >>"$CALLS"
capability=9.0
[[ $SCENE != ampere ]] || capability=8.0
case "$*" in
  "-m benchmarks.gpu_machine --arch") [[ $SCENE == ampere ]] && echo 8.0 || echo 9.0a ;;
  "-m benchmarks.gpu_machine "*)
    printf '{\n "machine": "made up",\n "capability": "%s"\n}\n' $capability >"$OUT/environment.json"
    echo "a GPU" ;;
  setup.py*) [[ $SCENE != no_build ]] || { echo "nvcc died"; exit 1; } ;;
  "-m pytest "*triton*) echo "tests/test_triton_channels.py::test_channel_conv_cases[x] PASSED [ 50%]" ;;
  "-m pytest "*)
    echo "tests/test_ops.py::test_cuda[nm24_conv-x] PASSED [ 50%]"
    [[ $SCENE != slow ]] || sleep 60
    [[ $SCENE != red ]] || { echo "tests/test_ops.py::test_cuda[nm24_conv-y] FAILED [99%]"; exit 1; } ;;
  "-m benchmarks.gpu_run "*) echo "rows of $3" ;;
  "-m benchmarks.gpu_ceiling "*) echo "some cases" ;;
  "-m benchmarks.gpu_power "*) echo "some watts" ;;
  "-m benchmarks.gpu_small_set "*) echo "small set" ;;
  *) exec "$REAL_PYTHON" "$@" ;;
esac
"""


def run_script(folder: Path, scene: str, **variables: str) -> tuple[int, dict[str, Stage], list[str], str]:
    """The exit status, the stages, what Python was asked, and what was printed."""
    out = folder / "out"
    program(folder, "bin/python", FAKE_PYTHON)
    program(
        folder,
        "bin/compute-sanitizer",
        'echo "sanitizer $* | $PYTORCH_NO_CUDA_MEMORY_CACHING" >>"$CALLS"\n'
        'while [[ $1 != *python ]]; do shift; done; "$@"; echo "========= ERROR SUMMARY: 0 errors"',
    )
    # nvcc makes a program that records a line, unless the scene says that it cannot
    program(
        folder,
        "bin/nvcc",
        'echo "nvcc $*" >>"$CALLS"\n'
        "while [[ $1 != -o ]]; do shift; done; [[ $SCENE != no_nvcc ]] || exit 1\n"
        'printf "#!/bin/bash\\necho $SCENE \\$1; [[ $SCENE != no_record ]]\\n" >"$2"; chmod +x "$2"',
    )
    environment = {
        "PATH": f"{folder}/bin:/usr/bin:/bin",
        "HOME": str(folder),
        "OUT": str(out),
        "PYTHON": str(folder / "bin" / "python"),
        "REAL_PYTHON": sys.executable,
        "CALLS": str(folder / "calls"),
        "SCENE": scene,
        **variables,
    }
    answer = subprocess.run(
        ["bash", str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=300
    )
    stages = {stage.stage: stage for stage in gpu_results.read(Stage, out / "stages.csv")}
    calls = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return answer.returncode, stages, calls, answer.stdout + answer.stderr


STAGES = [
    "environment",
    "build",
    "tests",
    "conformance",
    "ceiling",
    "sweep",
    "power",
    "nm24_linear",
    "nm24_linear_i8",
    "nm24_linear_f8",
    "nm24_conv",
    "channel_conv",
    "channel_linear",
    "triton_tests",
    "memcheck",
    "racecheck",
    "summary",
]


def test_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_script_runs_its_stages_in_order(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "layers.csv").write_text("from an earlier run")
    before = time.time()
    status, stages, calls, printed = run_script(tmp_path, "fine")
    assert status == 0, printed
    assert list(stages) == STAGES and {stage.status for stage in stages.values()} == {"ok"}
    assert not (tmp_path / "out" / "layers.csv").exists()
    assert any(call.startswith("setup.py") and call.endswith("build_ext --inplace | 9.0a") for call in calls)
    tests, by_triton = [call for call in calls if call.startswith("-m pytest ")]
    assert " -m cuda " in tests and " -v " in tests and "tests |" in tests
    assert "test_triton_channels.py" in by_triton and by_triton.endswith("| triton")
    assert stages["tests"].note == "1 passed, 0 failed, 0 skipped"
    assert stages["triton_tests"].note == "2 passed, 0 failed, 0 skipped"  # of both
    both = [OpTests("channel_conv", 1, 0, 0), OpTests("nm24_conv", 1, 0, 0)]
    assert gpu_results.read(OpTests, tmp_path / "out" / "tests.csv") == both
    (compiled,) = [call for call in calls if call.startswith("nvcc ")]
    assert "-gencode arch=compute_90a,code=sm_90a" in compiled and "conformance.cu" in compiled
    asked = [f"gpu_run {op} --out" for op in gpu_shapes.WORKS]
    for what in (*asked, "gpu_ceiling --out", "gpu_run nm24_linear --sweep --out", "gpu_power --out"):
        (call,) = [call for call in calls if f"{what} " in call]
        until = float(call.split("--until ")[1].split()[0])
        assert before < until < before + 540
    memcheck, racecheck = (call for call in calls if call.startswith("sanitizer"))
    assert "--tool memcheck" in memcheck and memcheck.endswith("| 1") and "kns=nm24" in memcheck
    assert "--tool racecheck" in racecheck and "--error-exitcode" in racecheck
    assert stages["memcheck"].note == "========= ERROR SUMMARY: 0 errors"
    assert printed.rstrip().endswith((tmp_path / "out" / "summary.txt").read_text().rstrip())
    assert "rows of nm24_conv" in (tmp_path / "out" / "log.txt").read_text()
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert files == [
        "conformance.txt",
        "environment.json",
        "log.txt",
        "stages.csv",
        "summary.txt",
        "tests.csv",
    ]
    assert (tmp_path / "out" / "conformance.txt").read_text() == "fine record\n"
    assert stages["conformance"].note == "1 lines"


@pytest.mark.parametrize("scene", ["no_nvcc", "no_record"])
def test_script_without_a_recording(tmp_path: Path, scene: str) -> None:
    status, stages, _, _ = run_script(tmp_path, scene)
    assert status == 1 and stages["conformance"].status == "failed" and stages["nm24_conv"].status == "ok"
    assert not (tmp_path / "out" / "conformance.txt").exists()


def test_script_without_a_build(tmp_path: Path) -> None:
    status, stages, calls, printed = run_script(tmp_path, "no_build")
    assert status == 1 and stages["build"].status == "failed" and "nvcc died" in printed
    alone = {"conformance", "ceiling", "summary"}  # they need no build of ours
    assert {stages[name].status for name in alone} == {"ok"}
    others = set(STAGES[2:]) - alone
    assert {stages[name].status for name in others} == {"not run"}
    assert not any("gpu_run" in call for call in calls)


def test_script_on_another_gpu(tmp_path: Path) -> None:
    """What is for compute capability 9.0 alone is not run elsewhere, and nobody is to blame."""
    status, stages, calls, printed = run_script(tmp_path, "ampere")
    assert status == 0, printed
    skipped = {name: stage for name, stage in stages.items() if stage.status == "not run"}
    assert list(skipped) == ["ceiling", "sweep", "power", "nm24_linear_f8"]
    assert {(stage.seconds, stage.note) for stage in skipped.values()} == {(0, "not for this GPU")}
    assert {stage.status for name, stage in stages.items() if name not in skipped} == {"ok"}
    assert not any("--sweep" in call or "gpu_ceiling" in call or "gpu_power" in call for call in calls)
    (compiled,) = [call for call in calls if call.startswith("nvcc ")]
    assert "-gencode arch=compute_80,code=sm_80" in compiled


def test_script_goes_on_after_a_red_test(tmp_path: Path) -> None:
    status, stages, _, printed = run_script(tmp_path, "red")
    assert status == 1 and stages["tests"].status == "failed"
    assert stages["tests"].note == "1 passed, 1 failed, 0 skipped" and "nm24_conv-y] FAILED" in printed
    assert {stages[name].status for name in STAGES[3:]} == {"ok"}


def test_script_cuts_what_does_not_fit(tmp_path: Path) -> None:
    start = time.time()
    status, stages, _, _ = run_script(tmp_path, "slow", LIMIT="40")
    assert time.time() - start < 40 and status == 1
    assert stages["tests"].status == "cut" and stages["tests"].note == "1 passed, 0 failed, 0 skipped"
    assert stages["nm24_linear"].status == "ok"
    assert "not run" in {stage.status for stage in stages.values()}
    (missed,) = {stage.note for stage in stages.values() if stage.status == "not run"}
    assert missed == "no time was left"


def test_script_on_the_cpu(tmp_path: Path) -> None:
    """All of it but the build, with the real Python."""
    sanitizer = '[[ $1 != --version ]] || exit 0; while [[ $1 != *python* ]]; do shift; done; exec "$@"'
    program(tmp_path, "bin/compute-sanitizer", sanitizer)
    kept = {name: os.environ[name] for name in ("SPARSEOPS_EMULATE", "LD_LIBRARY_PATH") if name in os.environ}
    environment = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "OUT": str(tmp_path / "out"),
        "PYTHON": sys.executable,
        "DRY_RUN": "1",
        **kept,
    }
    answer = subprocess.run(
        ["bash", str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=400
    )
    with (tmp_path / "out" / "stages.csv").open(newline="") as stream:
        stages = {line["stage"]: line["status"] for line in csv.DictReader(stream)}
    assert list(stages) == STAGES and set(stages.values()) == {"ok"}, answer.stdout + answer.stderr
    assert answer.returncode == 0
    rows = gpu_results.read(GpuRow, tmp_path / "out" / "layers.csv")
    assert {row.op for row in rows} == set(gpu_shapes.WORKS)
    assert gpu_results.read(Power, tmp_path / "out" / "power.csv")
    assert "stand-in for a GPU" in (tmp_path / "out" / "summary.txt").read_text()
    with pytest.raises(ValueError, match="run on a GPU"):
        gpu_table.keep(tmp_path / "out", tmp_path / "kept", tmp_path)
