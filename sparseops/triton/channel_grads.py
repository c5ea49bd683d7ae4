"""The gradient of a channel-pruned weight as an implicit product over pixels, both sides gathered in it.

    dw[n, tap, k] = sum over p of dy[p, out[n]] * x[pixel(p, tap), in[k]]

with everything as in ``sparseops.triton.channel_conv``; for a linear layer there is one tap, and the rows of
x and dy take the place of pixels. A weight has few tiles, and there may be many pixels, so that these are
split among programs: each then writes float32 sums of its own, which are added in order.

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
    config_name,
    multiprocessors,
    tables,
    unit,
)
from sparseops.triton.common import Signature, device_of, dot, integers, pointers

CONFIGS: dict[str, dict[str, int]] = {
    "large": {"BM": 128, "BN": 64, "BK": 64, "num_warps": 8, "num_stages": 4},
    "small": {"BM": 64, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 4},
    # as in sparseops.triton.channel_linear
    "float32": {"BM": 32, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 3},
}
"""By ``channel_tiles.config_name``."""

LEAST_STEPS = 8
"""Tiles of rows that a program sums at least, where rows are split: each writes float32 sums."""


@triton.jit
def channel_grads_kernel(
    dy_ptr, x_ptr, dw_ptr, in_ptr, in_starts_ptr, out_ptr, out_starts_ptr,
    rows, rows_each, kept_in, kept_out, most_out, row_height, row_width, height, width, taps,
    dy_row, x_image, x_line, x_pixel, stride_h, stride_w, top, left,
    dilation_h, dilation_w, S: tl.constexpr, GATHER: tl.constexpr, SCATTER: tl.constexpr, FLAT: tl.constexpr,
    UNIT_IN: tl.constexpr, UNIT_OUT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The tile [BM outputs, BN inputs] of one tap; program_id(1) says which rows_each of the rows it sums, a
    multiple of BK. kept_in and the strides of x are in units of UNIT_IN; kept_out, most_out and dy_row of
    UNIT_OUT. FLAT: row p of dy belongs to row p of x, and these are x_pixel apart. Rows are the pixels of dy.
    WIDE: offsets within an image may not fit 32 bits. The starts are given with several groups."""
    kept_in *= UNIT_IN
    kept_out *= UNIT_OUT
    input_tiles, output_tiles = tl.cdiv(kept_in, BN), tl.cdiv(most_out * UNIT_OUT, BM)
    program = tl.program_id(0)
    tap = program // input_tiles % taps
    output_tile = program // (input_tiles * taps) % output_tiles
    n = output_tile * BM + tl.arange(0, BM)
    k = program % input_tiles * BN + tl.arange(0, BN)
    in_first, out_first, in_columns, out_columns = 0, 0, kept_in, kept_out
    if in_starts_ptr is not None:
        group = program // (input_tiles * taps * output_tiles)
        in_first = tl.multiple_of(tl.load(in_starts_ptr + group), UNIT_IN)
        in_columns = tl.multiple_of(tl.load(in_starts_ptr + group + 1) - in_first, UNIT_IN)
        out_first = tl.multiple_of(tl.load(out_starts_ptr + group), UNIT_OUT)
        out_columns = tl.multiple_of(tl.load(out_starts_ptr + group + 1) - out_first, UNIT_OUT)
    n_mask, k_mask = n < out_columns, k < in_columns
    outputs = channels_at(out_ptr, 0, out_first + n, n_mask, SCATTER)
    inputs = channels_at(in_ptr, 0, in_first + k, k_mask, GATHER)
    dy_columns = dy_ptr + outputs[:, None]
    x_columns = x_ptr + inputs[None, :]
    first = tl.program_id(1) * rows_each
    sums = tl.zeros((BM, BN), tl.float32)
    for start in range(first, tl.minimum(rows, first + rows_each), BK):
        row = start + tl.arange(0, BK)
        row_mask = row < rows
        dy_rows = (row.to(tl.int64) * (dy_row * UNIT_OUT))[None, :]
        dy = tl.load(dy_columns + dy_rows, mask=n_mask[:, None] & row_mask[None, :], other=0.0)
        if FLAT:
            x_rows = row.to(tl.int64) * (x_pixel * UNIT_IN)
        else:
            h = row // row_width % row_height * stride_h - top + tap // S * dilation_h
            v = row % row_width * stride_w - left + tap % S * dilation_w
            row_mask &= (h >= 0) & (h < height) & (v >= 0) & (v < width)
            if WIDE:
                h = h.to(tl.int64)
                v = v.to(tl.int64)
            image = row // row_width // row_height
            x_rows = image.to(tl.int64) * (x_image * UNIT_IN) + (
                h * (x_line * UNIT_IN) + v * (x_pixel * UNIT_IN)
            )
        x = tl.load(x_columns + x_rows[:, None], mask=row_mask[:, None] & k_mask[None, :], other=0.0)
        sums = dot(dy, x, sums, PRECISION)
    dw_rows = (out_first + n + (tl.program_id(1) * kept_out).to(tl.int64)) * (taps * kept_in) + tap * kept_in
    mask = n_mask[:, None] & (k < kept_in)[None, :]
    tl.store(dw_ptr + dw_rows[:, None] + k[None, :], sums.to(dw_ptr.dtype.element_ty), mask=mask)


def weight_gradient(dy: Tensor, x: Tensor, inputs: Side, outputs: Side, taps: Taps | None = None) -> Tensor:
    """The gradient [kept outputs, kept inputs] of the weight of a linear layer, from dy [rows, outputs] and x
    [rows, inputs] with elements next to each other in a row; or, with ``taps``, that of a convolution, [kept
    outputs, R, S, most kept inputs of a group], from dy [N, outputs, P, Q] and x [N, inputs, H, W], both
    channels last without gaps."""
    if taps is None:
        rows, size, images = dy.shape[0], (1, 1), (1, 1, 1, 1)
        dy_row = dy.stride(0)
        x_image, x_line, x_pixel = 0, 0, x.stride(0)
        places = (1, 1, 0, 0, 1, 1)
    else:
        size, images = taps.size, (*dy.shape[2:], *x.shape[2:])
        rows = dy.shape[0] * dy.shape[2] * dy.shape[3]
        dy_row, x_pixel = outputs.total, inputs.total
        x_line = x_pixel * x.shape[3]
        x_image = x_line * x.shape[2]
        places = (*taps.stride, taps.top, taps.left, *taps.dilation)
    in_unit = unit(inputs.most, x_image, x_line, x_pixel) if inputs.even else 1
    out_unit = unit(outputs.kept, outputs.most, dy_row) if outputs.even else 1
    config = CONFIGS[config_name(x.dtype, (inputs, outputs), (in_unit, out_unit), dy, x)]
    groups = 1 if inputs.starts is None else inputs.starts.shape[0] - 1
    count = size[0] * size[1]
    tiles = triton.cdiv(outputs.most, config["BM"]) * triton.cdiv(inputs.most, config["BN"]) * groups * count
    rows_each = _rows_of_a_program(rows, tiles, config["BK"], x)
    parts = triton.cdiv(rows, rows_each)
    shape = (outputs.kept, inputs.most) if taps is None else (outputs.kept, *size, inputs.most)
    dw = x.new_empty((parts, *shape), dtype=x.dtype if parts == 1 else torch.float32)
    with device_of(x):
        channel_grads_kernel[(tiles, parts)](
            dy,
            x,
            dw,
            inputs.table,
            inputs.starts,
            outputs.table,
            outputs.starts,
            rows,
            rows_each,
            inputs.most // in_unit,
            outputs.kept // out_unit,
            outputs.most // out_unit,
            *images,
            count,
            dy_row // out_unit,
            x_image // in_unit,
            x_line // in_unit,
            x_pixel // in_unit,
            *places,
            S=size[1],
            GATHER=inputs.mode,
            SCATTER=outputs.mode,
            FLAT=taps is None,
            UNIT_IN=in_unit,
            UNIT_OUT=out_unit,
            WIDE=x_image >= INDEX_LIMIT,
            PRECISION=precision(x.dtype, conv=taps is not None),
            **config,
        )
    return dw[0] if parts == 1 else dw.sum(0).to(x.dtype)


def _rows_of_a_program(rows: int, tiles: int, step: int, x: Tensor) -> int:
    """How many rows a program sums, so that every multiprocessor has two programs if there is enough."""
    parts = max(1, min(2 * multiprocessors(x.device) // tiles, rows // (LEAST_STEPS * step)))
    return triton.cdiv(triton.cdiv(rows, parts), step) * step


def _signature(
    name: str,
    dtype: torch.dtype,
    modes: tuple[int, int],
    *,
    config: str,
    flat: bool,
    precision: str = "ieee",
    unit: int = 8,
    groups: bool = False,
    **options: Any,
) -> Signature:
    arguments = tables(modes, groups) | pointers("dy_ptr x_ptr", dtype) | pointers("dw_ptr", torch.float32)
    arguments |= integers("rows rows_each kept_in kept_out most_out dy_row x_pixel")
    places = "row_height row_width height width taps stride_h stride_w top left dilation_h dilation_w"
    constants: dict[str, Any] = {"S": 1 if flat else 3}
    if flat:
        constants |= dict.fromkeys([*places.split(), "x_image", "x_line"], 1)
    else:
        arguments |= integers(f"{places} x_image x_line")
    return Signature(
        name,
        channel_grads_kernel,
        arguments,
        {
            **constants,
            "GATHER": modes[0],
            "SCATTER": modes[1],
            "FLAT": flat,
            "UNIT_IN": unit,
            "UNIT_OUT": unit,
            "WIDE": False,
            "PRECISION": precision,
        },
        CONFIGS[config],
        unaligned=("rows", *(() if flat else places.split())),
        aligned=("dy_ptr", "x_ptr", "dw_ptr") if config == "large" else (),
        **options,
    )


AOT = (
    _signature("linear_float16", torch.float16, (8, 8), config="large", flat=True),
    _signature("conv_float16", torch.float16, (8, 8), config="large", flat=False),
    _signature("groups_bfloat16", torch.bfloat16, (8, 0), config="large", flat=False, groups=True),
    _signature("single_linear_float16", torch.float16, (1, 1), config="small", flat=True, unit=1),
    _signature("single_conv_bfloat16", torch.bfloat16, (1, 8), config="small", flat=False, unit=1),
    _signature(
        "float32_tf32",
        torch.float32,
        (8, 8),
        config="float32",
        flat=False,
        precision="tf32",
        instructions=OF_32_ROWS,
    ),
    _signature("float32_ieee", torch.float32, (1, 1), config="float32", flat=False, unit=1, product=False),
)
