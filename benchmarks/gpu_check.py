"""Whether a result is right, before it is timed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu_contenders import Inputs
from benchmarks.gpu_shapes import GpuWork
from sparseops.ops import REGISTRY
from sparseops.testing import Expected, assert_close, expect

ELEMENTS_AT_ONCE = 1 << 25  # of an output: the reference is in float64
ROUGHLY = 0.02  # what a peer, whose sums may be rounded on the way, may be off by its norm

Parts = list[tuple[slice, Expected]]


@contextmanager
def judging(poison: bool) -> Iterator[None]:
    """Torch's own products sum in full precision, and nothing searches for algorithms. poison: memory that
    nobody wrote is NaN."""
    matmul = torch.backends.cuda.matmul
    before = (
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )

    def switch(half: bool, bf16: bool, search: bool, deterministic: bool, fill: bool) -> None:
        matmul.allow_fp16_reduced_precision_reduction = half
        matmul.allow_bf16_reduced_precision_reduction = bf16
        torch.backends.cudnn.benchmark = search
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = fill

    switch(False, False, False, poison, poison)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        switch(*before)


def outputs(work: GpuWork, data: Inputs) -> int:
    """How many elements the layer gives."""
    return work.layer.flops // (2 * data.dense[0].numel())


def expected_parts(work: GpuWork, data: Inputs) -> Parts:
    """What to expect of an output, in parts along its first dimension."""
    op, count = REGISTRY[work.op], data.x.shape[0]
    step = max(1, ELEMENTS_AT_ONCE * count // outputs(work, data))
    return [
        (slice(start, start + step), expect(op, (data.x[start : start + step], *data.args[1:]), data.options))
        for start in range(0, count, step)
    ]


def off(y: Tensor, expected: Expected) -> str | None:
    """What is wrong with a result by the tests' rule, None if nothing is. Where torch's result is no
    yardstick, a rounded exact one is."""
    try:
        assert_close(y, expected)
    except ValueError:
        return off(y, replace(expected, plain=expected.exact.to(expected.plain.dtype)))
    except AssertionError as error:
        return str(error)
    return None


def fault(y: Tensor, parts: Parts, strict: bool) -> str | None:
    """What is wrong with a whole result: by the tests' rule, or only roughly."""
    if y.shape[0] != sum(expected.exact.shape[0] for _, expected in parts):
        return f"{y.shape[0]} rows"
    for part, expected in parts:
        if strict:
            if wrong := off(y[part], expected):
                return wrong
        else:
            error = (y[part].double() - expected.exact).norm() / expected.exact.norm()
            if not error <= ROUGHLY:
                return f"off by {float(error):.2g} of its norm"
    return None
