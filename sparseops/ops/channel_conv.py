"""``channel_conv``: 2-D convolution (cross-correlation, as torch's) with a weight w [O, C / groups, R, S] of
which whole output and input channels are zero.

y[n, o, p, q] = act(bias[o] + residual[n, o, p, q] + sum over c, r, s of w[o, c, r, s] * x[n, c, h, v])
    h = p * stride + r * dilation - padding, v likewise from q and s; c runs over the channels of o's group

``sparseops.formats.channel_pruned`` draws the layout of values [O', R, S, C'], in_index and out_index; with
``meta`` the compact weight is 2:4 as ``nm24_conv`` takes it. A 1-D convolution is one with a height of 1. On
the CPU the kept channels are gathered, channels last, torch convolves them densely, and the kept outputs are
scattered into y, which is written once. Each of these rounds as plain torch does.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from sparseops import triton
from sparseops.formats.nm24 import expand, packed_cols, unpack_columns
from sparseops.ops import channel_grads, channel_plain, onednn, registry
from sparseops.ops.channel_conv_cases import cases
from sparseops.ops.channels import (
    Channels,
    channels_of,
    check_lists,
    gather_images,
    is_composed,
    kernel_name,
    no_kernel_reason,
    read_lists,
    scatter_images,
)
from sparseops.ops.common import (
    activate,
    activation_grad,
    check_devices,
    check_dtypes,
    check_epilogue,
    check_residual,
    check_weight,
    finish,
    layer_vmap,
    saved_epilogue,
)
from sparseops.ops.conv_geometry import (
    Geometry,
    Pair,
    check_channels,
    empty_output,
    geometry_of,
    is_channels_last,
    output_size,
    pad_unevenly,
)
from sparseops.ops.nm24_conv import nm24_conv

NAME = "channel_conv"
_BYTES_AT_ONCE = 1 << 22  # of gathered and not yet scattered images, so that they stay in a cache


def channel_conv_reference(
    x: Tensor,
    values: Tensor,
    in_index: Tensor,
    out_index: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    outputs: int,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    meta: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """Plain torch: expand the weight and call ``F.conv2d``."""
    geometry = geometry_of(NAME, kernel_size, stride, padding, dilation, groups)
    if meta is not None:
        values = _dense_values(expand(values, meta), in_index, x.shape[-3], geometry)
    values = _with_taps(values, geometry)
    return channel_plain.dense_conv(
        x, values, in_index, out_index, bias, residual, outputs, geometry, activation
    )


def _with_taps(values: Tensor, geometry: Geometry) -> Tensor:
    """values [O', L, C'] of a 1-D convolution as [O', R, S, C']."""
    return values.unflatten(1, tuple(geometry.kernel_size)) if values.ndim == 3 else values


def _dense_values(columns: Tensor, in_index: Tensor, channels: int, geometry: Geometry) -> Tensor:
    """The packed columns of a compact 2:4 weight as values [O', R, S, C']."""
    kernel_size, groups = geometry.kernel_size, geometry.groups
    width = in_index.shape[0]
    if groups > 1:
        width = int(torch.bincount(in_index.long() // (channels // groups), minlength=groups).max())
    return unpack_columns(columns, (columns.shape[0], width, *kernel_size)).permute(0, 2, 3, 1)


def supports(x: Tensor, values: Tensor | None = None, *_: Any, **__: Any) -> str | None:
    """Why no kernel can run on ``x`` and ``values``, None if one can; looks at devices and dtypes alone."""
    return no_kernel_reason(x, values)


def _check(
    x: Tensor,
    values: Tensor,
    in_index: Tensor,
    out_index: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    outputs: int,
    geometry: Geometry,
    activation: str,
) -> tuple[int, int]:
    """Check every argument but the devices and the contents of the lists, and return the height and width of
    the output."""
    check_dtypes(NAME, x, values)
    in_group = check_channels(NAME, x, outputs, geometry)
    shape, taps = values.shape, tuple(geometry.kernel_size)
    if len(shape) not in (3, 4) or shape[1:-1] not in (taps, (prod(taps),)) or shape[-1] > in_group:
        raise ValueError(
            f"{NAME}: values must have shape [O', R, S, C'] or [O', R * S, C'] with a kernel_size of {taps} "
            f"and at most {in_group} channels, got {tuple(shape)}"
        )
    check_lists(NAME, shape[0], in_index, out_index, x.shape[1], outputs)
    check_epilogue(NAME, x, bias, outputs, activation)
    size = output_size(NAME, x, geometry)
    check_residual(NAME, x, residual, (x.shape[0], outputs, *size))
    return size


def _impl(x: Tensor, values: Tensor, in_index: Tensor, out_index: Tensor, *rest: Any) -> Tensor:
    bias, residual, outputs, *sizes, activation = rest
    geometry = Geometry(*sizes)
    args = (x, values, in_index, out_index, bias, residual, outputs, geometry, activation)
    size = _check(*args)
    _check_devices(x, values, in_index, out_index, bias, residual)
    reason = supports(x, values)
    if reason is None and not triton.serves(x):
        return _kernel(*args, size)
    lists = channels_of(NAME, in_index, out_index, x.shape[1], outputs, values.shape[-1], geometry.groups)
    if reason is not None:
        registry.fall_back(NAME, reason)
    elif x.shape[0] and outputs and not is_composed(lists, x.shape[0] * prod(size)):
        return _in_triton(lists, x, values, bias, residual, geometry, activation, size)
    y = channel_plain.conv(x, _with_taps(values, geometry), *args[2:])
    return empty_output(x, (*y.shape,), is_channels_last(x)).copy_(y)


def _check_devices(
    x: Tensor,
    values: Tensor,
    in_index: Tensor,
    out_index: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    lists = {"in_index": in_index, "out_index": out_index}
    check_devices(NAME, "x", x=x, values=values, **lists, bias=bias, residual=residual)


def _kernel(
    x: Tensor,
    values: Tensor,
    in_index: Tensor,
    out_index: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    outputs: int,
    geometry: Geometry,
    activation: str,
    size: tuple[int, int],
) -> Tensor:
    """Run on checked tensors on the CPU."""
    batch, width, height, columns = x.shape
    lists = channels_of(NAME, in_index, out_index, width, outputs, values.shape[-1], geometry.groups)
    channels_last = is_channels_last(x)
    if not (batch and outputs):
        return empty_output(x, (batch, outputs, *size), channels_last)
    offset = bias
    if bias is not None and lists.scatter is not None:
        offset = lists.pad_rows(bias.index_select(0, out_index))
    inner = activation if residual is None else "none"
    constants = None if bias is None else activate(bias, inner)
    image = height * columns * values.shape[-1] * lists.groups + size[0] * size[1] * lists.padded_rows
    step = max(1, _BYTES_AT_ONCE // (image * x.element_size()))
    if batch <= step:
        z = activate(_compact(x, values, offset, lists, geometry, size), inner)
        y = scatter_images(lists, z, constants, channels_last)
    else:
        y = empty_output(x, (batch, outputs, *size), channels_last)
        for some, there in zip(x.split(step), y.split(step), strict=True):
            z = activate(_compact(some, values, offset, lists, geometry, size), inner)
            scatter_images(lists, z, constants, channels_last, there)
    return y if residual is None else activate(y.add_(residual), activation)


def _compact(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    lists: Channels,
    geometry: Geometry,
    size: tuple[int, int],
) -> Tensor:
    """The dense convolution of what is kept."""
    kernel_size, stride, padding, dilation, _ = geometry
    kept = gather_images(lists, x)
    if (
        (*kernel_size, *stride, *padding) == (1, 1, 1, 1, 0, 0, 0, 0)
        and lists.groups == 1
        and kept.is_contiguous(memory_format=torch.channels_last)
    ):
        pixels = kept.permute(0, 2, 3, 1)
        z = onednn.linear(pixels.flatten(0, 2), values.flatten(1), bias, values)
        return z.view(*pixels.shape[:3], z.shape[1]).permute(0, 3, 1, 2)
    kept, border = pad_unevenly(kept, padding)

    def weight(values: Tensor) -> Tensor:
        return lists.pad_rows(_with_taps(values, geometry)).permute(0, 3, 1, 2)

    outputs, key = x.shape[0] * size[0] * size[1], (tuple(kernel_size), lists.rows)
    return onednn.conv(kept, values, weight, bias, stride, border, dilation, lists.groups, outputs, key)


def _in_triton(
    lists: Channels,
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    activation: str,
    size: tuple[int, int],
) -> Tensor:
    """Run the kernel in Triton on checked tensors."""
    from sparseops.triton.channel_conv import conv

    y = conv(
        x if x.stride(1) == 1 else channel_grads.channels_last(x),
        values.contiguous(),
        None if bias is None else bias.contiguous(),
        None if residual is None else channel_grads.channels_last(residual),
        lists.inputs.for_kernels(),
        lists.outputs.for_kernels(),
        channel_grads.taps_of(geometry),
        size,
        activation,
    )
    return y if is_channels_last(x) else empty_output(x, (*y.shape,), False).copy_(y)


def _fake(x: Tensor, values: Tensor, in_index: Tensor, out_index: Tensor, *rest: Any) -> Tensor:
    bias, residual, outputs, *sizes, activation = rest
    geometry = Geometry(*sizes)
    size = _check(x, values, in_index, out_index, bias, residual, outputs, geometry, activation)
    _check_devices(x, values, in_index, out_index, bias, residual)
    return empty_output(x, (x.shape[0], outputs, *size), is_channels_last(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, in_index, out_index, bias, residual, ctx.outputs, *sizes, ctx.activation = inputs
    ctx.geometry = Geometry(*sizes)
    ctx.save_for_backward(
        x,
        values,
        in_index,
        out_index,
        *saved_epilogue(ctx.activation, bias, residual, output),
    )
    onednn.forget(values)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, in_index, out_index, bias, residual, y = ctx.saved_tensors
    at = y
    if ctx.activation in ("silu", "gelu"):
        at = _op(x, values, in_index, out_index, bias, residual, ctx.outputs, *ctx.geometry, "none")
    grad = activation_grad(grad, at, ctx.activation)
    needs = ctx.needs_input_grad
    grad_x = grad_values = None
    if needs[0] or needs[1]:
        taps = _with_taps(values, ctx.geometry)
        grad_x, grad_values = channel_grads.conv_grads(
            grad, x, taps, in_index, out_index, ctx.geometry, needs[0], needs[1]
        )
        grad_values = None if grad_values is None else grad_values.reshape(values.shape)
    grad_bias = grad.sum((0, 2, 3)) if needs[4] else None
    return (
        grad_x,
        grad_values,
        None,
        None,
        grad_bias,
        grad if needs[5] else None,
        *(None,) * 7,
    )


def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    return layer_vmap(_op, info, in_dims, args, residual=5, images=True)


_op = registry.define(
    f"{NAME}(Tensor x, Tensor values, Tensor in_index, Tensor out_index, Tensor? bias, Tensor? residual, "
    "SymInt outputs, int[2] kernel_size, int[2] stride, int[4] padding, int[2] dilation, int groups, "
    "str activation) -> Tensor",
    impl=_impl,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    vmap=_vmap,
    autocast=True,
)


def channel_conv(
    x: Tensor,
    values: Tensor,
    in_index: Tensor,
    out_index: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    outputs: int,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    meta: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """2-D convolution that reads only some channels and computes only some outputs; the others are what a
    dense layer with zeros in its weight has there, the activation of bias and residual.

    Where no kernel can run (``supports`` says why) the same is done in plain torch, and a warning says so
    once.

    Args:
        x: images [N, C, H, W] or [C, H, W], float16, bfloat16, float32 or float64.
        values: compact weight [O', R, S, C'] (or [O', L, C'] with R * S = L) in the dtype of x, C' being the
            most channels that a group keeps; with ``meta`` its 2:4 form [O', P/2].
        in_index: the channels of x that are kept, int32, ascending. A channel that is not kept may be NaN.
        out_index: the outputs that are kept [O'], int32, ascending.
        bias: [O] in the dtype of x, or None.
        residual: what is added before the activation, of the shape of the result and the dtype of x, or None.
        outputs: O.
        kernel_size: (R, S), or one int for both.
        stride, dilation: ints or (height, width).
        padding: zeros on each side, an int or (height, width); ``"valid"`` is none, ``"same"`` keeps the size
            at stride 1 (the odd one goes to the bottom and right).
        groups: divides C and O. With several, ``meta`` is expanded.
        meta: the metadata [O', P/8] of the compact weight's 2:4 form, or None.
        activation: ``"none"``, ``"relu"``, ``"silu"`` or ``"gelu"`` (the exact one).

    Returns:
        [N, O, P, Q] or [O, P, Q] in the memory format of x, sized as ``torch.nn.Conv2d`` says;
        differentiable in x, values, bias and residual.

    Raises:
        TypeError: a dtype or the type of a size is wrong.
        ValueError: a shape, size, device, list or the activation is wrong, or a ``SPARSEOPS_*`` variable is.
    """
    geometry = geometry_of(NAME, kernel_size, stride, padding, dilation, groups)
    images = x.unsqueeze(0) if x.ndim == 3 else x
    if residual is not None and x.ndim == 3:
        residual = residual.unsqueeze(0)
    if meta is None:
        args = (images, values, in_index, out_index, bias, residual, outputs)
        y = _call(*args, geometry, activation)
    else:
        y = _of_24(images, values, in_index, out_index, bias, residual, outputs, meta, geometry, activation)
    return y.squeeze(0) if x.ndim == 3 else y


def _call(
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
    args = (x, values, in_index, out_index, bias, residual)
    if residual is None and registry.fast(x, values, in_index, bias, out_index):
        size = _check(*args, outputs, geometry, activation)
        return _kernel(*args, outputs, geometry, activation, size)
    if registry.fast_on_gpu(*args):
        return _impl(*args, outputs, *geometry, activation)
    if reason := registry.transform_reason():
        registry.fall_back(NAME, reason)
        return channel_plain.dense_conv(
            x, _with_taps(values, geometry), *args[2:], outputs, geometry, activation
        )
    return _op(*args, outputs, *geometry, activation)


def _of_24(
    x: Tensor,
    values: Tensor,
    in_index: Tensor,
    out_index: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    outputs: int,
    meta: Tensor,
    geometry: Geometry,
    activation: str,
) -> Tensor:
    """The layer whose compact weight is 2:4, of calls that each have a gradient."""
    x, values, bias, residual = registry.autocast(x, values, bias, residual)
    rows, packed = check_weight(NAME, x, values, meta, None, "none")
    check_channels(NAME, x, outputs, geometry)
    check_lists(NAME, rows, in_index, out_index, x.shape[1], outputs)
    check_epilogue(NAME, x, bias, outputs, activation)
    check_residual(NAME, x, residual, (x.shape[0], outputs, *output_size(NAME, x, geometry)))
    _check_devices(x, values, in_index, out_index, bias, residual)
    check_devices(NAME, "x", x=x, meta=meta)
    if geometry.groups > 1:
        columns = torch.ops.sparseops.nm24_to_dense(values, meta)
        dense = _dense_values(columns, in_index, x.shape[1], geometry)
        return _call(x, dense, in_index, out_index, bias, residual, outputs, geometry, activation)
    kept = in_index.shape[0]
    expected = packed_cols((rows, kept, *geometry.kernel_size))
    if packed != expected:
        raise ValueError(
            f"{NAME}: values must have {expected} packed columns for the {kept} channels of in_index and a "
            f"kernel_size of {tuple(geometry.kernel_size)}, got {packed}"
        )
    read_lists(NAME, in_index, out_index, x.shape[1], outputs, kept)
    offset = None if bias is None else channel_plain.select(bias, 0, out_index)
    options: dict[str, Any] = {
        "kernel_size": geometry.kernel_size,
        "stride": geometry.stride,
        "dilation": geometry.dilation,
    }
    if residual is None and registry.fast(x, values, meta, bias, out_index) and x.shape[0]:
        lists = channels_of(NAME, in_index, out_index, x.shape[1], outputs, kept)
        padded, border = pad_unevenly(gather_images(lists, x), geometry.padding)
        z = nm24_conv(padded, values, meta, offset, padding=border, activation=activation, **options)
        constants = None if bias is None else activate(bias, activation)
        return scatter_images(lists, z, constants, is_channels_last(x))
    padded, border = pad_unevenly(channel_plain.select(x, 1, in_index), geometry.padding)
    z = nm24_conv(padded, values, meta, offset, padding=border, **options)
    y = finish(channel_plain.spread(z, 1, out_index, bias, outputs), residual, activation)
    return y.contiguous(memory_format=torch.channels_last) if is_channels_last(x) else y.contiguous()


def prepare(
    values: Tensor,
    in_index: Tensor,
    out_index: Tensor,
    *,
    outputs: int,
    channels: int,
    groups: int = 1,
    meta: Tensor | None = None,
    **_: Any,
) -> None:
    """Read the lists of a weight that has just come to a device or changed there."""
    if meta is None:
        read_lists(NAME, in_index, out_index, channels, outputs, values.shape[-1], groups)


registry.register(
    registry.Op(
        name=NAME,
        fn=channel_conv,
        reference=channel_conv_reference,
        supports=supports,
        impls=registry.cpu_impls("any floating dtype, any shape; torch's own convolution between two copies")
        | {("cuda", "triton"): "f32, f16 and bf16, any shape"},
        cases=cases(channel_conv_reference),
        prepare=prepare,
        kernel=kernel_name,
    )
)
