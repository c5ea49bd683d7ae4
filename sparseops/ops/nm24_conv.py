"""``nm24_conv``: 2-D convolution (cross-correlation, as torch's) with a 2:4 weight w [O, C / groups, R, S].

y[n, o, p, q] = act(bias[o] + residual[n, o, p, q] + sum over c, r, s of w[o, c, r, s] * x[n, c, h, v])
    h = p * stride + r * dilation - padding, v likewise from q and s; c runs over the channels of o's group

``sparseops.formats.nm24`` draws the layout of values [O, P/2] and meta [O, P/8]: columns are (r, s, c), so
the kernel size has to be given. A 1-D convolution is one with a height of 1. In float16 and bfloat16 the
kernels accumulate in float32 and round once (with a residual the CPU rounds three times, as plain torch
does).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseops import _native
from sparseops.formats.nm24 import expand, gather, pack_columns, packed_cols, unpack_columns
from sparseops.ops import cuda, cuda_conv, registry
from sparseops.ops.common import (
    ACTIVATIONS,
    activate,
    activation_grad,
    check_devices,
    check_residual,
    check_weight,
    cropped,
    finish,
    layer_vmap,
    make_bias,
    make_weight,
    rows_at_once,
    saved_epilogue,
    to_channels_last,
)
from sparseops.ops.conv_geometry import (
    Geometry,
    Pair,
    check_channels,
    empty_output,
    geometry_of,
    is_channels_last,
    no_wgmma_reason,
    output_size,
    pad_unevenly,
    pair,
)
from sparseops.ops.nm24_to_dense import expanded

NAME = "nm24_conv"
_LEAST_GROUP_CHANNELS = 16  # of the CUDA kernel: fewer leave most of a tile idle


def nm24_conv_reference(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    activation: str = "none",
) -> Tensor:
    """Plain torch: expand the weight and call ``F.conv2d``."""
    geometry = geometry_of(NAME, kernel_size, stride, padding, dilation, groups)
    return _dense(x, expand(values, meta), bias, residual, geometry, activation)


def _dense(
    x: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    activation: str,
) -> Tensor:
    _, stride, padding, dilation, groups = geometry
    weight = _unpacked(x, columns, geometry)
    x, border = pad_unevenly(x, padding)
    return finish(F.conv2d(x, weight, bias, stride, border, dilation, groups), residual, activation)


def _unpacked(x: Tensor, columns: Tensor, geometry: Geometry) -> Tensor:
    shape = (columns.shape[0], x.shape[-3] // geometry.groups, *geometry.kernel_size)
    return unpack_columns(columns, shape)


def supports(
    x: Tensor, values: Tensor | None = None, *_: Any, groups: int = 1, channels: int | None = None
) -> str | None:
    """Why no kernel can run on ``x`` and ``values``, None if one can; looks at devices and dtypes alone, and
    at groups and channels (by default those of ``x``), if there are several groups."""
    if reason := cuda.no_product_reason(x, values):
        return reason
    if groups > 1 and registry.on_gpu(x):
        in_group = (x.shape[-3] if channels is None else channels) // groups
        if in_group < _LEAST_GROUP_CHANNELS:
            return f"the CUDA kernel needs {_LEAST_GROUP_CHANNELS} channels in each group, got {in_group}"
    return None


def no_wgmma(values: Tensor, *, groups: int, channels: int) -> str | None:
    """Why no kernel by wgmma.sp can run on ``values``, None if one can for most geometries."""
    return cuda.no_wgmma_reason(values, values.shape[0], values.dtype) or no_wgmma_reason(channels, groups)


def _check(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    activation: str,
) -> tuple[int, int]:
    """Check every argument but the devices, and return the height and width of the output."""
    rows, packed = check_weight(NAME, x, values, meta, bias, activation)
    in_group = check_channels(NAME, x, rows, geometry)
    expected = packed_cols((1, in_group, *geometry.kernel_size))
    if expected != packed:
        raise ValueError(
            f"{NAME}: x must have channels that match values of {packed} packed columns, got {x.shape[1]} "
            f"channels ({expected} columns with groups={geometry.groups}, "
            f"kernel_size={tuple(geometry.kernel_size)})"
        )
    size = output_size(NAME, x, geometry)
    check_residual(NAME, x, residual, (x.shape[0], rows, *size))
    return size


def _kernel(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    activation: str,
    output: tuple[int, int],
) -> Tensor:
    """Run the CPU kernel on checked tensors."""
    batch, channels, height, width = x.shape
    rows, kept = values.shape
    kernel_size, stride, (top, _, left, _), dilation, groups = geometry
    channels_last = is_channels_last(x)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x.contiguous()
    y = empty_output(x, (batch, rows, *output), channels_last)
    if not (batch and rows):
        return y
    values, meta = values.contiguous(), meta.contiguous()
    bias = None if bias is None else bias.contiguous()
    _native.C.nm24_conv(
        x.data_ptr(),
        values.data_ptr(),
        meta.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        batch,
        channels,
        height,
        width,
        rows,
        *output,
        kept * 2,
        *kernel_size,
        *stride,
        top,
        left,
        *dilation,
        groups,
        channels_last,
        registry.KERNEL_DTYPES[x.dtype],
        ACTIVATIONS[activation],
        torch.get_num_threads(),
    )
    return y


def _impl(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, residual: Tensor | None, *rest: Any
) -> Tensor:
    geometry, activation = Geometry(*rest[:-1]), rest[-1]
    output = _check(x, values, meta, bias, residual, geometry, activation)
    check_devices(NAME, "x", x=x, values=values, meta=meta, bias=bias, residual=residual)
    reason = supports(x, values, groups=geometry.groups)
    if reason is not None:
        registry.fall_back(NAME, reason)
        y = _dense(x, expanded(values, meta), bias, residual, geometry, activation)
        return empty_output(x, (*y.shape,), is_channels_last(x)).copy_(y)
    if registry.on_gpu(x):
        return cuda_conv.conv(NAME, x, values, meta, bias, residual, geometry, activation, output)
    if residual is None:
        return _kernel(x, values, meta, bias, geometry, activation, output)
    z = _kernel(x, values, meta, bias, geometry, "none", output)
    return activate(z.add_(residual), activation)


def _fake(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, residual: Tensor | None, *rest: Any
) -> Tensor:
    output = _check(x, values, meta, bias, residual, Geometry(*rest[:-1]), rest[-1])
    check_devices(NAME, "x", x=x, values=values, meta=meta, bias=bias, residual=residual)
    return empty_output(x, (x.shape[0], values.shape[0], *output), is_channels_last(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, meta, bias, residual, *rest = inputs
    ctx.geometry, ctx.activation = Geometry(*rest[:-1]), rest[-1]
    ctx.save_for_backward(
        x,
        values,
        meta,
        *saved_epilogue(ctx.activation, bias, residual, output),
    )
    cuda.forget_values(values)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, meta, bias, residual, y = ctx.saved_tensors
    again = ctx.activation in ("silu", "gelu")
    at = _op(x, values, meta, bias, residual, *ctx.geometry, "none") if again else y
    grad = activation_grad(grad, at, ctx.activation)
    _, stride, (top, bottom, left, right), dilation, groups = ctx.geometry
    needs = ctx.needs_input_grad
    weight = _unpacked(x, torch.ops.sparseops.nm24_to_dense(values, meta), ctx.geometry)
    padded, border = pad_unevenly(x, ctx.geometry.padding)

    def backward(grad: Tensor, weight: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        options = ([weight.shape[0]], stride, border, dilation, False, [0, 0], groups, mask)
        return torch.ops.aten.convolution_backward(grad, padded, weight, *options)

    block = rows_at_once(weight[:1].numel() * weight.element_size())
    whole = groups > 1 or len(weight) <= block
    grad_x, grad_weight, grad_bias = backward(grad, weight, [needs[0], needs[1] and whole, needs[3]])
    grad_values = None
    if needs[1] and whole:
        grad_values = gather(pack_columns(grad_weight), meta)
    elif needs[1]:
        parts = zip(grad.split(block, 1), weight.split(block), meta.split(block), strict=True)
        mask = [False, True, False]
        grad_values = torch.cat([gather(pack_columns(backward(g, w, mask)[1]), m) for g, w, m in parts])
    if needs[0] and padded is not x:
        grad_x = F.pad(grad_x, (-left, -right, -top, -bottom))
    return grad_x, grad_values, None, grad_bias, grad if needs[4] else None, *(None,) * 6


def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    return layer_vmap(_op, info, in_dims, args, residual=4, images=True)


_op = registry.define(
    f"{NAME}(Tensor x, Tensor values, Tensor meta, Tensor? bias, Tensor? residual, int[2] kernel_size, "
    "int[2] stride, int[4] padding, int[2] dilation, int groups, str activation) -> Tensor",
    impl=_impl,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    vmap=_vmap,
    autocast=True,
)


def nm24_conv(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    activation: str = "none",
) -> Tensor:
    """2-D convolution with a 2:4 weight, bias, residual and activation in one pass.

    Where no kernel can run (``supports`` says why) the plain torch reference runs, and a warning says so
    once.

    Args:
        x: images [N, C, H, W] or [C, H, W], float16, bfloat16, float32 or float64.
        values: kept weights [O, P/2] in the dtype of x; P is R * S * (C / groups rounded up to a multiple of
            4), rounded up to a multiple of 32.
        meta: their columns [O, P/8], uint8.
        bias: [O] in the dtype of x, or None.
        residual: what is added before the activation, of the shape of the result and the dtype of x, or None.
        kernel_size: (R, S), or one int for both.
        stride, dilation: ints or (height, width).
        padding: zeros on each side, an int or (height, width); ``"valid"`` is none, ``"same"`` keeps the size
            at stride 1 (the odd one goes to the bottom and right).
        groups: divides C and O.
        activation: ``"none"``, ``"relu"``, ``"silu"`` or ``"gelu"`` (the exact one).

    Returns:
        [N, O, P, Q] or [O, P, Q] in the memory format of x, sized as ``torch.nn.Conv2d`` says;
        differentiable in x, values, bias and residual.

    Raises:
        TypeError: a dtype or the type of a size is wrong.
        ValueError: a shape, size, device or the activation is wrong, or a ``SPARSEOPS_*`` variable is.
    """
    geometry = geometry_of(NAME, kernel_size, stride, padding, dilation, groups)
    images = x.unsqueeze(0) if x.ndim == 3 else x
    if residual is None and registry.fast(images, values, meta, bias):
        output = _check(images, values, meta, bias, None, geometry, activation)
        y = _kernel(images, values, meta, bias, geometry, activation, output)
        return y.squeeze(0) if x.ndim == 3 else y
    if residual is not None and x.ndim == 3:
        residual = residual.unsqueeze(0)
    if registry.fast_on_gpu(images, values, meta, bias, residual):
        y = _impl(images, values, meta, bias, residual, *geometry, activation)
    elif reason := registry.transform_reason():
        registry.fall_back(NAME, reason)
        y = _dense(images, expand(values, meta), bias, residual, geometry, activation)
    else:
        y = _op(images, values, meta, bias, residual, *geometry, activation)
    return y.squeeze(0) if x.ndim == 3 else y


def _inputs(
    image: tuple[int, ...],
    out_channels: int,
    kernel_size: Pair,
    dtype: torch.dtype,
    *,
    groups: int = 1,
    bias: bool = True,
    residual: Callable[[Tensor], Tensor] | None = None,
    view: Callable[[Tensor], Tensor] | None = None,
    **options: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    taps = tuple(pair(NAME, "kernel_size", kernel_size))
    generator = torch.Generator().manual_seed(out_channels * image[-1])
    x = torch.randn(image, generator=generator).to(dtype)
    weight = make_weight((out_channels, image[-3] // groups, *taps), dtype, generator)
    offset = make_bias(out_channels, dtype, generator) if bias else None
    options |= {"kernel_size": kernel_size, "groups": groups}
    args: tuple[Any, ...] = (view(x) if view else x, weight.values, weight.meta, offset)
    if residual:
        y = nm24_conv_reference(x, weight.values, weight.meta, **options)
        args += (residual(torch.randn(y.shape, generator=generator).to(dtype)),)
    return args, options


def _case(name: str, *sizes: Any, **options: Any) -> registry.Case:
    return registry.Case(name, partial(_inputs, *sizes, **options))


CASES = (
    _case("pointwise", (2, 32, 5, 7), 24, 1),
    _case("lt_tile", (1, 4, 3, 3), 2, 3),
    _case("eq_tile", (1, 32, 8, 8), 32, 3, padding=1),
    _case("gt_tile", (2, 48, 9, 17), 40, 3, padding=1),
    _case("tail", (2, 7, 6, 11), 13, 3, padding=1),
    _case("one_channel", (2, 1, 7, 6), 5, 3, padding=1),
    _case("rgb_7x7_stride_2", (1, 3, 30, 29), 16, 7, stride=2, padding=3),
    _case("deep", (1, 160, 6, 5), 33, 3, padding=1),
    _case("wide_image", (1, 8, 2, 133), 9, 3, padding=1),
    _case("one_pixel", (3, 16, 1, 1), 12, 3, padding=1),
    _case("kernel_is_image", (2, 8, 4, 5), 6, (4, 5)),
    _case("one_dimensional", (2, 24, 1, 31), 20, (1, 5), padding=(0, 2)),
    _case("column_kernel", (2, 12, 9, 4), 10, (5, 1), padding=(2, 0)),
    _case("stride", (1, 16, 11, 10), 12, 3, stride=(2, 3), padding=(0, 2)),
    _case("pointwise_stride", (2, 16, 7, 7), 12, 1, stride=2),
    _case("dilation", (1, 16, 11, 12), 12, 3, dilation=(2, 3), padding=(2, 3)),
    _case("same_even_kernel", (1, 8, 7, 8), 12, (2, 4), padding="same", dilation=(1, 3)),
    _case("valid", (1, 8, 7, 8), 12, 3, padding="valid"),
    _case("huge_padding", (1, 8, 3, 2), 4, 3, padding=(9, 11)),
    _case("groups", (2, 24, 6, 5), 18, 3, groups=3, padding=1),
    _case("groups_tail", (2, 10, 6, 5), 4, 3, groups=2, padding=1),
    _case("depthwise", (1, 9, 6, 5), 18, 3, groups=9, padding=1),
    _case("no_bias", (1, 16, 5, 6), 12, 3, bias=False),
    _case("relu", (1, 16, 5, 6), 12, 3, padding=1, activation="relu"),
    _case("silu", (1, 16, 5, 6), 12, 3, padding=1, activation="silu"),
    _case("gelu", (2, 16, 5, 6), 12, 3, padding=1, activation="gelu"),
    _case("residual", (2, 16, 5, 6), 12, 3, padding=1, residual=torch.clone),
    _case(
        "residual_relu", (1, 16, 5, 6), 12, 3, stride=2, activation="relu", bias=False, residual=torch.clone
    ),
    _case("residual_silu", (2, 32, 5, 6), 70, 1, activation="silu", view=to_channels_last, residual=cropped),
    _case(
        "residual_unbatched", (16, 5, 6), 12, 3, activation="gelu", residual=lambda y: y.mT.contiguous().mT
    ),
    _case("unbatched", (16, 5, 6), 12, 3, padding=1),
    _case("channels_last", (2, 32, 7, 9), 24, 3, padding=1, view=to_channels_last),
    _case(
        "channels_last_tail",
        (2, 7, 6, 11),
        13,
        3,
        padding=1,
        stride=2,
        view=to_channels_last,
        activation="relu",
    ),
    _case("channels_last_groups", (2, 24, 6, 5), 18, 3, groups=3, padding=1, view=to_channels_last),
    _case("channels_last_pointwise", (2, 32, 5, 7), 24, 1, view=to_channels_last),
    _case("channels_last_one_channel", (2, 1, 7, 6), 5, 3, padding=1, view=to_channels_last),
    _case("channels_last_same_even", (1, 8, 7, 8), 12, (2, 4), padding="same", view=to_channels_last),
    _case("cropped", (2, 12, 6, 7), 8, 3, padding=1, view=cropped),
    _case(
        "cropped_channels_last", (2, 12, 6, 7), 8, 3, padding=1, view=lambda x: cropped(to_channels_last(x))
    ),
    _case("transposed", (2, 12, 6, 7), 8, 3, padding=1, view=lambda x: x.mT.contiguous().mT),
    _case("expanded", (1, 12, 6, 7), 8, 3, padding=1, view=lambda x: x.expand(3, -1, -1, -1)),
    _case("negated", (1, 12, 6, 7), 8, 3, padding=1, view=torch._neg_view),
    _case(
        "many_channels",
        (2, 64, 6, 7),
        40,
        3,
        padding=1,
        stride=(1, 2),
        residual=torch.clone,
        activation="silu",
    ),
    _case(
        "channels_last_many_channels",
        (1, 192, 5, 9),
        24,
        (1, 3),
        padding=(0, 3),
        dilation=2,
        view=to_channels_last,
    ),
    _case("empty", (0, 16, 5, 6), 12, 3, padding=1),
    _case("empty_channels_last", (0, 16, 5, 6), 12, 3, view=to_channels_last, activation="silu"),
)

registry.register(
    registry.Op(
        name=NAME,
        fn=nm24_conv,
        reference=nm24_conv_reference,
        supports=supports,
        impls=registry.cpu_impls("f32, f16 and bf16, any shape; contiguous and channels_last")
        | cuda.impls(
            "f16 and bf16 by mma.sp, groups of at least 16 channels, and by wgmma.sp on compute capability "
            "9.0, one group of a multiple of 64 channels; f32 where torch allows bf16 for it"
        ),
        cases=CASES,
        prepare=cuda.prepare,
        no_wgmma=no_wgmma,
    )
)
