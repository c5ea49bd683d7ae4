"""``nm24_linear``: y = act(x w^T + bias + residual) with a 2:4 weight that is expanded in registers.

Each step a program loads a tile of values and metadata, fills in the zeros (``common.expand``), and
multiplies with the activations of the same columns, the weight being the left operand: its rows are the tall
side of the tensor cores' tiles, and 16 tokens are enough for the other. A dropped weight is multiplied as
zero, as in a dense layer, so that nothing is gained but bytes: 1.125 for each packed column (of 16-bit
elements) where a dense layer reads 2.

Bound for few tokens: the memory, if 32 instructions for each group of four can be hidden, about what an H100
has time for. Bound for many: the tensor cores, below what a dense layer reaches. State: it has not yet run on
a GPU; the interpreter runs it on the CPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseops.triton import precision
from sparseops.triton.common import BITS, Signature, activate, device_of, dot, expand, integers, pointers

FEW = 16
"""Up to how many tokens the configuration for few is taken."""

CONFIGS: dict[str, dict[str, int]] = {
    "few": {"BM": 16, "BN": 64, "BG": 32, "num_warps": 4, "num_stages": 4},
    "many": {"BM": 64, "BN": 128, "BG": 16, "num_warps": 8, "num_stages": 3},
    "few_tf32": {"BM": 16, "BN": 64, "BG": 16, "num_warps": 4, "num_stages": 3},
    "many_tf32": {"BM": 64, "BN": 64, "BG": 8, "num_warps": 4, "num_stages": 3},
    # 32 rows are fewer than tcgen05.mma takes: with more, Triton up to 3.7 computes there in TF32 what it was
    # told to compute in float32 (triton-lang/triton#10176)
    "few_ieee": {"BM": 16, "BN": 32, "BG": 16, "num_warps": 4, "num_stages": 3},
    "many_ieee": {"BM": 64, "BN": 32, "BG": 8, "num_warps": 4, "num_stages": 3},
}
"""By whether there are few tokens, and of float32 by the precision."""


@triton.jit
def nm24_linear_kernel(
    x_ptr, values_ptr, meta_ptr, bias_ptr, residual_ptr, y_ptr,
    tokens, rows, features, packed, x_row, residual_row,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """x [tokens, features] and residual [tokens, rows], their rows x_row and residual_row elements apart;
    values are bits in integers, meta words of 32 bits. BM tokens, BN features of y, BG groups of columns at a
    time."""
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    row = n.to(tl.int64)[:, None]
    token = m.to(tl.int64)[None, :]
    sums = tl.zeros((BN, BM), tl.float32)
    for group in range(0, packed // 4, BG):
        value = group * 2 + tl.arange(0, 2 * BG)
        word = group // 8 + tl.arange(0, BG // 8)
        column = group * 4 + tl.arange(0, 4 * BG)
        values = tl.load(
            values_ptr + row * (packed // 2) + value[None, :],
            mask=(n < rows)[:, None] & (value < packed // 2)[None, :],
            other=0,
        )
        meta = tl.load(
            meta_ptr + row * (packed // 32) + word[None, :],
            mask=(n < rows)[:, None] & (word < packed // 32)[None, :],
            other=0,
        )
        x = tl.load(
            x_ptr + token * x_row + column[:, None],
            mask=(column < features)[:, None] & (m < tokens)[None, :],
            other=0.0,
        )
        v0, v1 = tl.split(tl.reshape(values, (BN, BG, 2)))
        nibble = tl.reshape(meta[:, :, None] >> (tl.arange(0, 8) * 4)[None, None, :], (BN, BG))
        weight = tl.reshape(expand(v0, v1, nibble), (BN, 4 * BG)).to(x_ptr.dtype.element_ty, bitcast=True)
        sums = dot(weight, x, sums, PRECISION)
    mask = (n < rows)[:, None] & (m < tokens)[None, :]
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + n, mask=n < rows, other=0.0).to(tl.float32)[:, None]
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + token * residual_row + n[:, None], mask=mask, other=0.0)
        sums += residual.to(tl.float32)
    y = activate(sums, ACTIVATION).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + token * rows + n[:, None], y, mask=mask)


def config_of(dtype: torch.dtype, tokens: int, precision: str) -> dict[str, int]:
    name = "few" if tokens <= FEW else "many"
    return CONFIGS[f"{name}_{precision}" if dtype is torch.float32 else name]


def linear(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    """x [tokens, K] and residual [tokens, O] with elements next to each other in a row; values and meta
    contiguous, from multiples of 16 bytes on; bias contiguous."""
    (tokens, features), (rows, kept) = x.shape, values.shape
    y = x.new_empty((tokens, rows))
    exactly = precision(x.dtype)
    config = config_of(x.dtype, tokens, exactly)
    grid = (triton.cdiv(tokens, config["BM"]), triton.cdiv(rows, config["BN"]))
    with device_of(x):
        nm24_linear_kernel[grid](
            x,
            values.view(BITS[values.element_size()]),
            meta.view(torch.int32),
            bias,
            residual,
            y,
            tokens,
            rows,
            features,
            2 * kept,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            ACTIVATION=activation,
            PRECISION=exactly,
            **config,
        )
    return y


def _signature(
    name: str, dtype: torch.dtype, tokens: int, precision: str, *, plain: bool = False, **options: Any
) -> Signature:
    return Signature(
        name,
        nm24_linear_kernel,
        pointers("x_ptr y_ptr", dtype)
        | pointers("values_ptr", BITS[dtype.itemsize])
        | pointers("meta_ptr", torch.int32)
        | (dict.fromkeys(("bias_ptr", "residual_ptr")) if plain else pointers("bias_ptr residual_ptr", dtype))
        | integers("tokens rows features packed x_row residual_row"),
        {"PRECISION": precision, "ACTIVATION": "none" if plain else "gelu"},
        config_of(dtype, tokens, precision),
        unaligned=("tokens",),
        **options,
    )


AOT = (
    _signature("few_float16", torch.float16, 1, "ieee"),
    _signature("few_bfloat16", torch.bfloat16, 1, "ieee", plain=True),
    _signature("few_float32_tf32", torch.float32, 1, "tf32"),
    _signature("few_float32_ieee", torch.float32, 1, "ieee", product=False),
    _signature("many_float16", torch.float16, 100, "ieee"),
    _signature("many_bfloat16", torch.bfloat16, 100, "ieee", plain=True),
    _signature("many_float32_tf32", torch.float32, 100, "tf32"),
    _signature("many_float32_ieee", torch.float32, 100, "ieee", product=False),
)
