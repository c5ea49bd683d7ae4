"""Channel-pruned layers in plain torch: index_select, a dense layer of what is kept, index_copy. It runs on
any device, and every gradient of the ops is made of it; nothing reads the lists, so that it can be traced.

With several convolution groups the dense weight is expanded instead, since how many groups are left, and how
wide they are, is known from the lists alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseops.formats.channel_pruned import expand_channels, local_columns
from sparseops.ops.common import finish
from sparseops.ops.conv_geometry import Geometry, pad_unevenly


def select(t: Tensor, dim: int, index: Tensor) -> Tensor:
    """Those of ``t`` along ``dim`` that a list names; ``t`` itself if these are all."""
    return t if index.shape[0] == t.shape[dim] else t.index_select(dim, index)


def spread(t: Tensor, dim: int, index: Tensor, base: Tensor | None, total: int) -> Tensor:
    """``t`` where a list says along ``dim``, and ``base``, one number for each of ``total`` places, or zero
    elsewhere."""
    if index.shape[0] == total:
        return t
    dim %= t.ndim
    shape = (*t.shape[:dim], total, *t.shape[dim + 1 :])
    if base is None:
        whole = t.new_zeros(shape)
    else:
        whole = base.view(-1, *[1] * (t.ndim - 1 - dim)).expand(shape)
    return whole.index_copy(dim, index.long(), t)


def linear(
    x: Tensor,
    values: Tensor,
    in_index: Tensor,
    out_index: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    outputs: int,
    activation: str,
) -> Tensor:
    """``channel_linear``."""
    z = F.linear(select(x, -1, in_index), values, None if bias is None else select(bias, 0, out_index))
    return finish(spread(z, -1, out_index, bias, outputs), residual, activation)


def linear_grad_values(grad: Tensor, x: Tensor, in_index: Tensor, out_index: Tensor) -> Tensor:
    """The gradient [O', K'] of the values, from those of the output [tokens, O] and x [tokens, K]."""
    return select(grad, 1, out_index).t() @ select(x, 1, in_index)


def conv(
    x: Tensor,
    values: Tensor,
    in_index: Tensor,
    out_index: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    outputs: int,
    geometry: Geometry,
    activation: str,
) -> Tensor:
    """``channel_conv``, of values [O', R, S, C']."""
    _, stride, padding, dilation, groups = geometry
    if groups > 1:
        return dense_conv(x, values, in_index, out_index, bias, residual, outputs, geometry, activation)
    kept, border = pad_unevenly(select(x, 1, in_index), padding)
    offset = None if bias is None else select(bias, 0, out_index)
    z = F.conv2d(kept, values.permute(0, 3, 1, 2), offset, stride, border, dilation)
    return finish(spread(z, 1, out_index, bias, outputs), residual, activation)


def dense_conv(
    x: Tensor,
    values: Tensor,
    in_index: Tensor,
    out_index: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    outputs: int,
    geometry: Geometry,
    activation: str,
) -> Tensor:
    """The same of the expanded weight."""
    kernel_size, stride, padding, dilation, groups = geometry
    shape = (outputs, x.shape[-3] // groups, *kernel_size)
    weight = expand_channels(values, in_index, out_index, shape, groups)
    x, border = pad_unevenly(x, padding)
    return finish(F.conv2d(x, weight, bias, stride, border, dilation, groups), residual, activation)


def conv_grads(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    in_index: Tensor,
    out_index: Tensor,
    geometry: Geometry,
    needs_x: bool,
    needs_values: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x [N, C, H, W] and of the values [O', R, S, C'], from that of the output
    [N, O, P, Q]."""
    kernel_size, stride, padding, dilation, groups = geometry
    channels = x.shape[1]
    compact = groups == 1
    if compact:
        grad, kept, weight = select(grad, 1, out_index), select(x, 1, in_index), values.permute(0, 3, 1, 2)
    else:
        shape = (grad.shape[1], channels // groups, *kernel_size)
        kept, weight = x, expand_channels(values, in_index, out_index, shape, groups)
    padded, border = pad_unevenly(kept, padding)
    options: tuple[Any, ...] = ([weight.shape[0]], stride, border, dilation, False, [0, 0], groups)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, padded, weight, *options, [needs_x, needs_values, False]
    )
    if needs_x:
        if padded is not kept:
            top, bottom, left, right = padding
            grad_x = F.pad(grad_x, (-left, -right, -top, -bottom))
        if compact:
            grad_x = spread(grad_x, 1, in_index, None, channels)
    if needs_values:
        grad_weight = grad_weight.permute(0, 2, 3, 1)
        if not compact:
            columns = local_columns(in_index, out_index, shape, groups, values.shape[-1])
            rows = F.pad(select(grad_weight, 0, out_index), (0, 1))  # what a ragged group has none of is 0
            grad_weight = rows.gather(-1, columns[:, None, None].expand(values.shape))
    return grad_x if needs_x else None, grad_weight if needs_values else None
