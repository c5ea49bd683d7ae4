"""``nm24_conv``: 2-D convolution (cross-correlation, as torch's) with a 2:4 weight w [O, C / groups, R, S].

y[n, o, p, q] = act(bias[o] + sum over c, r, s of w[o, c, r, s] * x[n, c, h, v])
    h = p * stride + r * dilation - padding, v likewise from q and s; c runs over the channels of o's group

``sparseops.formats.nm24`` draws the layout of values [O, P/2] and meta [O, P/8]: columns are (r, s, c), so
the kernel size has to be given. A 1-D convolution is one with a height of 1. In float16 and bfloat16 the
kernels accumulate in float32 and round once.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseops import _native
from sparseops.formats.nm24 import expand, gather, pack_columns, packed_cols, unpack_columns
from sparseops.ops import registry
from sparseops.ops.common import (
    ACTIVATIONS,
    activate,
    activation_grad,
    check_devices,
    check_weight,
    loop_vmap,
    make_bias,
    make_weight,
)

NAME = "nm24_conv"

Pair = int | Sequence[int]


class Geometry(NamedTuple):
    """Everything about a convolution that is not a tensor, in the order of the op's schema."""

    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]  # top, bottom, left, right
    dilation: Sequence[int]
    groups: int


def _pair(name: str, value: Pair) -> Sequence[int]:
    if isinstance(value, int):
        return (value, value)
    if isinstance(value, (tuple, list)) and len(value) == 2:
        first, second = value
        if isinstance(first, int) and isinstance(second, int):
            return value
    raise TypeError(f"{NAME}: {name} must be an int or a pair of ints, got {value!r}")


def _geometry(kernel_size: Pair, stride: Pair, padding: Pair | str, dilation: Pair, groups: int) -> Geometry:
    kernel_size = _pair("kernel_size", kernel_size)
    stride = _pair("stride", stride)
    dilation = _pair("dilation", dilation)
    if not isinstance(padding, str):
        height, width = _pair("padding", padding)
        sides = (height, height, width, width)
    elif padding == "valid":
        sides = (0, 0, 0, 0)
    elif padding != "same":
        raise ValueError(
            f'{NAME}: padding must be an int, a pair of ints, "same" or "valid", got {padding!r}'
        )
    elif stride[0] != 1 or stride[1] != 1:
        raise ValueError(f'{NAME}: stride must be 1 with padding="same", got {tuple(stride)}')
    else:
        # an odd total puts the larger half at the bottom and at the right, as torch does
        total_h, total_w = (d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True))
        sides = (total_h // 2, total_h - total_h // 2, total_w // 2, total_w - total_w // 2)
    return Geometry(kernel_size, stride, sides, dilation, groups)


def nm24_conv_reference(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    activation: str = "none",
) -> Tensor:
    """Plain torch: expand the weight and call ``F.conv2d``."""
    geometry = _geometry(kernel_size, stride, padding, dilation, groups)
    return _by_reference(x, values, meta, bias, geometry, activation)


def _by_reference(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, geometry: Geometry, activation: str
) -> Tensor:
    _, stride, (top, bottom, left, right), dilation, groups = geometry
    weight = _dense(x, values, meta, geometry)
    if (top, left) != (bottom, right):
        x = F.pad(x, (left, right, top, bottom))
        top = left = 0
    return activate(F.conv2d(x, weight, bias, stride, (top, left), dilation, groups), activation)


def _dense(x: Tensor, values: Tensor, meta: Tensor, geometry: Geometry) -> Tensor:
    shape = (values.shape[0], x.shape[-3] // geometry.groups, *geometry.kernel_size)
    return unpack_columns(expand(values, meta), shape)


def supports(x: Tensor, values: Tensor | None = None, *_: Any) -> str | None:
    """Why no kernel can run on ``x`` and ``values``, None if one can; looks at devices and dtypes alone."""
    return registry.no_kernel_reason(x, values)


def _check(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, geometry: Geometry, activation: str
) -> tuple[int, int]:
    """Check every argument but the devices, and return the height and width of the output."""
    rows, packed = check_weight(NAME, x, values, meta, bias, activation)
    kernel_size, stride, padding, dilation, groups = geometry
    if x.ndim != 4:
        raise ValueError(f"{NAME}: x must have shape [N, C, H, W] or [C, H, W], got {tuple(x.shape)}")
    if min(*kernel_size, *stride, *dilation) < 1 or min(padding) < 0:
        _refuse_size(geometry)
    _, channels, *spatial = x.shape
    if groups < 1 or channels < 1 or channels % groups or rows % groups:
        raise ValueError(
            f"{NAME}: groups must be at least 1 and divide the channels in and out, "
            f"got {groups} for {channels} and {rows}"
        )
    expected = packed_cols((1, channels // groups, *kernel_size))
    if expected != packed:
        raise ValueError(
            f"{NAME}: x must have channels that match values of {packed} packed columns, got "
            f"{channels} channels ({expected} columns with groups={groups}, kernel_size={tuple(kernel_size)})"
        )
    output = []
    for axis, size in enumerate(spatial):
        padded = size + padding[2 * axis] + padding[2 * axis + 1]
        extent = dilation[axis] * (kernel_size[axis] - 1) + 1
        if size < 1 or padded < extent:
            raise ValueError(
                f"{NAME}: x must have a height and width of at least 1 and, padded, of the dilated kernel's "
                f"extent, got {size} padded to {padded} for an extent of {extent}"
            )
        if padded >= 2**31:
            raise ValueError(
                f"{NAME}: padding must keep the padded x below 2**31 rows and columns, got {padded}"
            )
        output.append((padded - extent) // stride[axis] + 1)
    return output[0], output[1]


def _refuse_size(geometry: Geometry) -> None:
    for name, least in (("kernel_size", 1), ("stride", 1), ("dilation", 1), ("padding", 0)):
        sizes = tuple(getattr(geometry, name))
        if min(sizes) < least:
            raise ValueError(f"{NAME}: {name} must be at least {least}, got {sizes}")


def _is_channels_last(x: Tensor) -> bool:
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


def _empty_output(x: Tensor, shape: tuple[int, ...], channels_last: bool) -> Tensor:
    if not channels_last:
        return x.new_empty(*shape)  # sizes one by one: a tuple takes 0.6 us longer
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


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
    channels_last = _is_channels_last(x)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x.contiguous()
    y = _empty_output(x, (batch, rows, *output), channels_last)
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


def _impl(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    geometry, activation = Geometry(*rest[:-1]), rest[-1]
    output = _check(x, values, meta, bias, geometry, activation)
    check_devices(NAME, "x", x=x, values=values, meta=meta, bias=bias)
    reason = supports(x, values)
    if reason is None:
        return _kernel(x, values, meta, bias, geometry, activation, output)
    registry.fall_back(NAME, reason)
    y = _by_reference(x, values, meta, bias, geometry, activation)
    return _empty_output(x, (*y.shape,), _is_channels_last(x)).copy_(y)


def _fake(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    output = _check(x, values, meta, bias, Geometry(*rest[:-1]), rest[-1])
    check_devices(NAME, "x", x=x, values=values, meta=meta, bias=bias)
    return _empty_output(x, (x.shape[0], values.shape[0], *output), _is_channels_last(x))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, meta, bias, *rest = inputs
    ctx.geometry, ctx.activation = Geometry(*rest[:-1]), rest[-1]
    ctx.save_for_backward(x, values, meta, bias, output if ctx.activation == "relu" else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, meta, bias, y = ctx.saved_tensors
    at = _op(x, values, meta, bias, *ctx.geometry, "none") if ctx.activation in ("silu", "gelu") else y
    grad = activation_grad(grad, at, ctx.activation)
    _, stride, (top, bottom, left, right), dilation, groups = ctx.geometry
    is_symmetric = (top, left) == (bottom, right)
    needs = ctx.needs_input_grad
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad,
        x if is_symmetric else F.pad(x, (left, right, top, bottom)),
        _dense(x, values, meta, ctx.geometry),
        [values.shape[0]],
        stride,
        [top, left] if is_symmetric else [0, 0],
        dilation,
        False,
        [0, 0],
        groups,
        [needs[0], needs[1], needs[3]],
    )
    if needs[0] and not is_symmetric:
        grad_x = F.pad(grad_x, (-left, -right, -top, -bottom))
    grad_values = gather(pack_columns(grad_weight), meta) if needs[1] else None
    return grad_x, grad_values, None, grad_bias, *(None,) * 6


def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    if any(dim is not None for dim in in_dims[1:4]):
        return loop_vmap(_op, info, in_dims, args), 0
    x = args[0].movedim(in_dims[0], 0)
    return _op(x.flatten(0, 1), *args[1:]).unflatten(0, x.shape[:2]), 0


_op = registry.define(
    f"{NAME}(Tensor x, Tensor values, Tensor meta, Tensor? bias, int[2] kernel_size, int[2] stride, "
    "int[4] padding, int[2] dilation, int groups, str activation) -> Tensor",
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
    *,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    activation: str = "none",
) -> Tensor:
    """2-D convolution with a 2:4 weight, bias and activation in one pass.

    Where no kernel can run (``supports`` says why) the plain torch reference runs, and a warning says so
    once.

    Args:
        x: images [N, C, H, W] or [C, H, W], float16, bfloat16, float32 or float64.
        values: kept weights [O, P/2] in the dtype of x; P is R * S * (C / groups rounded up to a multiple of
            4), rounded up to a multiple of 32.
        meta: their columns [O, P/8], uint8.
        bias: [O] in the dtype of x, or None.
        kernel_size: (R, S), or one int for both.
        stride, dilation: ints or (height, width).
        padding: zeros on each side, an int or (height, width); ``"valid"`` is none, ``"same"`` keeps the size
            at stride 1 (the odd one goes to the bottom and right).
        groups: divides C and O.
        activation: ``"none"``, ``"relu"``, ``"silu"`` or ``"gelu"`` (the exact one).

    Returns:
        [N, O, P, Q] or [O, P, Q] in the memory format of x, sized as ``torch.nn.Conv2d`` says;
        differentiable in x, values and bias.

    Raises:
        TypeError: a dtype or the type of a size is wrong.
        ValueError: a shape, size, device or the activation is wrong, or a ``SPARSEOPS_*`` variable is.
    """
    geometry = _geometry(kernel_size, stride, padding, dilation, groups)
    images = x.unsqueeze(0) if x.ndim == 3 else x
    if registry.fast(images, values, meta, bias):
        output = _check(images, values, meta, bias, geometry, activation)
        y = _kernel(images, values, meta, bias, geometry, activation, output)
    elif reason := registry.transform_reason():
        registry.fall_back(NAME, reason)
        y = _by_reference(images, values, meta, bias, geometry, activation)
    else:
        y = _op(images, values, meta, bias, *geometry, activation)
    return y.squeeze(0) if x.ndim == 3 else y


def _inputs(
    image: tuple[int, ...],
    out_channels: int,
    kernel_size: Pair,
    dtype: torch.dtype,
    *,
    groups: int = 1,
    bias: bool = True,
    view: Callable[[Tensor], Tensor] | None = None,
    **options: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    taps = tuple(_pair("kernel_size", kernel_size))
    generator = torch.Generator().manual_seed(out_channels * image[-1])
    x = torch.randn(image, generator=generator).to(dtype)
    weight = make_weight((out_channels, image[-3] // groups, *taps), dtype, generator)
    offset = make_bias(out_channels, dtype, generator) if bias else None
    options |= {"kernel_size": kernel_size, "groups": groups}
    return (view(x) if view else x, weight.values, weight.meta, offset), options


def _case(name: str, *sizes: Any, **options: Any) -> registry.Case:
    return registry.Case(name, partial(_inputs, *sizes, **options))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _cropped(x: Tensor) -> Tensor:
    """``x`` inside a frame of NaN: neither contiguous nor channels_last, and reading past it shows."""
    return F.pad(x, (1, 2, 3, 1), value=torch.nan)[..., 3:-1, 1:-2]


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
    _case("unbatched", (16, 5, 6), 12, 3, padding=1),
    _case("channels_last", (2, 32, 7, 9), 24, 3, padding=1, view=_channels_last),
    _case(
        "channels_last_tail",
        (2, 7, 6, 11),
        13,
        3,
        padding=1,
        stride=2,
        view=_channels_last,
        activation="relu",
    ),
    _case("channels_last_groups", (2, 24, 6, 5), 18, 3, groups=3, padding=1, view=_channels_last),
    _case("channels_last_pointwise", (2, 32, 5, 7), 24, 1, view=_channels_last),
    _case("channels_last_one_channel", (2, 1, 7, 6), 5, 3, padding=1, view=_channels_last),
    _case("channels_last_same_even", (1, 8, 7, 8), 12, (2, 4), padding="same", view=_channels_last),
    _case("cropped", (2, 12, 6, 7), 8, 3, padding=1, view=_cropped),
    _case(
        "cropped_channels_last", (2, 12, 6, 7), 8, 3, padding=1, view=lambda x: _cropped(_channels_last(x))
    ),
    _case("transposed", (2, 12, 6, 7), 8, 3, padding=1, view=lambda x: x.mT.contiguous().mT),
    _case("expanded", (1, 12, 6, 7), 8, 3, padding=1, view=lambda x: x.expand(3, -1, -1, -1)),
    _case("negated", (1, 12, 6, 7), 8, 3, padding=1, view=torch._neg_view),
    _case("empty", (0, 16, 5, 6), 12, 3, padding=1),
    _case("empty_channels_last", (0, 16, 5, 6), 12, 3, view=_channels_last, activation="silu"),
)

registry.register(
    registry.Op(
        name=NAME,
        fn=nm24_conv,
        reference=nm24_conv_reference,
        supports=supports,
        impls=registry.cpu_impls("f32, f16 and bf16, any shape; contiguous and channels_last"),
        cases=CASES,
    )
)
