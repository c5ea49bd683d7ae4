"""Convolution with a channel-pruned weight as an implicit product, gather and scatter in it, channels last.

    y[p, out[n]] = act(bias[out[n]] + residual[p, out[n]]
                       + sum over taps and k of x[pixel(p, tap), in[k]] * w[n, tap, k])

p counts the pixels of y [N, OH, OW, outputs]; w is compact, [kept outputs, R, S, kept inputs of a group], and
``in`` and ``out`` are the kept channels of a group. pixel(p, tap) lies at (oh * stride + r * dilation - top,
ow * stride + s * dilation - left) of image n, and is 0 outside of it. A dropped output has no product: its
tiles come after those of kept ones. All taps are one loop, so that what the next one needs is loaded while
this one is multiplied.

TRANSPOSED computes the gradient of x: p counts its pixels, the sources are the pixels of y's gradient that a
tap reached from there, and in and out are exchanged. With a stride most taps reach none, and multiply zeros.

docs/kernels/channel.md has what is known of it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseops.triton import precision
from sparseops.triton.channel_tiles import (
    INDEX_LIMIT,
    OF_32_ROWS,
    Side,
    Taps,
    channels_at,
    outputs_of,
    product_config,
    store_tile,
    tables,
    tile_of,
    unit,
)
from sparseops.triton.common import Signature, device_of, dot, integers, pointers

CONFIGS: dict[str, dict[str, int]] = {
    "large": {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
    "narrow": {"BM": 128, "BN": 64, "BK": 64, "num_warps": 8, "num_stages": 4},
    "small": {"BM": 64, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 4},
    # 32 rows are fewer than tcgen05.mma takes, which computes in TF32: see channel_linear
    "float32": {"BM": 32, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 3},
}
"""By ``channel_tiles.product_config``."""


@triton.jit
def channel_conv_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr, in_ptr, in_starts_ptr, out_ptr, out_starts_ptr,
    rows, kept_in, kept_out, most_out, outputs, groups, row_height, row_width, height, width, taps,
    x_image, x_line, x_pixel, w_tap, stride_h, stride_w, top, left, dilation_h, dilation_w,
    S: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr, TRANSPOSED: tl.constexpr,
    UNIT_IN: tl.constexpr, UNIT_OUT: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """rows are the pixels of y (of x if TRANSPOSED), of images of row_height and row_width; height and width
    are those of the images that are read. kept_in, most_out: the most channels that any group keeps. kept_in
    and the strides of x are in units of UNIT_IN; kept_out, most_out and outputs of UNIT_OUT; w_tap, from tap
    to tap of w, of UNIT_IN, or UNIT_OUT if TRANSPOSED. WIDE: offsets within an image or within w may not fit
    32 bits. GATHER and SCATTER are the modes of what is read and written. The starts are given with several
    groups."""
    UNIT_W: tl.constexpr = UNIT_OUT if TRANSPOSED else UNIT_IN
    kept_in *= UNIT_IN
    kept_out *= UNIT_OUT
    most_out *= UNIT_OUT
    outputs *= UNIT_OUT
    column_tiles, dropped_tiles = tl.cdiv(most_out, BN), tl.cdiv(outputs - kept_out, BN)
    tile_row, tile_column, is_kept = tile_of(rows, groups * column_tiles, dropped_tiles, BM)
    in_first, out_first, in_columns, out_columns = 0, 0, kept_in, kept_out
    if in_starts_ptr is not None:
        group = tl.where(is_kept, tile_column // column_tiles, 0)
        tile_column -= group * column_tiles
        in_first = tl.multiple_of(tl.load(in_starts_ptr + group), UNIT_IN)
        in_columns = tl.multiple_of(tl.load(in_starts_ptr + group + 1) - in_first, UNIT_IN)
        out_first = tl.multiple_of(tl.load(out_starts_ptr + group), UNIT_OUT)
        out_columns = tl.multiple_of(tl.load(out_starts_ptr + group + 1) - out_first, UNIT_OUT)
        w_ptr += (in_first if TRANSPOSED else out_first).to(tl.int64) * (taps * w_tap * UNIT_W)
    row = tile_row * BM + tl.arange(0, BM)
    column = tile_column * BN + tl.arange(0, BN)
    row_mask = row < rows
    image = row // row_width // row_height
    x_rows = x_ptr + image.to(tl.int64) * (x_image * UNIT_IN)
    row_h, row_w = row // row_width % row_height, row % row_width
    if TRANSPOSED:
        row_h += top
        row_w += left
    else:
        row_h = row_h * stride_h - top
        row_w = row_w * stride_w - left
    chunk = tl.arange(0, BK)
    next_source = channels_at(in_ptr, 0, in_first + chunk, chunk < in_columns, GATHER)
    sums = tl.zeros((BM, BN), tl.float32)
    for step in range(0, tl.where(is_kept, taps * tl.cdiv(in_columns, BK), 0)):
        tap = step % taps
        k = step // taps * BK + chunk
        k_mask = k < in_columns
        source = next_source
        next_k = (step + 1) // taps * BK + chunk
        next_source = channels_at(in_ptr, 0, in_first + next_k, next_k < in_columns, GATHER)
        if TRANSPOSED:
            h = row_h - tap // S * dilation_h
            v = row_w - tap % S * dilation_w
            inside = (h >= 0) & (v >= 0) & (h % stride_h == 0) & (v % stride_w == 0)
            h //= stride_h
            v //= stride_w
        else:
            h = row_h + tap // S * dilation_h
            v = row_w + tap % S * dilation_w
            inside = (h >= 0) & (v >= 0)
        inside &= row_mask & (h < height) & (v < width)
        if WIDE:
            h = h.to(tl.int64)
            v = v.to(tl.int64)
            k = k.to(tl.int64)
        pixel = x_rows + (h * (x_line * UNIT_IN) + v * (x_pixel * UNIT_IN))
        x = tl.load(pixel[:, None] + source[None, :], mask=inside[:, None] & k_mask[None, :], other=0.0)
        if TRANSPOSED:
            w_at = w_ptr + (k * (taps * w_tap * UNIT_W) + tap * (w_tap * UNIT_W))[:, None] + column[None, :]
        else:
            w_row = column.to(tl.int64) * (taps * w_tap * UNIT_W) + tap * (w_tap * UNIT_W)
            w_at = w_ptr + w_row[None, :] + k[:, None]
        w = tl.load(w_at, mask=k_mask[:, None] & (column < out_columns)[None, :], other=0.0)
        sums = dot(x, w, sums, PRECISION)
    channel, channel_mask = outputs_of(
        out_ptr, out_first, kept_out, outputs, column, out_columns, is_kept, SCATTER
    )
    store_tile(
        sums,
        bias_ptr,
        residual_ptr,
        y_ptr,
        row,
        channel,
        row_mask,
        channel_mask,
        outputs,
        outputs,
        ACTIVATION,
    )


def conv(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    inputs: Side,
    outputs: Side,
    taps: Taps,
    size: tuple[int, int],
    activation: str,
) -> Tensor:
    """x [N, inputs, H, W] with a channel stride of 1, w [kept outputs, R, S, most kept inputs] contiguous,
    bias contiguous; residual and the result, [N, outputs, *size], are channels_last."""
    return _launch(x, w, bias, residual, inputs, outputs, taps, size, activation, transposed=False)


def input_gradient(
    grad: Tensor, w: Tensor, inputs: Side, outputs: Side, taps: Taps, height: int, width: int
) -> Tensor:
    """The gradient [N, inputs, height, width] of x, channels_last, from that of y [N, outputs, P, Q] with a
    channel stride of 1; inputs, outputs and w are those of the layer."""
    return _launch(grad, w, None, None, outputs, inputs, taps, (height, width), "none", transposed=True)


def _launch(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    inputs: Side,
    outputs: Side,
    taps: Taps,
    size: tuple[int, int],
    activation: str,
    *,
    transposed: bool,
) -> Tensor:
    """inputs is the side that is read, outputs the one that is written."""
    batch, _, height, width = x.shape
    groups = 1 if inputs.starts is None else inputs.starts.shape[0] - 1
    y = torch.empty(
        (batch, outputs.total, *size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    strides = x.stride(0), x.stride(2), x.stride(3)
    w_tap = w.shape[-1]
    in_unit = unit(inputs.most, *strides, 0 if transposed else w_tap) if inputs.even else 1
    out_unit = (
        unit(outputs.kept, outputs.most, outputs.total, w_tap if transposed else 0) if outputs.even else 1
    )
    span = (height - 1) * strides[1] + (width - 1) * strides[2] + inputs.total
    rows = batch * size[0] * size[1]
    tensors = x, w, bias, residual, y
    config = CONFIGS[product_config(rows, x.dtype, (inputs, outputs), (in_unit, out_unit), *tensors)]
    columns = groups * triton.cdiv(outputs.most, config["BN"])
    columns += triton.cdiv(outputs.total - outputs.kept, config["BN"])
    with device_of(x):
        channel_conv_kernel[(triton.cdiv(rows, config["BM"]) * columns,)](
            x,
            w,
            bias,
            residual,
            y,
            inputs.table,
            inputs.starts,
            outputs.table,
            outputs.starts,
            rows,
            inputs.most // in_unit,
            outputs.kept // out_unit,
            outputs.most // out_unit,
            outputs.total // out_unit,
            groups,
            *size,
            height,
            width,
            taps.size[0] * taps.size[1],
            *(stride // in_unit for stride in strides),
            w_tap // (out_unit if transposed else in_unit),
            *taps.stride,
            taps.top,
            taps.left,
            *taps.dilation,
            S=taps.size[1],
            GATHER=inputs.mode,
            SCATTER=outputs.mode,
            TRANSPOSED=transposed,
            UNIT_IN=in_unit,
            UNIT_OUT=out_unit,
            WIDE=max(span, w.numel()) >= INDEX_LIMIT,
            ACTIVATION=activation,
            PRECISION=precision(x.dtype, conv=True),
            **config,
        )
    return y


def _signature(
    name: str,
    dtype: torch.dtype,
    modes: tuple[int, int],
    *,
    config: str,
    precision: str = "ieee",
    unit: int = 8,
    transposed: bool = False,
    groups: bool = False,
    plain: bool = False,
    **options: Any,
) -> Signature:
    places = "row_height row_width height width taps stride_h stride_w top left dilation_h dilation_w"
    extra = "bias_ptr residual_ptr"
    arguments = tables(modes, groups) | pointers("x_ptr w_ptr y_ptr", dtype)
    arguments |= dict.fromkeys(extra.split()) if plain or transposed else pointers(extra, dtype)
    arguments |= integers(f"rows kept_in kept_out most_out outputs groups {places}")
    arguments |= integers("x_image x_line x_pixel w_tap")
    return Signature(
        name,
        channel_conv_kernel,
        arguments,
        {
            "S": 3,
            "GATHER": modes[0],
            "SCATTER": modes[1],
            "TRANSPOSED": transposed,
            "UNIT_IN": unit,
            "UNIT_OUT": unit,
            "WIDE": False,
            "ACTIVATION": "none" if plain or transposed else "gelu",
            "PRECISION": precision,
        },
        CONFIGS[config],
        unaligned=("rows", "groups", *places.split()),
        aligned=("x_ptr", "w_ptr", "bias_ptr", "residual_ptr", "y_ptr")
        if config in ("large", "narrow")
        else (),
        **options,
    )


AOT = (
    _signature("float16", torch.float16, (8, 8), config="large"),
    _signature("bfloat16_plain", torch.bfloat16, (0, 16), config="large", plain=True),
    _signature("groups_float16", torch.float16, (8, 8), config="large", groups=True),
    _signature("float16_transposed", torch.float16, (8, 8), config="large", transposed=True),
    _signature("narrow_float16", torch.float16, (8, 8), config="narrow"),
    _signature("narrow_groups_float16", torch.float16, (8, 8), config="narrow", groups=True),
    _signature("narrow_float16_transposed", torch.float16, (8, 8), config="narrow", transposed=True),
    _signature(
        "groups_bfloat16_transposed", torch.bfloat16, (0, 8), config="narrow", transposed=True, groups=True
    ),
    _signature("single_float16", torch.float16, (1, 1), config="small", unit=1),
    _signature("single_bfloat16_transposed", torch.bfloat16, (8, 1), config="small", transposed=True),
    _signature(
        "float32_tf32",
        torch.float32,
        (8, 8),
        config="float32",
        precision="tf32",
        instructions=OF_32_ROWS,
    ),
    _signature("float32_ieee", torch.float32, (1, 1), config="float32", unit=1, product=False),
)
