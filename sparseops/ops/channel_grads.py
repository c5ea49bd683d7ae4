"""The gradients of channel-pruned layers that are not the layer's own op again, as ops: so that a kernel in
Triton can compute them wherever autograd or torch.compile asks, and be differentiated again. They are no part
of the API, and check nothing that the layer's op has checked. Where Triton does not serve, the same is done
in plain torch without them.
"""

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparseops import triton
from sparseops.ops import channel_plain, cuda, registry
from sparseops.ops.channels import Channels, channels_of, is_composed, no_kernel_reason
from sparseops.ops.common import loop_vmap
from sparseops.ops.conv_geometry import Geometry, empty_output, is_channels_last

if TYPE_CHECKING:
    from sparseops.triton import channel_tiles

_LINEAR_VALUES = "channel_linear_grad_values"
_CONV_VALUES = "channel_conv_grad_values"
_CONV_X = "channel_conv_grad_x"
_GEOMETRY = "int[2] kernel_size, int[2] stride, int[4] padding, int[2] dilation, int groups"


def linear_grad_values(grad: Tensor, x: Tensor, in_index: Tensor, out_index: Tensor) -> Tensor:
    """The gradient [O', K'] of the values of ``channel_linear``, from those of the output [rows, O] and x
    [rows, K]."""
    if not triton.serves(x):
        return channel_plain.linear_grad_values(grad, x, in_index, out_index)
    grad_values: Tensor = _linear_values_op(grad, x, in_index, out_index)
    return grad_values


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
    """The gradients of x [N, C, H, W] and of the values [O', R, S, C'] of ``channel_conv``, from that of the
    output [N, O, P, Q]."""
    if not triton.serves(x):
        return channel_plain.conv_grads(grad, x, values, in_index, out_index, geometry, needs_x, needs_values)
    grad_x = grad_values = None
    if needs_x:
        grad_x = _conv_x_op(grad, values, in_index, out_index, *x.shape[1:], *geometry)
    if needs_values:
        grad_values = _conv_values_op(grad, x, in_index, out_index, values.shape[-1], *geometry)
    return grad_x, grad_values


def taps_of(geometry: Geometry) -> "channel_tiles.Taps":
    """The geometry as the kernels in Triton take it."""
    from sparseops.triton.channel_tiles import Taps

    kernel_size, stride, (top, _, left, _), dilation, _ = geometry
    return Taps((*kernel_size,), (*stride,), (*dilation,), top, left)  # type: ignore[arg-type]


def channels_last(t: Tensor) -> Tensor:
    """``t`` with its channels next to each other, and no gaps between pixels."""
    return t.contiguous(memory_format=torch.channels_last)


def _kernels_lists(
    op: str,
    tensors: tuple[Tensor, Tensor],
    rows: int,
    in_index: Tensor,
    out_index: Tensor,
    inputs: int,
    outputs: int,
    width: int,
    groups: int = 1,
) -> Channels | None:
    """What the lists say if a kernel computes a gradient from these ``tensors``, and sums or writes ``rows``
    rows of channels; else None."""
    if no_kernel_reason(*tensors) or not all(tensor.numel() for tensor in tensors):
        return None
    lists = channels_of(op, in_index, out_index, inputs, outputs, width, groups)
    return None if is_composed(lists, rows) else lists


def _vmap_of(op: str) -> Callable[..., tuple[Tensor, int]]:
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return loop_vmap(getattr(torch.ops.sparseops, op).default, info, in_dims, args), 0

    return vmap


# ---- the values of channel_linear


def _linear_values(grad: Tensor, x: Tensor, in_index: Tensor, out_index: Tensor) -> Tensor:
    sizes = x.shape[1], grad.shape[1], in_index.shape[0]
    lists = _kernels_lists(_LINEAR_VALUES, (grad, x), x.shape[0], in_index, out_index, *sizes)
    if lists is None:
        return channel_plain.linear_grad_values(grad, x, in_index, out_index).contiguous()
    from sparseops.triton.channel_grads import weight_gradient

    rows = cuda.unit_rows(grad), cuda.unit_rows(x)
    return weight_gradient(*rows, lists.inputs.for_kernels(), lists.outputs.for_kernels())


def _linear_values_fake(grad: Tensor, x: Tensor, in_index: Tensor, out_index: Tensor) -> Tensor:
    return grad.new_empty((out_index.shape[0], in_index.shape[0]))


def _linear_values_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _linear_values_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    """In grad it is linear as the layer is in its values, in x as in its x."""
    grad, x, in_index, out_index = ctx.saved_tensors
    layer, needs = torch.ops.sparseops.channel_linear, ctx.needs_input_grad
    grad_grad = grad_x = None
    if needs[0]:
        grad_grad = layer(x, cotangent, in_index, out_index, None, None, grad.shape[1], "none")
    if needs[1]:
        grad_x = layer(grad, cotangent.t(), out_index, in_index, None, None, x.shape[1], "none")
    return grad_grad, grad_x, None, None


_linear_values_op = registry.define(
    f"{_LINEAR_VALUES}(Tensor grad, Tensor x, Tensor in_index, Tensor out_index) -> Tensor",
    impl=_linear_values,
    fake=_linear_values_fake,
    setup_context=_linear_values_setup,
    backward=_linear_values_backward,
    vmap=_vmap_of(_LINEAR_VALUES),
    autocast=False,
)


# ---- the values of channel_conv


def _conv_values(
    grad: Tensor, x: Tensor, in_index: Tensor, out_index: Tensor, width: int, *sizes: Any
) -> Tensor:
    geometry = Geometry(*sizes)
    pixels = x.shape[0] * prod(grad.shape[2:])
    lists = _kernels_lists(
        _CONV_VALUES,
        (grad, x),
        pixels,
        in_index,
        out_index,
        x.shape[1],
        grad.shape[1],
        width,
        geometry.groups,
    )
    if lists is None:
        values = x.new_empty((out_index.shape[0], *geometry.kernel_size, width))  # whose shape counts
        _, grad_values = channel_plain.conv_grads(grad, x, values, in_index, out_index, geometry, False, True)
        assert grad_values is not None
        return grad_values.contiguous()
    from sparseops.triton.channel_grads import weight_gradient

    sides = lists.inputs.for_kernels(), lists.outputs.for_kernels()
    return weight_gradient(channels_last(grad), channels_last(x), *sides, taps_of(geometry))


def _conv_values_fake(
    grad: Tensor, x: Tensor, in_index: Tensor, out_index: Tensor, width: int, *sizes: Any
) -> Tensor:
    return grad.new_empty((out_index.shape[0], *Geometry(*sizes).kernel_size, width))


def _conv_values_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _ = inputs[:5]
    ctx.geometry = Geometry(*inputs[5:])
    ctx.save_for_backward(*tensors)


def _conv_values_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    """In grad it is linear as the layer is in its values, in x as in its x."""
    grad, x, in_index, out_index = ctx.saved_tensors
    grad_grad = grad_x = None
    if ctx.needs_input_grad[0]:
        grad_grad = _layer(x, cotangent, in_index, out_index, grad.shape[1], ctx.geometry)
    if ctx.needs_input_grad[1]:
        grad_x = _conv_x_op(grad, cotangent, in_index, out_index, *x.shape[1:], *ctx.geometry)
    return grad_grad, grad_x, *(None,) * 8


_conv_values_op = registry.define(
    f"{_CONV_VALUES}(Tensor grad, Tensor x, Tensor in_index, Tensor out_index, SymInt width, {_GEOMETRY}) "
    "-> Tensor",
    impl=_conv_values,
    fake=_conv_values_fake,
    setup_context=_conv_values_setup,
    backward=_conv_values_backward,
    vmap=_vmap_of(_CONV_VALUES),
    autocast=False,
)


def _layer(
    x: Tensor, values: Tensor, in_index: Tensor, out_index: Tensor, outputs: int, geometry: Geometry
) -> Tensor:
    layer = torch.ops.sparseops.channel_conv
    y: Tensor = layer(x, values, in_index, out_index, None, None, outputs, *geometry, "none")
    return y


# ---- the images of channel_conv


def _conv_x(
    grad: Tensor,
    values: Tensor,
    in_index: Tensor,
    out_index: Tensor,
    channels: int,
    height: int,
    width: int,
    *sizes: Any,
) -> Tensor:
    geometry = Geometry(*sizes)
    lists = None
    # A kernel multiplies zeros at most taps where there is a stride, and the expanded weight, which plain
    # torch takes where there are groups, has more of them.
    if geometry.groups > 1 or max(geometry.stride) == 1:
        lists = _kernels_lists(
            _CONV_X,
            (grad, values),
            grad.shape[0] * height * width,
            in_index,
            out_index,
            channels,
            grad.shape[1],
            values.shape[-1],
            geometry.groups,
        )
    is_last = is_channels_last(grad)
    if lists is None:
        x = grad.new_empty(1).expand(grad.shape[0], channels, height, width)  # whose shape counts
        grad_x, _ = channel_plain.conv_grads(grad, x, values, in_index, out_index, geometry, True, False)
        assert grad_x is not None
    else:
        from sparseops.triton.channel_conv import input_gradient

        sides = lists.inputs.for_kernels(), lists.outputs.for_kernels()
        grad_x = input_gradient(
            channels_last(grad), values.contiguous(), *sides, taps_of(geometry), height, width
        )
        if is_last:
            return grad_x
    return empty_output(grad, (*grad_x.shape,), is_last).copy_(grad_x)


def _conv_x_fake(
    grad: Tensor,
    values: Tensor,
    in_index: Tensor,
    out_index: Tensor,
    channels: int,
    height: int,
    width: int,
    *_: Any,
) -> Tensor:
    return empty_output(grad, (grad.shape[0], channels, height, width), is_channels_last(grad))


def _conv_x_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.geometry = Geometry(*inputs[7:])
    ctx.save_for_backward(*inputs[:4])


def _conv_x_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    """In grad it is linear as the layer is in its values' gradient, in values as in its x."""
    grad, values, in_index, out_index = ctx.saved_tensors
    grad_grad = grad_values = None
    if ctx.needs_input_grad[0]:
        grad_grad = _layer(cotangent, values, in_index, out_index, grad.shape[1], ctx.geometry)
    if ctx.needs_input_grad[1]:
        width = values.shape[-1]
        grad_values = _conv_values_op(grad, cotangent, in_index, out_index, width, *ctx.geometry)
    return grad_grad, grad_values, *(None,) * 10


_conv_x_op = registry.define(
    f"{_CONV_X}(Tensor grad, Tensor values, Tensor in_index, Tensor out_index, SymInt channels, "
    f"SymInt height, SymInt width, {_GEOMETRY}) -> Tensor",
    impl=_conv_x,
    fake=_conv_x_fake,
    setup_context=_conv_x_setup,
    backward=_conv_x_backward,
    vmap=_vmap_of(_CONV_X),
    autocast=False,
)
