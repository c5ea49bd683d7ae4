"""The product of a channel-pruned linear layer, gather and scatter in it.

    y[m, out] = act(sum over k of x[m, in[k]] * w[n, k] + bias[out] + residual[m, out])

x [rows, inputs], y [rows, outputs]; w is compact, [kept outputs, kept inputs] or that transposed; ``in`` and
``out`` are the kept channels. A dropped output gets act(bias + residual): its tiles come after those of kept
ones and multiply nothing, so that y is written once and by one kernel. The gradient of x is the same kernel
with inputs and outputs exchanged, and w transposed.

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
    "small": {"BM": 128, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 4},
    # 32 rows are fewer than tcgen05.mma takes: with more, Triton up to 3.7 computes there in TF32 what it was
    # told to compute in float32 (triton-lang/triton#10176)
    "float32": {"BM": 32, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 3},
}
"""By ``channel_tiles.product_config``."""


@triton.jit
def channel_linear_kernel(
    x_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr, in_ptr, out_ptr,
    rows, kept_in, kept_out, outputs, x_row, w_row, residual_row,
    GATHER: tl.constexpr, SCATTER: tl.constexpr, TRANSPOSED: tl.constexpr, UNIT_IN: tl.constexpr,
    UNIT_OUT: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """GATHER and SCATTER are the modes of inputs and outputs. kept_in, x_row and, unless TRANSPOSED, w_row
    are in units of UNIT_IN; kept_out, outputs, residual_row and, if TRANSPOSED, w_row in units of UNIT_OUT.
    WIDE: offsets within w may not fit 32 bits."""
    kept_in *= UNIT_IN
    x_row *= UNIT_IN
    kept_out *= UNIT_OUT
    outputs *= UNIT_OUT
    residual_row *= UNIT_OUT
    w_row *= UNIT_OUT if TRANSPOSED else UNIT_IN
    column_tiles, dropped_tiles = tl.cdiv(kept_out, BN), tl.cdiv(outputs - kept_out, BN)
    tile_row, tile_column, is_kept = tile_of(rows, column_tiles, dropped_tiles, BM)
    row = tile_row * BM + tl.arange(0, BM)
    column = tile_column * BN + tl.arange(0, BN)
    row_mask = row < rows
    x_rows = x_ptr + (row.to(tl.int64) * x_row)[:, None]
    sums = tl.zeros((BM, BN), tl.float32)
    next_source = channels_at(in_ptr, 0, tl.arange(0, BK), tl.arange(0, BK) < kept_in, GATHER)
    for start in range(0, tl.where(is_kept, kept_in, 0), BK):
        k = start + tl.arange(0, BK)
        k_mask = k < kept_in
        source = next_source
        next_source = channels_at(in_ptr, 0, k + BK, k + BK < kept_in, GATHER)
        if WIDE:
            k = k.to(tl.int64)
        x = tl.load(x_rows + source[None, :], mask=row_mask[:, None] & k_mask[None, :], other=0.0)
        if TRANSPOSED:
            w_at = w_ptr + (k * w_row)[:, None] + column[None, :]
        else:
            w_at = w_ptr + (column.to(tl.int64) * w_row)[None, :] + k[:, None]
        w = tl.load(w_at, mask=k_mask[:, None] & (column < kept_out)[None, :], other=0.0)
        sums = dot(x, w, sums, PRECISION)
    channel, channel_mask = outputs_of(out_ptr, 0, kept_out, outputs, column, kept_out, is_kept, SCATTER)
    store_tile(
        sums, bias_ptr, residual_ptr, y_ptr, row, channel, row_mask, channel_mask, outputs, residual_row,
        ACTIVATION,
    )  # fmt: skip


def linear(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    inputs: Side,
    outputs: Side,
    activation: str,
) -> Tensor:
    """x [rows, inputs] and residual [rows, outputs] with elements next to each other in a row; w [kept
    outputs, kept inputs], one of whose strides is 1; bias contiguous."""
    transposed = w.stride(1) != 1
    y = x.new_empty((x.shape[0], outputs.total))
    w_row = w.stride(1 if transposed else 0)
    residual_row = 0 if residual is None else residual.stride(0)
    in_unit = unit(inputs.kept, x.stride(0), 0 if transposed else w_row)
    out_unit = unit(outputs.kept, outputs.total, residual_row, w_row if transposed else 0)
    w_unit = out_unit if transposed else in_unit
    tensors = x, w, bias, residual, y
    units = in_unit, out_unit
    config = CONFIGS[product_config(x.shape[0], x.dtype, (inputs, outputs), units, *tensors)]
    columns = triton.cdiv(outputs.kept, config["BN"]) + triton.cdiv(
        outputs.total - outputs.kept, config["BN"]
    )
    with device_of(x):
        channel_linear_kernel[(triton.cdiv(x.shape[0], config["BM"]) * columns,)](
            x,
            w,
            bias,
            residual,
            y,
            inputs.table,
            outputs.table,
            x.shape[0],
            inputs.kept // in_unit,
            outputs.kept // out_unit,
            outputs.total // out_unit,
            x.stride(0) // in_unit,
            w_row // w_unit,
            residual_row // out_unit,
            GATHER=inputs.mode,
            SCATTER=outputs.mode,
            TRANSPOSED=transposed,
            UNIT_IN=in_unit,
            UNIT_OUT=out_unit,
            WIDE=w.numel() >= INDEX_LIMIT,
            ACTIVATION=activation,
            PRECISION=precision(x.dtype),
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
    plain: bool = False,
    **options: Any,
) -> Signature:
    arguments = (
        tables(modes)
        | pointers("x_ptr w_ptr y_ptr", dtype)
        | integers("rows kept_in kept_out outputs x_row w_row residual_row")
    )
    extra = "bias_ptr residual_ptr"
    arguments |= dict.fromkeys(extra.split()) if plain else pointers(extra, dtype)
    return Signature(
        name,
        channel_linear_kernel,
        arguments,
        {
            "GATHER": modes[0],
            "SCATTER": modes[1],
            "TRANSPOSED": transposed,
            "UNIT_IN": unit,
            "UNIT_OUT": unit,
            "WIDE": False,
            "ACTIVATION": "none" if plain else "gelu",
            "PRECISION": precision,
        },
        CONFIGS[config],
        unaligned=("rows",),
        aligned=("x_ptr", "w_ptr", "bias_ptr", "residual_ptr", "y_ptr")
        if config in ("large", "narrow")
        else (),
        **options,
    )


AOT = (
    _signature("float16", torch.float16, (8, 8), config="large"),
    _signature("bfloat16_plain", torch.bfloat16, (0, 16), config="large", plain=True),
    _signature("float16_transposed", torch.float16, (8, 8), config="large", transposed=True, plain=True),
    _signature("narrow_float16", torch.float16, (8, 8), config="narrow"),
    _signature("narrow_bfloat16_transposed", torch.bfloat16, (8, 0), config="narrow", transposed=True),
    _signature("single_float16", torch.float16, (1, 1), config="small", unit=1),
    _signature("single_bfloat16_transposed", torch.bfloat16, (1, 8), config="small", transposed=True),
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
