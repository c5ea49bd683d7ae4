"""Channel pruning: a weight of which whole output and whole input channels are zero, as the small dense
weight of the others and two lists that say which these are::

    values     linear [O', K']        conv1d [O', L, C']        conv2d [O', R, S, C']      channels last
    in_index   the input channels that are kept, ascending, int32
    out_index  the O' output channels that are kept, ascending, int32

C counts the channels of one convolution group, as in a dense weight [O, C, R, S]; ``in_index`` counts through
all groups, 0 to groups * C - 1. With several groups C' is the most channels that any group keeps; a row holds
those of its own group in ascending order, then zeros (*ragged* groups).

The *granularity* of a list follows from it and is not stored: 0 when every channel is kept, so that nothing
has to be gathered; 16 or 8 when it consists of whole blocks of so many channels that begin at a multiple of
them (the last block of the width may be short); else 1. Blocks of 8 are 16 bytes of a 16-bit type, what a GPU
loads at once; single channels are slow there.

The compact weight may itself be 2:4: then values and ``meta`` are those that ``NM24`` has for a weight of
shape (O', C', taps).

A layer with such a weight is exactly the dense layer with zeros in it: its bias is not part of the format and
stays that of all O outputs, and an output channel that was dropped is the constant bias.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from sparseops.formats.nm24 import DTYPES, NM24, energy_share

BLOCKS = (16, 8)
"""The widths of blocks that kernels know, from the widest."""


@dataclass(frozen=True, eq=False)
class Keep:
    """Which channels of a weight are kept.

    Attributes:
        inputs: ascending input channels, counted through all convolution groups; None for all.
        outputs: ascending output channels; None for all.
        nm24: whether the compact weight is pruned to 2:4 by magnitude after that.
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None
    nm24: bool = False


def granularity(index: Tensor | Sequence[int], total: int) -> int:
    """0 if ``index`` (ascending) holds all of ``total`` channels, 16 or 8 if whole aligned blocks, else 1."""
    kept = index.tolist() if isinstance(index, Tensor) else list(index)
    if len(kept) == total:
        return 0
    for block in BLOCKS:
        first = range(0, len(kept), block)
        whole = all(kept[i] % block == 0 for i in first) and all(
            kept[i : i + block] == list(range(kept[i], min(kept[i] + block, total))) for i in first
        )
        if whole:
            return block
    return 1


def local_columns(
    in_index: Tensor, out_index: Tensor, shape: Sequence[int], groups: int, width: int
) -> Tensor:
    """For each kept output the input channel, within its convolution group, of each of its ``width`` columns:
    int64 [O', width]; C, one too many, where a ragged group has none."""
    rows, channels = shape[:2]
    group = in_index.long() // max(1, channels)
    first = torch.searchsorted(group, torch.arange(groups, device=group.device))
    place = torch.arange(len(group), device=group.device) - first[group]
    table = in_index.new_full((groups, width), channels, dtype=torch.long)
    table[group, place] = in_index.long() % max(1, channels)
    return table[out_index.long() // max(1, rows // groups)]


def expand_channels(
    values: Tensor, in_index: Tensor, out_index: Tensor, shape: Sequence[int], groups: int = 1
) -> Tensor:
    """The dense weight of ``shape`` [O, C, ...], contiguous; differentiable in values."""
    rows, channels = shape[:2]
    if groups == 1:
        wide = values.new_zeros((*values.shape[:-1], channels)).index_copy(-1, in_index.long(), values)
    else:
        columns = local_columns(in_index, out_index, shape, groups, values.shape[-1])
        for _ in range(values.ndim - 2):
            columns = columns.unsqueeze(1)
        spare = values.new_zeros((*values.shape[:-1], channels + 1))
        wide = spare.scatter(-1, columns.expand(values.shape), values)[..., :channels]
    dense = wide.new_zeros((rows, *wide.shape[1:])).index_copy(0, out_index.long(), wide)
    return dense.movedim(-1, 1).contiguous()


def compact_weight(w: Tensor, in_index: Tensor, out_index: Tensor, groups: int = 1) -> Tensor:
    """The kept part [O', ..., C'] of a dense weight [O, C, ...], contiguous; differentiable."""
    last = w.index_select(0, out_index.long()).movedim(1, -1)
    if groups == 1:
        return last.index_select(-1, in_index.long()).contiguous()
    counts = torch.bincount(in_index.long() // max(1, w.shape[1]), minlength=groups)
    width = int(counts.max()) if len(counts) else 0
    columns = local_columns(in_index, out_index, w.shape, groups, width)
    for _ in range(last.ndim - 2):
        columns = columns.unsqueeze(1)
    spare = torch.nn.functional.pad(last, (0, 1))
    return spare.gather(-1, columns.expand(*last.shape[:-1], width)).contiguous()


@dataclass(frozen=True, eq=False)
class ChannelPruned:
    """A weight without its zero channels, in the layout drawn at the top of this file.

    Attributes:
        values: the compact weight [O', (R, S,) C'], contiguous; with ``meta`` the values [O', P/2] of its 2:4
            form.
        in_index: kept input channels, int32, ascending.
        out_index: kept output channels, int32 [O'], ascending.
        shape: logical dense shape, (O, K), (O, C, L) or (O, C, R, S).
        groups: of the convolution.
        meta: None, or the metadata of the compact weight's 2:4 form, uint8 [O', P/8].
        energy_kept: share of the squared (finite) weight that ``from_dense`` kept.
        nonfinite: NaN and infinite elements that ``from_dense`` saw.
    """

    key: ClassVar[str] = "channel"
    options: ClassVar[tuple[str, ...]] = ("groups",)
    positional: ClassVar[tuple[str, ...]] = ("in_index", "out_index")
    by_keyword: ClassVar[tuple[str, ...]] = ("meta",)
    needs_outputs: ClassVar[bool] = True

    values: Tensor
    in_index: Tensor
    out_index: Tensor
    shape: tuple[int, ...]
    groups: int = 1
    meta: Tensor | None = None
    energy_kept: float = 1.0
    nonfinite: int = 0

    @classmethod
    def from_dense(cls, w: Tensor, *, prune: "str | Keep | None" = None, groups: int = 1) -> "ChannelPruned":
        """Pack a dense weight [O, K], [O, C, L] or [O, C, R, S].

        Args:
            w: the weight; no gradient flows to it.
            prune: None drops the channels that are zero, and refuses a weight without any. ``"magnitude"``
                keeps, of the inputs and of the outputs of each group, the half of the aligned blocks of 8
                channels with the largest L2 norm, of equal ones the lower; NaN and infinities count as the
                largest. A ``Keep`` says which channels are kept.
            groups: of the convolution; C is in_channels / groups.

        Raises:
            TypeError: ``w`` is not a float16, bfloat16, float32 or float64 tensor.
            ValueError: ``w`` has another number of dimensions, its outputs do not divide into groups, it has
                no zero channel although ``prune`` is None, ``prune`` is unknown, or the lists of a ``Keep``
                are empty, out of range or not ascending, or have no group in common.
        """
        if not isinstance(w, Tensor) or w.dtype not in DTYPES or w.layout != torch.strided:
            got = f"{w.dtype}, {w.layout}" if isinstance(w, Tensor) else type(w).__name__
            raise TypeError(f"ChannelPruned.from_dense: w must be a dense floating-point tensor, got {got}")
        if w.device.type == "meta":
            raise ValueError("ChannelPruned.from_dense: w must hold data, got a tensor on the meta device")
        if w.ndim not in (2, 3, 4):
            raise ValueError(
                f"ChannelPruned.from_dense: w must have 2, 3 or 4 dimensions, got shape {tuple(w.shape)}"
            )
        if groups < 1 or w.shape[0] % groups:
            raise ValueError(
                "ChannelPruned.from_dense: groups must be at least 1 and divide the outputs, "
                f"got {groups} for {w.shape[0]}"
            )
        w = w.detach()
        if isinstance(prune, Keep):
            keep = prune
        elif prune is None:
            keep = _zero_channels_dropped(w, groups)
        elif prune == "magnitude":
            keep = _largest_half(w, groups)
        else:
            raise ValueError(
                f'ChannelPruned.from_dense: prune must be None, "magnitude" or a Keep, got {prune!r}'
            )
        in_index, out_index = _lists(keep, w, groups)
        values, meta = compact_weight(w, in_index, out_index, groups), None
        inner = NM24.from_dense(values.movedim(-1, 1), prune="magnitude") if keep.nm24 else None
        kept = values if inner is None else inner.values
        if inner is not None:
            values, meta = inner.values, inner.meta
        return cls(
            values,
            in_index,
            out_index,
            tuple(w.shape),
            groups,
            meta,
            energy_kept=1.0 if prune is None else energy_share(kept, w),
            nonfinite=int(w.numel() - torch.isfinite(w).sum()),
        )

    @property
    def compact_shape(self) -> tuple[int, ...]:
        """Logical shape (O', C', taps) of the compact weight."""
        if self.meta is None:
            last = self.values.shape
            return (last[0], last[-1], *last[1:-1])
        return (self.out_index.shape[0], _widest(self.in_index, self.shape[1], self.groups), *self.shape[2:])

    @property
    def compact(self) -> Tensor:
        """The compact weight [O', (R, S,) C'], dense; differentiable in values."""
        if self.meta is None:
            return self.values
        return NM24(self.values, self.meta, self.compact_shape).to_dense().movedim(1, -1).contiguous()

    def to_dense(self) -> Tensor:
        """The dense weight, contiguous and exact (dropped zeros are +0); differentiable in values."""
        return expand_channels(self.compact, self.in_index, self.out_index, self.shape, self.groups)

    @property
    def granularities(self) -> tuple[int, int]:
        """Of the input and of the output list: 0 (all), 16, 8 or 1 (single channels)."""
        return (
            granularity(self.in_index, self.shape[1] * self.groups),
            granularity(self.out_index, self.shape[0]),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of values, lists and meta."""
        tensors = (self.values, self.in_index, self.out_index, self.meta)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @property
    def density(self) -> float:
        """Non-zero values over elements of the dense weight; 0.0 for a weight without elements."""
        numel = prod(self.shape)
        return int(self.values.count_nonzero()) / numel if numel else 0.0

    def validate(self) -> None:
        """Check every buffer before a kernel reads it.

        Raises:
            ValueError: a buffer has the wrong type, dtype, layout, device or shape; a list is empty, out of
                range or not ascending; a ragged group's padding is not zero; or the 2:4 form of the compact
                weight is malformed.
        """
        for name, tensor, dtypes in (
            ("values", self.values, DTYPES),
            ("in_index", self.in_index, (torch.int32,)),
            ("out_index", self.out_index, (torch.int32,)),
            ("meta", self.meta, (torch.uint8,)),
        ):
            if tensor is None and name == "meta":
                continue
            if not isinstance(tensor, Tensor):
                raise ValueError(f"ChannelPruned: {name} must be a tensor, got {type(tensor).__name__}")
            if tensor.dtype not in dtypes:
                rule = " or ".join(str(dtype) for dtype in dtypes)
                raise ValueError(f"ChannelPruned: {name} must have dtype {rule}, got {tensor.dtype}")
            if not tensor.is_contiguous():
                raise ValueError(f"ChannelPruned: {name} must be contiguous, got strides {tensor.stride()}")
            if tensor.device != self.values.device:
                raise ValueError(
                    f"ChannelPruned: {name} must be on the device of values ({self.values.device}), "
                    f"got {tensor.device}"
                )
        if len(self.shape) not in (2, 3, 4) or not all(isinstance(n, int) and n >= 0 for n in self.shape):
            raise ValueError(f"ChannelPruned: shape must be 2, 3 or 4 sizes of at least 0, got {self.shape}")
        if self.groups < 1 or self.shape[0] % self.groups:
            raise ValueError(
                "ChannelPruned: groups must be at least 1 and divide the outputs, "
                f"got {self.groups} for {self.shape[0]}"
            )
        _check_list("ChannelPruned: in_index", self.in_index, self.shape[1] * self.groups)
        _check_list("ChannelPruned: out_index", self.out_index, self.shape[0])
        on_meta = self.values.is_meta
        rows, taps = self.out_index.shape[0], self.shape[2:]
        if self.meta is not None and not on_meta:
            NM24(self.values, self.meta, self.compact_shape).validate()
        elif self.meta is None:
            width = self.values.shape[-1] if self.values.ndim else 0
            if not on_meta:
                width = _widest(self.in_index, self.shape[1], self.groups)
            expected = (rows, *taps, width)
            if tuple(self.values.shape) != expected:
                raise ValueError(
                    f"ChannelPruned: values must have shape {expected} for {rows} outputs and "
                    f"{self.in_index.shape[0]} inputs of a weight of shape {self.shape}, "
                    f"got {tuple(self.values.shape)}"
                )
        if self.groups > 1 and not on_meta:
            self._validate_padding()

    def _validate_padding(self) -> None:
        compact = self.compact
        columns = local_columns(self.in_index, self.out_index, self.shape, self.groups, compact.shape[-1])
        stray = (compact != 0) & (columns == self.shape[1]).view(
            columns.shape[0], *[1] * (compact.ndim - 2), columns.shape[1]
        )
        if stray.any():
            where = stray.nonzero()[0].tolist()
            raise ValueError(
                "ChannelPruned: values must be 0 behind the inputs of a ragged group, "
                f"got {float(compact[tuple(where)])} in row {where[0]}, column {where[-1]}"
            )


def _check_list(what: str, index: Tensor, total: int) -> None:
    """Refuse a list that is not ascending channels below ``total``."""
    if index.ndim != 1:
        raise ValueError(f"{what} must have one dimension, got shape {tuple(index.shape)}")
    if not index.shape[0]:
        if total:
            raise ValueError(f"{what} must hold at least one of {total} channels, got none")
        return
    if index.is_meta:
        return
    if index.shape[0] > 1 and bool((index[1:] <= index[:-1]).any()):
        at = int((index[1:] <= index[:-1]).nonzero()[0])
        raise ValueError(
            f"{what} must be ascending without repetition, got {int(index[at])} before {int(index[at + 1])}"
        )
    for channel in (int(index[0]), int(index[-1])):
        if not 0 <= channel < total:
            raise ValueError(f"{what} must hold channels from 0 to {total - 1}, got {channel}")


def _lists(keep: Keep, w: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The int32 lists of ``keep``, checked; inputs that only dropped outputs read are dropped too."""
    rows, channels = w.shape[:2]
    lists = []
    for name, index, total in (
        ("inputs", keep.inputs, channels * groups),
        ("outputs", keep.outputs, rows),
    ):
        if index is None:
            index = torch.arange(total)
        _check_list(f"ChannelPruned.from_dense: {name} of prune", index, total)
        lists.append(index.to(w.device, torch.int32).contiguous())
    in_index, out_index = lists
    if groups > 1 and rows and channels:
        has_outputs = torch.zeros(groups, dtype=torch.bool, device=w.device)
        has_outputs[out_index.long() // (rows // groups)] = True
        in_index = in_index[has_outputs[in_index.long() // channels]]
        if not in_index.shape[0]:
            raise ValueError(
                "ChannelPruned.from_dense: inputs of prune must hold a channel of a group that keeps an "
                "output, got none"
            )
    return in_index, out_index


def _widest(in_index: Tensor, channels: int, groups: int) -> int:
    """The most kept inputs of any group."""
    if groups == 1 or not in_index.shape[0]:
        return in_index.shape[0]
    return int(torch.bincount(in_index.long() // channels, minlength=groups).max())


def _by_group(w: Tensor, groups: int) -> Tensor:
    """[O, C, ...] as [groups, O / groups, C, taps]."""
    return w.reshape(groups, w.shape[0] // groups, w.shape[1], prod(w.shape[2:]))


def _zero_channels_dropped(w: Tensor, groups: int) -> Keep:
    nonzero = _by_group(w != 0, groups)
    inputs, outputs = nonzero.any(3).any(1).flatten(), nonzero.any(3).any(2).flatten()
    if inputs.all() and outputs.all() and w.numel():
        raise ValueError(
            "ChannelPruned.from_dense: w must have a channel that is all zero "
            f'(prune="magnitude" or a Keep drops some), got none in a weight of shape {tuple(w.shape)}'
        )
    if not inputs.any():  # a layer keeps one block, if only of zeros
        inputs[: BLOCKS[-1]] = outputs[: BLOCKS[-1]] = True
    return Keep(inputs.nonzero().flatten(), outputs.nonzero().flatten())


def _largest_half(w: Tensor, groups: int) -> Keep:
    energy = _by_group(w.nan_to_num(nan=torch.inf).double().square(), groups)
    return Keep(_best_blocks(energy.sum((1, 3))), _best_blocks(energy.sum((2, 3))))


def _best_blocks(energy: Tensor) -> Tensor:
    """Of the energies [groups, channels] the channels, counted through all groups, of the better half of the
    blocks of each group."""
    groups, channels = energy.shape
    block = BLOCKS[-1]
    blocks = -(-channels // block)
    by_block = torch.nn.functional.pad(energy, (0, blocks * block - channels)).view(groups, blocks, block)
    best = by_block.sum(2).sort(dim=1, descending=True, stable=True).indices[:, : -(-blocks // 2)]
    kept = torch.zeros(groups, blocks, dtype=torch.bool, device=energy.device).scatter(1, best, True)
    return kept.repeat_interleave(block, 1)[:, :channels].flatten().nonzero().flatten()
