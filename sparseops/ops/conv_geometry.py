"""The arguments of a 2-D convolution that are not tensors, the size of its output, and its memory format."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = int | Sequence[int]


class Geometry(NamedTuple):
    """Everything about a convolution that is not a tensor, in the order of the op's schema."""

    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]  # top, bottom, left, right
    dilation: Sequence[int]
    groups: int


def pair(op: str, name: str, value: Pair) -> Sequence[int]:
    """``value``, the argument ``name`` of ``op``, for height and width."""
    if isinstance(value, int):
        return (value, value)
    if isinstance(value, (tuple, list)) and len(value) == 2:
        first, second = value
        if isinstance(first, int) and isinstance(second, int):
            return value
    raise TypeError(f"{op}: {name} must be an int or a pair of ints, got {value!r}")


def geometry_of(
    op: str, kernel_size: Pair, stride: Pair, padding: Pair | str, dilation: Pair, groups: int
) -> Geometry:
    """The arguments of the public function of ``op``, checked as far as they go without a tensor.

    Raises:
        TypeError: a size is no int and no pair of ints.
        ValueError: padding is an unknown word, or "same" with a stride.
    """
    kernel_size = pair(op, "kernel_size", kernel_size)
    stride = pair(op, "stride", stride)
    dilation = pair(op, "dilation", dilation)
    if not isinstance(padding, str):
        height, width = pair(op, "padding", padding)
        sides = (height, height, width, width)
    elif padding == "valid":
        sides = (0, 0, 0, 0)
    elif padding != "same":
        raise ValueError(f'{op}: padding must be an int, a pair of ints, "same" or "valid", got {padding!r}')
    elif stride[0] != 1 or stride[1] != 1:
        raise ValueError(f'{op}: stride must be 1 with padding="same", got {tuple(stride)}')
    else:
        # an odd total puts the larger half at the bottom and at the right, as torch does
        total_h, total_w = (d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True))
        sides = (total_h // 2, total_h - total_h // 2, total_w // 2, total_w - total_w // 2)
    return Geometry(kernel_size, stride, sides, dilation, groups)


def check_channels(op: str, x: Tensor, rows: int, geometry: Geometry) -> int:
    """Check ``x`` and the geometry against a weight of ``rows`` rows, and return the channels of a group.

    Raises:
        ValueError: x has no four dimensions, a size is too small, or groups do not divide the channels.
    """
    kernel_size, stride, padding, dilation, groups = geometry
    if x.ndim != 4:
        raise ValueError(f"{op}: x must have shape [N, C, H, W] or [C, H, W], got {tuple(x.shape)}")
    if min(*kernel_size, *stride, *dilation) < 1 or min(padding) < 0:
        _refuse_size(op, geometry)
    channels = x.shape[1]
    if groups < 1 or channels < 1 or channels % groups or rows % groups:
        raise ValueError(
            f"{op}: groups must be at least 1 and divide the channels in and out, "
            f"got {groups} for {channels} and {rows}"
        )
    return channels // groups


def output_size(op: str, x: Tensor, geometry: Geometry) -> tuple[int, int]:
    """Height and width of the output of an ``x`` with four dimensions.

    Raises:
        ValueError: the kernel does not fit into the padded x, or that is too large.
    """
    kernel_size, stride, padding, dilation, _ = geometry
    output = []
    for axis, size in enumerate(x.shape[2:]):
        padded = size + padding[2 * axis] + padding[2 * axis + 1]
        extent = dilation[axis] * (kernel_size[axis] - 1) + 1
        if size < 1 or padded < extent:
            raise ValueError(
                f"{op}: x must have a height and width of at least 1 and, padded, of the dilated kernel's "
                f"extent, got {size} padded to {padded} for an extent of {extent}"
            )
        if padded >= 2**31:
            raise ValueError(
                f"{op}: padding must keep the padded x below 2**31 rows and columns, got {padded}"
            )
        output.append((padded - extent) // stride[axis] + 1)
    return output[0], output[1]


def no_wgmma_reason(
    channels: int, groups: int, geometry: Geometry | None = None, *sizes: Sequence[int]
) -> str | None:
    """Why wgmma.sp cannot take a convolution, None if it can: what the copy engine can find the pixels of.
    sizes: of the image and of the output; without a geometry only channels and groups are looked at."""
    if groups > 1 or channels % 64:
        return f"wgmma.sp needs one group of a multiple of 64 channels, got {groups} of {channels // groups}"
    if geometry is None:
        return None
    image, output = sizes
    for axis in (0, 1):
        pad, stride = geometry.padding[2 * axis], geometry.stride[axis]
        extent = (geometry.kernel_size[axis] - 1) * geometry.dilation[axis]
        # where the first tap is for the last output pixel, from the last pixel of the image
        end = (output[axis] - 1) * stride - pad - (image[axis] - 1)
        if stride > 8 or pad > 128 or extent > 254 or not -128 <= end <= 127:
            return "wgmma.sp needs strides up to 8, padding up to 128 and a dilated kernel up to 255"
    return None


def _refuse_size(op: str, geometry: Geometry) -> None:
    for name, least in (("kernel_size", 1), ("stride", 1), ("dilation", 1), ("padding", 0)):
        sizes = tuple(getattr(geometry, name))
        if min(sizes) < least:
            raise ValueError(f"{op}: {name} must be at least {least}, got {sizes}")


def is_channels_last(x: Tensor) -> bool:
    """Whether the output is to be channels_last: by the strides of ``x``, ambiguous ones are contiguous.

    The rule is torch's own, ``is_channels_last_strides_2d`` in c10/core/MemoryFormat.h.
    """
    sizes, strides = x.shape, x.stride()
    least = 0
    if strides[1] == 0:
        return False
    for dim in (1, 3, 2, 0):
        if strides[dim] < least or (dim == 0 and least == strides[1]):
            return False
        least = strides[dim] * sizes[dim]
    return True


def empty_output(x: Tensor, shape: tuple[int, ...], channels_last: bool) -> Tensor:
    """An output of ``shape`` in the dtype and on the device of ``x``."""
    if not channels_last:
        return x.new_empty(*shape)  # sizes one by one: a tuple takes 0.6 us longer
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def pad_unevenly(x: Tensor, padding: Sequence[int]) -> tuple[Tensor, list[int]]:
    """``x`` and the padding that torch's convolution is to add on both sides of height and width: what is
    not the same on both is added to ``x`` itself."""
    top, bottom, left, right = padding
    if (top, left) == (bottom, right):
        return x, [top, left]
    return F.pad(x, (left, right, top, bottom)), [0, 0]
