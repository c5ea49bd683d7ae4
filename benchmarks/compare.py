"""Dense and sparse, side by side: one process, the same thread count, alternating runs, medians.

A result is checked before it is timed: a wrong one raises instead of giving a number.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import Conv, Linear, Work
from sparseops.formats import NM24
from sparseops.ops import REGISTRY
from sparseops.testing import assert_close, expect

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
SHORTEST_SAMPLE_MS = 5.0
Key = TypeVar("Key")
Call = Callable[[], Tensor]
Contenders = Mapping[tuple[str, str], Call]
"""(dense or sparse, memory format) -> the call to time."""


class WrongResult(Exception):
    """An op gave a wrong result, so its time means nothing."""


@dataclass(frozen=True)
class Times:
    """Milliseconds per call of one contender: quantiles over the rounds."""

    memory_format: str
    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class Comparison:
    """Both sides in their faster memory format."""

    dense: Times
    sparse: Times

    @property
    def ratio(self) -> float:
        """Dense median over sparse median."""
        return self.dense.p50 / self.sparse.p50


def contenders(work: Work) -> Contenders:
    """The dense peer and the sparse op of ``work`` on random data, in every memory format the layer has.

    Raises WrongResult unless every element of every sparse result is right, by ``sparseops.testing``'s rule.
    """
    torch.manual_seed(0)
    if isinstance(work.layer, Linear):
        return _linear(work.layer, work.dtype)
    return _conv(work.layer, work.dtype)


def _weight(shape: tuple[int, ...], dtype: torch.dtype) -> NM24:
    fan_in = torch.Size(shape[1:]).numel()
    return NM24.from_dense((torch.randn(shape) * (2 / fan_in) ** 0.5).to(dtype), prune="magnitude")


def _linear(layer: Linear, dtype: torch.dtype) -> Contenders:
    x = torch.randn(layer.tokens, layer.inputs).to(dtype)
    packed = _weight((layer.outputs, layer.inputs), dtype)
    w = packed.to_dense()
    op = REGISTRY["nm24_linear"]
    calls = {
        ("dense", ""): lambda: F.linear(x, w),
        ("sparse", ""): lambda: op.fn(x, packed.values, packed.meta),
    }
    _check(layer, {}, x, packed, [calls["sparse", ""]])
    return calls


def _conv(layer: Conv, dtype: torch.dtype) -> Contenders:
    packed = _weight((layer.outputs, layer.channels, layer.kernel, layer.kernel), dtype)
    x = torch.randn(layer.batch, layer.channels, layer.side, layer.side).to(dtype)
    options = {"kernel_size": layer.kernel, "padding": layer.kernel // 2}
    op = REGISTRY["nm24_conv"]
    calls: dict[tuple[str, str], Call] = {}
    for name, layout in LAYOUTS.items():
        x_laid, w_laid = (t.contiguous(memory_format=layout) for t in (x, packed.to_dense()))

        def dense(x: Tensor = x_laid, w: Tensor = w_laid) -> Tensor:
            return F.conv2d(x, w, padding=layer.kernel // 2)

        def sparse(x: Tensor = x_laid) -> Tensor:
            return op.fn(x, packed.values, packed.meta, **options)

        calls["dense", name], calls["sparse", name] = dense, sparse
    _check(layer, options, x, packed, [call for key, call in calls.items() if key[0] == "sparse"])
    return calls


def _check(layer: Linear | Conv, options: dict[str, int], x: Tensor, packed: NM24, calls: list[Call]) -> None:
    expected = expect(REGISTRY[layer.op], (x, packed.values, packed.meta), options)
    for call in calls:
        try:
            assert_close(call(), expected)
        except AssertionError as error:
            raise WrongResult(f"{layer.op} {layer.name}: {error}") from None


def alternate(calls: Mapping[Key, Call], rounds: int) -> dict[Key, list[float]]:
    """Milliseconds per call: ``rounds`` samples of each, in turn, so that a busy machine is equally unfair.

    A sample is one call, or several in a row where one is shorter than SHORTEST_SAMPLE_MS.
    """
    repeats = {}
    for key, call in calls.items():
        call()
        repeats[key] = max(1, math.ceil(SHORTEST_SAMPLE_MS / _sample(call, 1)))
    samples: dict[Key, list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            samples[key].append(_sample(call, repeats[key]))
    return samples


def _sample(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) * 1e3 / repeats


def compare(work: Work, rounds: int) -> Comparison:
    """Checks and times ``work`` with the threads torch has now. Raises WrongResult as ``contenders`` does."""
    with torch.inference_mode():
        samples = alternate(contenders(work), rounds)
    sides = {}
    for side in ("dense", "sparse"):
        options = [times(key[1], sample) for key, sample in samples.items() if key[0] == side]
        sides[side] = min(options, key=lambda option: option.p50)
    return Comparison(**sides)


def times(memory_format: str, sample: Sequence[float]) -> Times:
    """Quantiles of milliseconds."""
    tenths = statistics.quantiles(sample, n=10, method="inclusive") if len(sample) > 1 else [*sample] * 9
    return Times(memory_format, tenths[1], statistics.median(sample), tenths[7])
