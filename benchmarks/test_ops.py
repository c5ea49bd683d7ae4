"""``pytest benchmarks``: every op of the registry under pytest-benchmark, beside its dense peer or reference.

For numbers to report use ``python -m benchmarks.run``, which alternates dense and sparse runs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from benchmarks import isa
from benchmarks.compare import Contenders, contenders
from benchmarks.shapes import WORKS, Work
from sparseops.ops import REGISTRY

SIDES = [("dense", ""), ("sparse", "")]
LAID_OUT_SIDES = [(side, layout) for layout in ("NCHW", "channels_last") for side in ("dense", "sparse")]


@lru_cache(maxsize=1)
def _contenders(work: Work) -> Contenders:
    return contenders(work)


@pytest.mark.parametrize(
    ("work", "side"),
    [
        pytest.param(work, side, id="/".join(filter(None, (work.op, work.tag, work.name, *side))))
        for work in WORKS
        for side in (SIDES if work.op == "nm24_linear" else LAID_OUT_SIDES)
    ],
)
def test_work(benchmark: Callable[..., object], work: Work, side: tuple[str, str]) -> None:
    if work.isa and not isa.reaches(work.isa):
        pytest.skip(f"needs {work.isa}")
    call = _contenders(work)[side]
    benchmark.group = f"{work.op} {work.tag} {work.name}"  # type: ignore[attr-defined]
    with torch.inference_mode():
        benchmark(call)


@pytest.mark.parametrize("side", ["op", "reference"])
@pytest.mark.parametrize(
    ("op", "case"),
    [pytest.param(op, case, id=f"{op.name}/{case.name}") for op in REGISTRY.values() for case in op.cases],
)
def test_case(benchmark: Callable[..., object], op: object, case: object, side: str) -> None:
    call: Callable[..., Tensor] = op.fn if side == "op" else op.reference  # type: ignore[attr-defined]
    args, kwargs = case.make(torch.float32)  # type: ignore[attr-defined]
    benchmark.group = f"{op.name} case {case.name}"  # type: ignore[attr-defined]
    with torch.inference_mode():
        benchmark(call, *args, **kwargs)
