"""The launch of ``nm24_conv``'s CUDA kernels; that of products is ``cuda.linear``."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseops import _native
from sparseops.formats.nm24 import GROUP, round_up
from sparseops.ops import cuda, dispatch, registry
from sparseops.ops.common import ACTIVATIONS
from sparseops.ops.conv_geometry import Geometry, empty_output, is_channels_last, no_wgmma_reason


def conv(
    op: str,
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    activation: str,
    output: tuple[int, int],
) -> Tensor:
    """The convolution of ``x`` [N, C, H, W] with ``values`` and ``meta`` for ``op``, by a kernel that has
    channels last everywhere; all of it checked."""
    batch, _, height, width = x.shape
    rows, kept = values.shape
    kernel_size, stride, (top, _, left, _), dilation, groups = geometry
    channels_last = is_channels_last(x)
    y = empty_output(x, (batch, rows, *output), True)
    if not (batch and rows):
        return empty_output(x, (*y.shape,), channels_last)
    pixels = cuda.aligned(pixels_of(x.bfloat16() if x.dtype is torch.float32 else x, groups))
    channels = pixels.shape[-1]
    stored = cuda.weight(values, meta, groups)
    product = dispatch.Product(batch * output[0] * output[1], rows, kept * 2, groups)
    tiles = ("small",) if channels // groups % 8 else dispatch.CONV_TILES
    no_wgmma = cuda.no_wgmma_reason(x, rows, y.dtype)
    no_wgmma = no_wgmma or no_wgmma_reason(channels, groups, geometry, (height, width), output)
    blocks = cuda.multiprocessors(x.device)
    plan = dispatch.plan(op, product, blocks, cuda.allowed(tiles, no_wgmma))
    partials, counters = cuda.workspace(plan, x.device)
    bias = None if bias is None else cuda.aligned(bias)
    residual = None if residual is None else cuda.aligned(residual.permute(0, 2, 3, 1))
    _native.require(op).nm24_conv_cuda(
        pixels.data_ptr(),
        stored.values.data_ptr(),
        stored.slabs.data_ptr(),
        rows,
        kept * 2,
        stored.slab_rows,
        cuda.address(bias),
        cuda.address(residual),
        registry.KERNEL_DTYPES[y.dtype],
        ACTIVATIONS[activation],
        y.data_ptr(),
        batch,
        channels,
        height,
        width,
        *output,
        *kernel_size,
        *stride,
        top,
        left,
        *dilation,
        groups,
        registry.KERNEL_DTYPES[pixels.dtype],
        plan.tile.code,
        plan.splits,
        plan.cluster,
        blocks,
        cuda.address(partials),
        cuda.address(counters),
        *cuda.place(x),
    )
    return y if channels_last else empty_output(x, (*y.shape,), False).copy_(y)


def pixels_of(x: Tensor, groups: int) -> Tensor:
    """[N, C, H, W] as [N, H, W, channels], the channels of each group padded to a multiple of 4."""
    last = x.permute(0, 2, 3, 1)
    in_group = x.shape[1] // groups
    if missing := round_up(in_group, GROUP) - in_group:
        last = F.pad(last.unflatten(-1, (groups, in_group)), (0, missing)).flatten(-2)
    return last
