"""The index lists of a channel-pruned layer: their check, what kernels want to know of them, and the copies
on the CPU that take the kept channels out of a tensor (*gather*) and put them into one (*scatter*).

A list is read once, since a list on a GPU has to be waited for, and what was found is kept for as long as the
tensor lives: ``channels_of`` finds it by the tensors, and reads them again when they have changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from sparseops import _native, triton
from sparseops.formats.channel_pruned import granularity
from sparseops.ops import cuda, registry
from sparseops.ops.conv_geometry import empty_output, is_channels_last

if TYPE_CHECKING:
    from sparseops.triton import channel_tiles

_INT32 = torch.int32
# Where a kernel in Triton would lose: tiles of so few rows, if channels are loaded one by one, and groups of
# so few channels, which leave most of a tile empty.
_FEW_ROWS = 64
_FEW_CHANNELS = 16
_LEAST_TURNED = 16  # of fewer channels oneDNN prefers planes


@dataclass(frozen=True, eq=False)
class Side:
    """What one list says.

    Attributes:
        kept: the channels in it.
        total: of how many.
        counts: how many each group of the convolution has.
        granularity: 0 if all are kept; 16 or 8 if whole aligned blocks of so many, none of which two groups
            share; else 1.
        table: on the device of the list, int32, the blocks of so many channels that are kept and then those
            that are not; None if all are kept.
        starts: there too, int32 [groups + 1], where in the list the channels of each group begin.
    """

    kept: tuple[int, ...]
    total: int
    counts: tuple[int, ...]
    granularity: int
    table: Tensor | None
    starts: Tensor

    @classmethod
    def of(cls, index: Tensor, kept: tuple[int, ...], total: int, groups: int) -> "Side":
        """The side of a checked list."""
        width = total // groups
        counts = [0] * groups
        for channel in kept:
            counts[channel // width] += 1
        block = granularity(kept, total)
        if groups > 1 and block and width % block:
            block = 1
        table = None
        if block:
            blocks = dict.fromkeys(channel // block for channel in kept)
            others = [i for i in range(-(-total // block)) if i not in blocks]
            table = torch.tensor([*blocks, *others], dtype=_INT32, device=index.device)
        starts = torch.tensor([0, *accumulate(counts)], dtype=_INT32, device=index.device)
        return cls(kept, total, tuple(counts), block, table, starts)

    def for_kernels(self) -> "channel_tiles.Side":
        """What the kernels in Triton want to know of it."""
        from sparseops.triton import channel_tiles

        return channel_tiles.Side(
            self.granularity,
            len(self.kept),
            self.total,
            self.table,
            self.starts if len(self.counts) > 1 else None,
            self.most,
            all(count % channel_tiles.UNIT == 0 for count in self.counts),
        )

    @property
    def most(self) -> int:
        """The most channels of any group."""
        return max(self.counts)


@dataclass(frozen=True, eq=False)
class Copy:
    """Where each of ``width`` channels of a result comes from.

    ``runs``, int32 [n, 3] on the CPU, are of channels that lie together on both sides: the first in the
    result, how many, and the first in the source, which is -1 where they are constants.
    """

    width: int
    runs: Tensor

    @classmethod
    def of(cls, sources: Sequence[int]) -> "Copy":
        """The copy whose channel i is channel ``sources[i]`` of the source, or a constant if that is -1."""
        cuts = [i for i in range(1, len(sources)) if not _goes_on(sources[i - 1], sources[i])]
        ends = [0, *cuts, len(sources)] if sources else [0]
        runs = [(first, end - first, sources[first]) for first, end in pairwise(ends)]
        return cls(len(sources), torch.tensor(runs, dtype=_INT32, device="cpu").view(-1, 3))


def _goes_on(before: int, after: int) -> bool:
    return after == (before + 1 if before >= 0 else -1)


@dataclass(frozen=True, eq=False)
class Channels:
    """What both lists of a layer say, and how a dense layer of what is kept takes its place on the CPU.

    Attributes:
        inputs, outputs: the two lists.
        groups: convolution groups that the dense layer has: those that keep an output.
        gather: its input from that of the layer, None if they are the same.
        scatter: the output of the layer from its output, None if they are the same.
        rows: the rows of its weight that the rows of the compact weight become, where its groups need more
            rows to be of equal size; else None.
        padded_rows: how many rows its weight has.
        all_inputs, all_outputs: the copies of every channel, to the other memory format.
    """

    inputs: Side
    outputs: Side
    groups: int
    gather: Copy | None
    scatter: Copy | None
    rows: tuple[int, ...] | None
    padded_rows: int
    all_inputs: Copy
    all_outputs: Copy

    @classmethod
    def of(cls, inputs: Side, outputs: Side, width: int) -> "Channels":
        """The channels of a layer whose compact weight has ``width`` columns."""
        live = [group for group, count in enumerate(outputs.counts) if count]
        first = [0, *accumulate(inputs.counts)]
        sources: list[int] = []
        for group in live:
            kept = inputs.kept[first[group] : first[group + 1]]
            sources += [*kept, *[-1] * (width - len(kept))]
        height = outputs.most
        targets = [
            place * height + i for place, group in enumerate(live) for i in range(outputs.counts[group])
        ]
        results = [-1] * outputs.total
        for channel, target in zip(outputs.kept, targets, strict=True):
            results[channel] = target
        padded = len(live) * height
        return cls(
            inputs,
            outputs,
            len(live),
            _copy(sources, inputs.total),
            _copy(results, padded),
            None if padded == len(targets) else tuple(targets),
            padded,
            Copy.of(range(inputs.total)),
            Copy.of(range(outputs.total)),
        )

    def pad_rows(self, t: Tensor) -> Tensor:
        """The compact weight or bias, in the rows that the dense layer has."""
        if self.rows is None:
            return t
        rows = torch.tensor(self.rows, device=t.device)
        return t.new_zeros(self.padded_rows, *t.shape[1:]).index_copy_(0, rows, t)


def _copy(sources: Sequence[int], width: int) -> Copy | None:
    return None if list(sources) == list(range(width)) else Copy.of(sources)


_known: Any = WeakTensorKeyDictionary()  # out_index -> {sizes: (in_index, stamps, Channels)}


def channels_of(
    op: str, in_index: Tensor, out_index: Tensor, inputs: int, outputs: int, width: int, groups: int = 1
) -> Channels:
    """What the lists of ``inputs`` and ``outputs`` channels say, for a compact weight of ``width`` columns.

    Raises:
        ValueError: a list is not ascending or holds a channel that there is not, or ``width`` is not the most
            inputs of any group.
    """
    key = (inputs, outputs, width, groups)
    entries = _known.get(out_index)
    if entries is not None and (found := entries.get(key)) is not None:
        channels: Channels
        other, stamps, channels = found
        if other() is in_index and _is(in_index, stamps[0]) and _is(out_index, stamps[1]):
            return channels
    with torch.inference_mode(False):
        sides = []
        for name, index, total in (("in_index", in_index, inputs), ("out_index", out_index, outputs)):
            kept = tuple(index.tolist())
            _check_list(f"{op}: {name}", kept, total)
            sides.append(Side.of(index, kept, total, groups))
        if sides[0].most != width:
            raise ValueError(
                f"{op}: values must have as many columns as in_index has channels in its largest group, "
                f"got {width} for {sides[0].most}"
            )
        channels = Channels.of(sides[0], sides[1], width)
    stamps = _stamp(in_index), _stamp(out_index)
    _known.setdefault(out_index, {})[key] = TensorWeakRef(in_index), stamps, channels
    return channels


def _stamp(index: Tensor) -> Any:
    """What tells whether a list has changed: of an inference tensor, which has no version counter, a copy."""
    return index.clone() if index.is_inference() else (index._version, index.data_ptr())


def _is(index: Tensor, stamp: Any) -> bool:
    if isinstance(stamp, Tensor):
        return torch.equal(index, stamp)
    return bool(stamp == (index._version, index.data_ptr()))


def _check_list(what: str, kept: Sequence[int], total: int) -> None:
    for before, after in pairwise(kept):
        if after <= before:
            raise ValueError(f"{what} must be ascending without repetition, got {before} before {after}")
    for channel in (kept[:1], kept[-1:]):
        if channel and not 0 <= channel[0] < total:
            raise ValueError(f"{what} must hold channels from 0 to {total - 1}, got {channel[0]}")


def check_lists(op: str, rows: int, in_index: Tensor, out_index: Tensor, inputs: int, outputs: int) -> None:
    """Check what there is to see of the lists, for a compact weight of so many rows, without reading them.

    Raises:
        TypeError: the dtype of a list is not int32.
        ValueError: a list has not one dimension, or the wrong length.
    """
    for name, index, total in (("in_index", in_index, inputs), ("out_index", out_index, outputs)):
        if index.dtype is not _INT32:
            raise TypeError(f"{op}: {name} must have dtype torch.int32, got {index.dtype}")
        shape = index.shape
        if len(shape) != 1 or not (1 if total else 0) <= shape[0] <= total:
            raise ValueError(
                f"{op}: {name} must have shape [n], n from {min(1, total)} to the {total} channels, "
                f"got {tuple(shape)}"
            )
    if out_index.shape[0] != rows:
        raise ValueError(
            f"{op}: values must have as many rows as out_index has channels ({out_index.shape[0]}), "
            f"got {rows}"
        )


def no_kernel_reason(x: Tensor, values: Tensor | None = None) -> str | None:
    """Why no kernel can run on ``x`` and ``values``, None if one can; looks at devices and dtypes alone, so
    that a layer's weight may stand in for the activations."""
    if registry.on_gpu(x):
        return triton.no_triton_reason(x) or triton.no_dtype_reason(x, values)
    if x.device.type != "cpu":
        return f"there is no {x.device.type.upper()} kernel"
    if _native.C is None:
        return _native.error
    return _native.config_error


def kernel_name(values: Tensor, *, groups: int = 1, **_: Any) -> str:
    """What runs for ``values``, where ``no_kernel_reason`` finds nothing against it."""
    if not triton.serves(values):
        return registry.cpu_isa()
    if _is_narrow(values.shape[0], values.shape[-1], groups):
        return f"torch's dense layer: groups keep fewer than {_FEW_CHANNELS} channels"
    return cuda.triton_name("gather and scatter in it")


def is_composed(lists: Channels, rows: int) -> bool:
    """Whether torch's own operations serve ``rows`` rows better than a kernel in Triton does."""
    inputs, outputs = lists.inputs, lists.outputs
    single = 1 in (inputs.granularity, outputs.granularity)
    return (single and rows < _FEW_ROWS) or _is_narrow(len(outputs.kept), inputs.most, len(inputs.counts))


def _is_narrow(outputs: int, inputs: int, groups: int) -> bool:
    """Whether groups leave tiles empty; outputs: that are kept; inputs: that a group keeps at most."""
    return groups > 1 and min(outputs // groups, inputs) < _FEW_CHANNELS


def read_lists(
    op: str, in_index: Tensor, out_index: Tensor, inputs: int, outputs: int, width: int, groups: int = 1
) -> None:
    """``channels_of`` if the lists can be read: now, since a captured CUDA graph could not wait for them, or
    for its errors alone."""
    if type(in_index) is Tensor and not in_index.is_meta and not registry.is_watched():
        channels_of(op, in_index, out_index, inputs, outputs, width, groups)


def gather_rows(lists: Channels, x: Tensor) -> Tensor:
    """The kept channels of ``x`` [n, channels]."""
    if lists.gather is None:
        return x
    return copy_rows(lists.gather, x if x.stride(1) == 1 else x.contiguous())


def scatter_rows(lists: Channels, z: Tensor, constants: Tensor | None) -> Tensor:
    """Kept channels ``z`` [n, channels] among the others, which are ``constants`` [O] or zero; contiguous."""
    return z.contiguous() if lists.scatter is None else copy_rows(lists.scatter, z.contiguous(), constants)


def gather_images(lists: Channels, x: Tensor) -> Tensor:
    """The kept channels of ``x`` [N, channels, H, W], channels_last; ``x`` itself if these are all and it is
    that or has few."""
    is_last = is_channels_last(x)
    copy = lists.gather
    if copy is None:
        if is_last or x.shape[1] < _LEAST_TURNED:
            return x
        copy = lists.all_inputs
    order = torch.channels_last if is_last else torch.contiguous_format
    return copy_images(copy, x.contiguous(memory_format=order), None, True)


def scatter_images(
    lists: Channels, z: Tensor, constants: Tensor | None, channels_last: bool, y: Tensor | None = None
) -> Tensor:
    """Kept channels ``z`` [N, channels, P, Q] among the others, which are ``constants`` [O] or zero, in one
    of the two memory formats; in ``y`` if that is given."""
    order = torch.channels_last if is_channels_last(z) else torch.contiguous_format
    z = z.contiguous(memory_format=order)
    copy = lists.scatter
    if copy is None:
        if y is None and is_channels_last(z) == channels_last:
            return z
        copy = lists.all_outputs
    return copy_images(copy, z, constants, channels_last, y)


def copy_rows(copy: Copy, x: Tensor, constants: Tensor | None = None) -> Tensor:
    """The channels of ``copy`` from those of ``x`` [n, channels], whose rows may lie apart: [n, width]."""
    y = x.new_empty(x.shape[0], copy.width)
    _run(copy, x, y, constants, 1, x.shape[0], x.stride(0), (False, False))
    return y


def copy_images(
    copy: Copy, x: Tensor, constants: Tensor | None, channels_last: bool, y: Tensor | None = None
) -> Tensor:
    """The channels of ``copy`` from those of ``x`` [N, channels, H, W], which is contiguous or channels_last:
    [N, width, H, W] in either format; in ``y`` if that is given."""
    batch, channels, height, width = x.shape
    from_planes = not is_channels_last(x)
    if y is None:
        y = empty_output(x, (batch, copy.width, height, width), channels_last)
    _run(copy, x, y, constants, batch, height * width, channels, (from_planes, not channels_last))
    return y


def _run(
    copy: Copy,
    x: Tensor,
    y: Tensor,
    constants: Tensor | None,
    images: int,
    pixels: int,
    x_stride: int,
    planes: tuple[bool, bool],
) -> None:
    """Run the kernel; planes: whether x and y are planes of pixels rather than rows of channels."""
    if not (images and pixels and copy.width):
        return
    constants = None if constants is None else constants.contiguous()
    _native.C.channel_copy(
        x.data_ptr(),
        x_stride,
        y.data_ptr(),
        copy.width,
        0 if constants is None else constants.data_ptr(),
        copy.runs.data_ptr(),
        copy.runs.shape[0],
        images,
        pixels,
        *planes,
        x.element_size(),
        torch.get_num_threads(),
    )
