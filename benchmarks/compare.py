"""Dense and sparse, side by side: one process, the same thread count, alternating runs, medians.

A result is checked before it is timed: a wrong one raises instead of giving a number.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.shapes import Conv, Linear, Pruned, Work
from sparseops.formats import NM24
from sparseops.formats.channel_pruned import ChannelPruned, Keep
from sparseops.ops import REGISTRY
from sparseops.testing import assert_close, expect

LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
SHORTEST_SAMPLE_MS = 5.0
Key = TypeVar("Key")
Call = Callable[[], Tensor]
Contenders = Mapping[tuple[str, str], Call]
"""(dense, sparse or compact, memory format) -> the call to time. compact: what is left of a layer with pruned
channels, as a dense layer on an input of the kept channels alone."""


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
    """All sides in their faster memory format."""

    dense: Times
    sparse: Times
    compact: Times | None = None

    @property
    def ratio(self) -> float:
        """Dense median over sparse median."""
        return self.dense.p50 / self.sparse.p50


def contenders(work: Work) -> Contenders:
    """The dense peer and the sparse op of ``work`` on random data, in every memory format the layer has.

    Raises WrongResult unless every element of every sparse result is right, by ``sparseops.testing``'s rule.
    """
    torch.manual_seed(0)
    if isinstance(work.layer, Pruned):
        return _pruned(work.layer, work.dtype)
    if isinstance(work.layer, Linear):
        return _linear(work.layer, work.dtype)
    return _conv(work.layer, work.dtype)


def _dense_weight(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    fan_in = torch.Size(shape[1:]).numel()
    return (torch.randn(shape) * (2 / fan_in) ** 0.5).to(dtype)


def _weight(shape: tuple[int, ...], dtype: torch.dtype) -> NM24:
    return NM24.from_dense(_dense_weight(shape, dtype), prune="magnitude")


def _linear(layer: Linear, dtype: torch.dtype) -> Contenders:
    x = torch.randn(layer.tokens, layer.inputs).to(dtype)
    packed = _weight((layer.outputs, layer.inputs), dtype)
    w = packed.to_dense()
    op = REGISTRY["nm24_linear"]
    calls = {
        ("dense", ""): lambda: F.linear(x, w),
        ("sparse", ""): lambda: op.fn(x, packed.values, packed.meta),
    }
    _check(layer, (x, packed.values, packed.meta), {}, [calls["sparse", ""]])
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
    args = (x, packed.values, packed.meta)
    _check(layer, args, options, [call for key, call in calls.items() if key[0] == "sparse"])
    return calls


def kept_blocks(total: int, kept: int, block: int, generator: torch.Generator | None = None) -> Tensor:
    """``kept`` of ``total`` channels, ascending: whole blocks at random places.

    Raises ValueError when ``kept`` is not that many whole blocks.
    """
    if kept % block or total % block or not 0 < kept <= total:
        raise ValueError(f"kept_blocks: kept must be blocks of {block} out of {total}, got {kept}")
    device = "cpu" if generator is None else generator.device
    first = torch.randperm(total // block, generator=generator, device=device)[: kept // block]
    return (first.sort().values.unsqueeze(1) * block + torch.arange(block, device=device)).flatten()


def _pruned(pruned: Pruned, dtype: torch.dtype) -> Contenders:
    """The dense layer, whose weight has no zeros, the layer without some channels, and what is left of it as
    a dense layer."""
    layer, op = pruned.layer, REGISTRY[pruned.op]
    keep = Keep(
        kept_blocks(pruned.inputs, pruned.kept_inputs, pruned.block),
        kept_blocks(layer.outputs, pruned.kept_outputs, pruned.block),
    )
    options = {"outputs": layer.outputs}
    shape: tuple[int, ...]
    layouts: Mapping[str, torch.memory_format] = {"": torch.contiguous_format}
    product: Callable[..., Tensor] = F.linear
    if isinstance(layer, Linear):
        x, shape = torch.randn(layer.tokens, layer.inputs), (layer.outputs, layer.inputs)
    else:
        x = torch.randn(layer.batch, layer.channels, layer.side, layer.side)
        shape = (layer.outputs, layer.channels, layer.kernel, layer.kernel)
        options |= {"kernel_size": layer.kernel, "padding": layer.kernel // 2}
        layouts, product = LAYOUTS, partial(F.conv2d, padding=layer.kernel // 2)
    x, dense = x.to(dtype), _dense_weight(shape, dtype)
    packed = ChannelPruned.from_dense(dense, prune=keep)
    args = (packed.values, packed.in_index, packed.out_index)
    small_x, small_w = x.index_select(1, packed.in_index), packed.values.movedim(-1, 1)
    calls: dict[tuple[str, str], Call] = {}
    for name, layout in layouts.items():
        laid = [t.contiguous(memory_format=layout) for t in (x, dense, small_x, small_w)]
        calls["dense", name] = partial(product, laid[0], laid[1])
        calls["sparse", name] = partial(op.fn, laid[0], *args, **options)
        calls["compact", name] = partial(product, laid[2], laid[3])
    _check(pruned, (x, *args), options, [call for key, call in calls.items() if key[0] == "sparse"])
    return calls


def _check(
    layer: Linear | Conv | Pruned, args: tuple[Tensor, ...], options: dict[str, int], calls: list[Call]
) -> None:
    expected = expect(REGISTRY[layer.op], args, options)
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
    calls = contenders(work)  # not in inference mode, whose tensors have no version to know a weight by
    with torch.inference_mode():
        samples = alternate(calls, rounds)
    sides = {}
    for side in {key[0]: None for key in samples}:
        options = [times(key[1], sample) for key, sample in samples.items() if key[0] == side]
        sides[side] = min(options, key=lambda option: option.p50)
    return Comparison(**sides)


def times(memory_format: str, sample: Sequence[float]) -> Times:
    """Quantiles of milliseconds."""
    tenths = statistics.quantiles(sample, n=10, method="inclusive") if len(sample) > 1 else [*sample] * 9
    return Times(memory_format, tenths[1], statistics.median(sample), tenths[7])
