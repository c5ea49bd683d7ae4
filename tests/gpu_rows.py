"""A row of the GPU benchmarks' results, made up: what several tests share."""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.append(
    str(Path(__file__).resolve().parent.parent)
)  # behind everything else, as in test_benchmarks.py

from benchmarks.gpu_results import GpuRow  # noqa: E402


def a_row(**changes: object) -> GpuRow:
    row = GpuRow(
        date="2999-01-01T00:00Z",
        commit="abc",
        machine="a GPU",
        driver="1",
        cuda="13.0",
        torch="2",
        sparseops="0",
        archs="90a",
        sm_mhz=1980,
        op="nm24_linear",
        work="16x4096->14336",
        source="a model",
        dtype="bf16",
        contender="sparseops",
        plan="small/4",
        picked=1,
        status="ok",
        rounds=31,
        ms=0.5,
        p20=0.4,
        p80=0.6,
        host_ms=0.02,
        floor_ms=0.002,
        ratio=1.5,
        tflops=100.0,
        gbs=2000.0,
    )
    return replace(row, **changes)
