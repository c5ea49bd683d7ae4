"""What gpu.sh does on a GPU of compute capability 9.0 alone, on machines without one: the loop of products,
clock and power, and the page with the ladder.

Where a GPU would have to answer, something written here does; no number in this file is a measurement.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import program
from emulator import build, needs_emulator, run_build
from gpu_rows import a_row

TREE = Path(__file__).resolve().parent.parent
sys.path.append(str(TREE))  # behind everything else, as in test_benchmarks.py

from benchmarks import (  # noqa: E402
    gpu_ceiling,
    gpu_ladder,
    gpu_meter,
    gpu_power,
    gpu_results,
    gpu_shapes,
    gpu_summary,
    gpu_table,
)
from benchmarks.gpu_results import Ceiling, Power, PowerReading  # noqa: E402
from benchmarks.shapes import Linear  # noqa: E402

# ---- the loop of products

HEAD = "form,features,tokens,consumers,cluster,halves,clocks,slowest,wrong"
PRINTED = f"""{HEAD}
SS,128,256,2,0,4000,144.00,144.10,0
SS,128,256,2,2,4000,224.00,230.00,0
RS,256,128,2,0,4000,64.00,64.00,7
SS,192,192,3,0,40"""


@pytest.mark.parametrize(
    ("form", "features", "tokens", "alone", "free", "shared"),
    [
        ("SS", 128, 256, 128 / 144, 128 / 144, 512 / 896),
        ("RS", 128, 256, 1.0, 1.0, 512 / 768),
        ("SS", 128, 128, 0.8, 0.8, 256 / 512),
        ("RS", 192, 192, 1.0, 1.0, 0.75),
        ("RS", 256, 128, 1.0, 1.0, 0.8),
    ],
)
def test_models(form: str, features: int, tokens: int, alone: float, free: float, shared: float) -> None:
    assert gpu_ceiling.models(form, features, tokens, fills=False) == pytest.approx((alone, alone))
    assert gpu_ceiling.models(form, features, tokens, fills=True) == pytest.approx((free, shared))


def test_what_the_loop_printed_is_read_also_when_cut_short() -> None:
    rows = gpu_ceiling.rows(PRINTED)
    assert [(row.form, row.features, row.cluster, row.wrong) for row in rows] == [
        ("SS", 128, 0, 0),
        ("SS", 128, 2, 0),
        ("RS", 256, 0, 7),
    ]
    assert rows[0] == Ceiling("SS", 128, 256, 2, 0, 144.0, 144.1, 0, 0.889, 0.889, 0.889)
    assert (rows[1].peak, rows[1].if_free, rows[1].if_shared) == (0.571, 0.889, 0.571)
    assert gpu_ceiling.rows("") == []


# nvcc makes a program that prints what the scene says, or says something itself
FAKE_NVCC = """
while [[ $1 != -o ]]; do shift; done
case $SCENE in
  no_build) echo "error: no"; exit 1 ;;
  slow) echo "ptxas info : (C7510) Potential Performance Loss" ;;
esac
cp "$PRINTS" "$2"; chmod +x "$2"
"""


def ceiling(
    folder: Path, monkeypatch: pytest.MonkeyPatch, scene: str, prints: str, seconds: float = 60
) -> int:
    program(folder, "bin/nvcc", FAKE_NVCC)
    monkeypatch.setenv("PATH", f"{folder}/bin:/usr/bin:/bin")
    monkeypatch.setenv("SCENE", scene)
    monkeypatch.setenv("PRINTS", str(program(folder, "prints", prints)))
    return gpu_ceiling.main(["--out", str(folder), "--until", str(time.time() + seconds)])


def test_ceilings_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = PRINTED.replace(",7\n", ",0\n").rpartition("\n")[0]
    assert ceiling(tmp_path, monkeypatch, "fine", f"echo '{right}'") == 0
    assert gpu_results.read(Ceiling, tmp_path / "ceilings.csv") == gpu_ceiling.rows(right)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "SS 128x256  cluster 0:  144.00 clocks, 0.889 of the peak (models 0.889 to 0.889)"
    assert said[-1] == "3 cases, 0 with wrong sums"
    assert ceiling(tmp_path, monkeypatch, "fine", f"echo '{PRINTED}'") == 1
    assert len(gpu_results.read(Ceiling, tmp_path / "ceilings.csv")) == 3  # anew
    assert capsys.readouterr().out.splitlines()[-1] == "3 cases, 1 with wrong sums"


@pytest.mark.parametrize(
    ("scene", "prints", "said"),
    [
        ("no_build", "", "nvcc failed"),
        ("slow", "", "ptxas makes the products wait: (C7510)"),
        (
            "fine",
            f"echo {HEAD}; echo >&2 'wgmma_ceiling: no GPU'; exit 2",
            "0 cases, 0 with wrong sums; wgmma",
        ),
        (
            "fine",
            f"echo '{HEAD}\nSS,128,256,2,0,9,144,144,0'; exec sleep 60",
            "1 cases, 0 with wrong sums; it hung",
        ),
        ("fine", "exit 7", "0 cases, 0 with wrong sums; it ended with status 7"),
    ],
)
def test_a_loop_that_fails_or_hangs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    scene: str,
    prints: str,
    said: str,
) -> None:
    assert ceiling(tmp_path, monkeypatch, scene, prints, seconds=0) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith(said)


@needs_emulator
def test_the_loop_sums_right_on_the_emulator() -> None:
    built = run_build("plain", "wgmma_ceiling")
    assert built.returncode == 0, built.stdout + built.stderr
    command = [str(build.program("plain", "wgmma_ceiling")), "9", "4"]
    environment = {**os.environ, "EMU_CAPABILITY": "9.0"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr
    rows = gpu_ceiling.rows(result.stdout)
    assert len(rows) == 25 and not any(row.wrong for row in rows)
    assert {(row.form, row.consumers, row.cluster > 0) for row in rows} == {
        (form, consumers, fills) for form in ("SS", "RS") for consumers in (2, 3) for fills in (False, True)
    }


# ---- clock and power

# The driver's library, as far as it is asked: 1980 MHz, 650.5 W, a joule more each time.
FAKE_NVML = """
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void** gpu) { *gpu = (void*)0x123456789ab; return index; }
static int known(void* gpu) { return gpu == (void*)0x123456789ab ? 0 : 2; }
int nvmlDeviceGetClockInfo(void* gpu, int type, unsigned* mhz) { *mhz = 1979 + type; return known(gpu); }
int nvmlDeviceGetPowerUsage(void* gpu, unsigned* mw) { *mw = 650500; return known(gpu); }
int nvmlDeviceGetTotalEnergyConsumption(void* gpu, unsigned long long* mj) {
  static unsigned long long now = 5000000000000ull;
  *mj = now += 1000;
  return known(gpu);
}
"""


def test_the_drivers_library_is_asked(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("needs g++")
    (tmp_path / "nvml.c").write_text(FAKE_NVML)
    library = str(tmp_path / "libnvidia-ml.so.1")
    command = [compiler, "-x", "c", "-shared", "-fPIC", "-o", library, str(tmp_path / "nvml.c")]
    subprocess.run(command, check=True)
    nvml = gpu_meter.Nvml(library)
    assert nvml.read() == (1980, 650.5, 5000000001.0, "")
    with gpu_meter.Log("cublas", nvml) as log:
        time.sleep(5 * gpu_meter.PERIOD_SECONDS)
    assert len(log.readings) >= 3 and {r.sm_mhz for r in log.readings} == {1980}
    seconds = [reading.seconds for reading in log.readings]
    assert seconds == sorted(seconds) and seconds[-1] >= 4 * gpu_meter.PERIOD_SECONDS
    joules = [reading.joules for reading in log.readings]
    assert joules == [joules[0] + i for i in range(len(joules))]


def test_nvidia_smi_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: (_ for _ in ()).throw(OSError("no such library")))
    program(tmp_path, "nvidia-smi", 'echo "1755, 349.12, 0x0000000000000004"')
    found = gpu_meter.meter(dry_run=False)
    assert found.read() == (1755, 349.12, None, "0x0000000000000004")
    program(tmp_path, "nvidia-smi", "echo '[N/A], [N/A], [N/A]'")
    assert found.read()[:3] == (None, None, None)
    assert gpu_meter.meter(dry_run=True).read() == (None, None, None, "")


class FakeGpu:
    """Marks of a GPU on which every call takes 2 ms, and a meter that counts 600 W."""

    def __init__(self) -> None:
        self.now, self.calls, self.log = 0.0, 0, []

    def call(self) -> None:
        self.now, self.calls = self.now + 2.0, self.calls + 1

    def delay(self) -> None:
        self.log.append("delay")

    def mark(self) -> float:
        self.log.append("mark")
        return self.now

    def wait(self, mark: float) -> None:
        pass

    def ms(self, start: float, end: float) -> float:
        return end - start

    def mhz(self) -> int:
        return 1900

    def read(self) -> tuple[int, float, float, str]:
        return 1500, 600.0, self.now * 0.6, "0x4"


WORK = gpu_shapes.GpuWork(Linear(8192, 8192, 8192), "square", torch.bfloat16)


def fake_bench(gpu: FakeGpu) -> gpu_power.Bench:
    lengths = gpu_power.Lengths(sustained=0.2, settled=0.01, rest=0.0)
    return gpu_power.Bench(WORK, gpu, gpu, lengths, multiprocessors=132)


def contender(name: str, plan: str = "") -> gpu_power.Contender:
    return gpu_power.Contender(name, lambda: lambda: None, plan)


def test_a_moment_is_at_most_ten_milliseconds() -> None:
    gpu = FakeGpu()
    row = fake_bench(gpu).moment(contender("sparseops", "sm90_128x256/1/2"), gpu.call)
    assert row.calls * row.ms <= 10 and gpu.calls == 4 + 3 * 5
    assert gpu.log[-3:] == ["delay", "mark", "mark"]
    tflops = WORK.layer.flops / 2e-3 / 1e12
    assert (row.run, row.ms, row.sm_mhz) == ("short", 2.0, 1900) and row.tflops == pytest.approx(
        tflops, abs=0.1
    )
    assert row.peak == pytest.approx(tflops * 1e12 / (132 * 8192 * 1.9e9), abs=1e-3) and row.joules is None
    dense = fake_bench(gpu).moment(contender("cublas"), gpu.call)
    assert dense.peak == pytest.approx(2 * row.peak, abs=2e-3)


def test_a_sustained_run_has_clock_power_and_energy() -> None:
    gpu = FakeGpu()
    row, readings = fake_bench(gpu).sustained(contender("cublas"), gpu.call, 2.0)
    assert row.calls == gpu.calls and row.calls % 20 == 0 and row.ms == 2.0
    assert (row.run, row.sm_mhz, row.watts) == ("sustained", 1500, 600.0)
    assert row.joules == pytest.approx(gpu.now * 0.6, rel=0.01)
    assert row.pj_per_flop == pytest.approx(2.0 * 0.6 / WORK.layer.flops * 1e12, rel=0.01)
    assert readings[0].seconds < readings[-1].seconds and {r.limits for r in readings} == {"0x4"}


def test_the_best_plan_that_was_measured_is_run() -> None:
    common = {"work": "8192x8192->8192", "dtype": "bf16"}
    rows = [
        a_row(**common, plan="sm90_128x256/1", ms=1.2),
        a_row(**common, plan="sm90_128x256/1/2", ms=1.1, picked=0),
        a_row(**common, plan="sm90_192x192/1", ms=0.9, picked=0, status="wrong: x"),
        a_row(**common, contender="cublas", plan="", ms=0.5),
        a_row(work="4096x4096->4096", plan="large/1", ms=0.1),
    ]
    assert gpu_power.best_plan(rows, WORK) == "sm90_128x256/1/2"
    assert gpu_power.best_plan(rows[3:], WORK) == ""


def test_power_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_power.main(["--out", str(tmp_path), "--dry-run"]) == 0
    rows = gpu_results.read(Power, tmp_path / "power.csv")
    assert [(row.contender, row.run) for row in rows] == [
        ("cublas", "short"),
        ("cublas", "sustained"),
        ("sparseops", "short"),
        ("sparseops", "sustained"),
    ]
    assert all(row.ms > 0 and row.sm_mhz is None for row in rows)
    log = gpu_results.read(PowerReading, tmp_path / "power_log.csv")
    assert {reading.contender for reading in log} == {"cublas", "sparseops"}
    said = capsys.readouterr().out
    assert "cusparselt : " in said and "TFLOP/s for a moment and for seconds: cublas" in said.splitlines()[-1]
    assert gpu_power.main(["--out", str(tmp_path), "--dry-run", "--until", "1"]) == 1
    assert gpu_results.read(Power, tmp_path / "power.csv") == []


# ---- the page


def sm90_run(**changes: object) -> gpu_ladder.Run:
    square = {"work": "8192x8192->8192", "dtype": "bf16"}
    rows = [
        a_row(**square, contender="cublas", plan="", picked=0, ms=1.4, tflops=785.0, ratio=1.0),
        a_row(**square, plan="sm90_128x256/1/2", ms=1.1, tflops=1000.0, ratio=1.273),
        a_row(**square, plan="sm90_128x256/1", picked=0, ms=1.2, tflops=916.0, ratio=1.167),
        a_row(**square, plan="sm90_128x128/1", picked=0, ms=None, ratio=None, status="wrong: 7 of 9"),
        a_row(**square, contender="cusparselt", plan="", picked=0, ms=1.15, tflops=956.0, ratio=1.217),
        a_row(work="64x4096->4096", plan="sm90_128x64/4", ratio=1.1),
        a_row(work="256x18944->3584", plan="sm90_128x64/4", ratio=1.4),
        a_row(work="64x4096->14336", plan="sm90_128x64/4", ratio=9.0),
        a_row(op="nm24_conv", work="3x3 32x256@14->256", dtype="f16", plan="sm90_128x128/1", ratio=1.35),
        a_row(op="nm24_conv", work="3x3 32x128@28->128", dtype="f16", plan="sm90_128x128/1", ratio=0.5),
        a_row(op="nm24_conv", work="1x1 32x256@14->1024", dtype="f16", plan="sm90_128x128/1", ratio=0.5),
    ]
    power = [
        Power("cublas", "", "short", 6, 1.4, 785.0, 1890, None, None, None, 0.77),
        Power(
            "sparseops", "sm90_128x256/1/2", "sustained", 2000, 1.2, 916.0, 1560, 690.0, 1700.0, 0.71, 0.54
        ),
    ]
    found = gpu_ladder.Run("NVIDIA H999", "abc", rows, gpu_ceiling.rows(PRINTED), power)
    return replace(found, **changes)


def test_the_ladder_without_a_run_says_so() -> None:
    lines = gpu_ladder.markdown([]).splitlines()
    assert len(lines) == 2 + len(gpu_ladder.LADDER)
    assert all(line.endswith("| never run on hardware |") for line in lines[2:])


def test_the_ladder_has_what_a_run_says() -> None:
    text = gpu_ladder.markdown([sm90_run(commit="old"), sm90_run()])
    assert "| step | prediction | NVIDIA H999, `abc` |" in text and "old" not in text
    cells = [[cell.strip("| ") for cell in line.split(" | ")] for line in text.splitlines()]
    found = {first: last for first, *_, last in filter(lambda line: len(line) > 1, cells)}
    assert found["128x256"] == "916, 1.17x (`sm90_128x256/1`)"
    assert found["128x256, clusters of two"] == "1000, 1.27x (`sm90_128x256/1/2`)"
    assert found["`wgmma.sp`, 128x128"] == "**wrong in 1 of 1 plans**"
    assert found["the best of all"] == "**wrong in 1 of 3 plans**"
    assert found["192x192"] == "not measured"
    assert found["64 and 256 tokens, 3584 to 4608 outputs"] == "1.25x (1.10 to 1.40, 2 layers)"
    assert found["3x3 convolutions, 256 channels and more"] == "1.35x (1.35 to 1.35, 1 layers)"
    assert "| SS | 128x256 | 2 | clusters of 2 | 224.0 | 0.571 | 0.889 | 0.571 |" in text
    assert "| RS | 256x128 | 2 | none | 64.0 | **wrong sums** | 1.000 | 1.000 |" in text
    assert "| cublas |  | short | 785 | 1890 | 0.77 |  |  |" in text
    assert "| sparseops | sm90_128x256/1/2 | sustained | 916 | 1560 | 0.54 | 690 | 0.71 |" in text
    assert "| 8192x8192->8192 | 1.27 | 1.27 | 1.22 | `sm90_128x256/1/2` |" in text


def test_only_runs_on_such_a_gpu_are_on_the_page(tmp_path: Path) -> None:
    facts = {"machine": "NVIDIA H999", "commit": "abc", "capability": "9.0"}
    (tmp_path / "environment.json").write_text(json.dumps(facts))
    run = sm90_run()
    for name, rows in (("layers", run.rows), ("ceilings", run.ceilings), ("power", run.power)):
        gpu_results.append(tmp_path / f"{name}.csv", rows)
    assert gpu_ladder.load(tmp_path) == run
    (tmp_path / "environment.json").write_text(json.dumps({**facts, "capability": "8.0"}))
    assert gpu_ladder.load(tmp_path) is None


def test_steps_are_of_tiles_that_there_are() -> None:
    for tile in (*gpu_ladder.SS_TILES, *gpu_ladder.RS_TILES):
        assert tile in gpu_table.TILES["nm24_linear"]


def test_summary_has_ceilings_and_power() -> None:
    run = sm90_run()
    assert gpu_summary.ceiling_lines(run.ceilings) == [
        "wgmma.sp SS, of the peak: 128x256 0.89/0.57",
        "wgmma.sp RS, of the peak: 256x128 WRONG",
    ]
    assert gpu_summary.power_lines(run.power) == [
        "power: cublas 785 at 1890 MHz, sparseops 916 at 1560 MHz 0.71 pJ"
    ]
    assert gpu_summary.ceiling_lines([]) == gpu_summary.power_lines([]) == []
