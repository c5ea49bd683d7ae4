"""What the weights of a layer are multiplied by in one call of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.rnn import PackedSequence

from sparseops.nn.recurrence import Packed

CHUNK = 1 << 24
"""Elements of the unfolded input of a convolution that exist at a time."""


def inputs_of(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """The names of the layer's weights in the layer, and what it multiplies each by when it is called with
    these arguments: its input, of a recurrent layer [elements, features] for each weight."""
    given = {**dict(zip(("input", "hx"), args, strict=False)), **kwargs}
    if isinstance(layer, nn.RNNBase):
        yield from _replay(layer, given["input"], given.get("hx"))
    else:
        yield "weight", given["input"]


def squares_of(layer: nn.Module, x: Tensor, output: Any) -> Tensor:
    """The sums of the squares of what each weight is multiplied by: [features] of a linear or recurrent
    layer, [input channels of all groups, *taps] of a convolution."""
    if not isinstance(layer, _ConvNd):
        return x.reshape(-1, x.shape[-1]).square().sum(0)
    dims = len(layer.kernel_size)
    # Padding and unfolding move numbers about, so that the batch can be summed first.
    total = _batched(x, dims).square().sum(0, keepdim=True)
    positions = tuple(range(2, 2 + dims))
    return _windows(layer, total, output).sum(positions)[0]


def columns_of(layer: nn.Module, x: Tensor, output: Any) -> Iterator[Tensor]:
    """The inputs of all outputs, [groups, K, outputs] in several parts: K = taps * input channels of a group,
    the channels fastest."""
    if not isinstance(layer, _ConvNd):
        yield x.reshape(-1, x.shape[-1]).t().unsqueeze(0)
        return
    dims = len(layer.kernel_size)
    windows = _windows(layer, _batched(x, dims), output)
    positions, taps = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
    for part in windows.split(max(1, CHUNK // max(1, math.prod(windows.shape[1:])))):
        by_group = part.unflatten(1, (layer.groups, -1)).permute(1, *taps, 2, 0, *positions)
        yield by_group.flatten(2 + dims).flatten(1, 1 + dims)


def _batched(x: Tensor, dims: int) -> Tensor:
    return x.unsqueeze(0) if x.ndim == dims + 1 else x


def _windows(layer: _ConvNd, x: Tensor, output: Tensor) -> Tensor:
    """[N, channels, *positions, *taps]: what the taps see at each position of the output, as a view of the
    padded x. Those of a transposed convolution come last position first."""
    dims = len(layer.kernel_size)
    spans = [
        dilation * (kernel - 1) for kernel, dilation in zip(layer.kernel_size, layer.dilation, strict=True)
    ]
    strides: tuple[int, ...] = layer.stride
    if layer.transposed:
        x = _spread(layer, x, spans, output.shape[-dims:])
        strides = (1,) * dims
    else:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    for axis, (span, stride, dilation) in enumerate(zip(spans, strides, layer.dilation, strict=True), 2):
        x = x.unfold(axis, span + 1, stride)[..., ::dilation]
    return x


def _spread(layer: _ConvNd, x: Tensor, spans: list[int], sizes: torch.Size) -> Tensor:
    """The input of the ordinary convolution with stride 1 that does what a transposed one does, backwards
    along each axis: that one would see the taps backwards, and which position is which does not matter."""
    spread = x.new_zeros(
        *x.shape[:2], *((n - 1) * stride + 1 for n, stride in zip(x.shape[2:], layer.stride, strict=True))
    )
    every: tuple[Any, ...] = (..., *(slice(None, None, stride) for stride in layer.stride))
    spread[every] = x
    pads: list[int] = []
    for axis in reversed(range(len(spans))):
        before = spans[axis] - int(layer.padding[axis])
        pads += [before, sizes[axis] + spans[axis] - before - spread.shape[2 + axis]]
    return F.pad(spread, pads).flip(tuple(range(2, x.ndim)))


# Recurrent layers


def _replay(rnn: nn.RNNBase, x: Tensor | PackedSequence, hx: Any) -> Iterator[tuple[str, Tensor]]:
    """Runs one direction of one layer after the other, in the weights' dtype and without dropout."""
    dtype: Any = rnn.weight_hh_l0.dtype
    order = None
    if isinstance(x, PackedSequence):
        sizes, order, data = x.batch_sizes, x.sorted_indices, x.data
    else:
        is_batched = x.ndim == 3
        x = (x.transpose(0, 1) if rnn.batch_first else x) if is_batched else x.unsqueeze(1)
        sizes, data = torch.full((x.shape[0],), x.shape[1], device="cpu"), x.flatten(0, 1)
        if hx is not None and not is_batched:
            hx = tuple(s.unsqueeze(1) for s in hx) if rnn.mode == "LSTM" else hx.unsqueeze(1)
    data, layout = data.to(dtype), Packed(sizes)
    state = _state(rnn, hx, order, data, layout.batch)
    ends = ("", "_reverse") if rnn.bidirectional else ("",)
    for layer in range(rnn.num_layers):
        outputs: list[Tensor] = []
        for end in ends:
            suffix, first = f"l{layer}{end}", [s[layer * len(ends) + len(outputs)] for s in state]
            own = layout.flip(data) if end else data
            yield f"weight_ih_{suffix}", own
            matrices = [f"weight_ih_{suffix}", f"weight_hh_{suffix}"]
            biases = [f"bias_ih_{suffix}", f"bias_hh_{suffix}"] if rnn.bias else []
            projection = [f"weight_hr_{suffix}"] if rnn.proj_size else []
            weights = [getattr(rnn, name) for name in (*matrices, *biases, *projection)]
            y = _run(rnn.mode, own, sizes, first, weights, rnn.bias)
            before = [first[0], *y.split(layout.sizes)]
            previous = torch.cat([h[:size] for h, size in zip(before, layout.sizes, strict=False)])
            yield f"weight_hh_{suffix}", previous
            if projection:
                # The units before they are projected: those of a layer that gets its own past as an input.
                both = [torch.cat(weights[:2], 1), weights[0].new_zeros(len(weights[0]), rnn.hidden_size)]
                start = [torch.zeros_like(first[1]), first[1]]
                seen = torch.cat([own, previous], 1)
                yield projection[0], _run(rnn.mode, seen, sizes, start, [*both, *weights[2:-1]], rnn.bias)
            outputs.append(layout.flip(y) if end else y)
        data = torch.cat(outputs, 1)


def _state(rnn: nn.RNNBase, hx: Any, order: Tensor | None, data: Tensor, batch: int) -> list[Tensor]:
    """The first state, [layers * directions, sequences, features], its sequences in the order of ``data``."""
    if hx is None:
        cells = rnn.num_layers * (1 + rnn.bidirectional)
        widths = [rnn.proj_size or rnn.hidden_size, *([rnn.hidden_size] if rnn.mode == "LSTM" else [])]
        return [data.new_zeros(cells, batch, width) for width in widths]
    state = [s.to(data.dtype) for s in (hx if rnn.mode == "LSTM" else (hx,))]
    return state if order is None else [s.index_select(1, order) for s in state]


def _run(  # noqa: PLR0913
    mode: str, x: Tensor, sizes: Tensor, first: list[Tensor], weights: list[Tensor], has_biases: bool
) -> Tensor:
    """The outputs [elements, units] of one direction of one layer."""
    hx = [s.unsqueeze(0) for s in first]
    run: Any = getattr(torch._VF, mode.lower())
    # One layer without dropout, not in training, in one direction.
    state: Any = hx if mode == "LSTM" else hx[0]
    output: Tensor = run(x, sizes, state, weights, has_biases, 1, 0.0, False, False)[0]
    return output
