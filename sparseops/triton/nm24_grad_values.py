"""``nm24_grad_values``: the gradient of a 2:4 weight's kept values, without the dense gradient in memory.

    grad_values[o, j] = sum over t of grad[t, o] * x[t, k], k the column of value j of row o; 0 where k >= K

A program computes a tile of the dense gradient, since no multiplication can be left out before the columns
are known, picks two of each four sums by the metadata, and rounds them once.

Operations: tokens * O * P multiply-adds. Bytes: 2 * tokens * O for each column of tiles, 2 * tokens * P for
each row of them, and 1.125 * O * P. Bound for many tokens: the tensor cores. State: it has not yet run on a
GPU; the interpreter runs it on the CPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseops.triton import precision
from sparseops.triton.common import Signature, device_of, dot, integers, pointers

CONFIGS: dict[str, dict[str, int]] = {
    "halves": {"BN": 64, "BG": 32, "BT": 32, "num_warps": 4, "num_stages": 4},
    "float32": {"BN": 64, "BG": 16, "BT": 32, "num_warps": 4, "num_stages": 3},
}


@triton.jit
def nm24_grad_values_kernel(
    grad_ptr, x_ptr, meta_ptr, grad_values_ptr, tokens, rows, features, packed, grad_row, x_row,
    PRECISION: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """grad [tokens, rows] and x [tokens, features], their rows grad_row and x_row elements apart; meta is
    words of 32 bits. BT tokens at a time for BN rows and BG groups of the weight."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    column = tl.program_id(1) * (4 * BG) + tl.arange(0, 4 * BG)
    t = tl.arange(0, BT)
    sums = tl.zeros((BN, 4 * BG), tl.float32)
    for first in range(0, tokens, BT):
        token = (first + t).to(tl.int64)
        grad = tl.load(
            grad_ptr + token[None, :] * grad_row + n[:, None],
            mask=(n < rows)[:, None] & (token < tokens)[None, :],
            other=0.0,
        )
        x = tl.load(
            x_ptr + token[:, None] * x_row + column[None, :],
            mask=(token < tokens)[:, None] & (column < features)[None, :],
            other=0.0,
        )
        sums = dot(grad, x, sums, PRECISION)
    even, odd = tl.split(tl.reshape(sums, (BN, BG, 2, 2)))
    s0, s2 = tl.split(even)
    s1, s3 = tl.split(odd)
    row = n.to(tl.int64)[:, None]
    group = tl.program_id(1) * BG + tl.arange(0, BG)
    word = tl.load(
        meta_ptr + row * (packed // 32) + (group // 8)[None, :],
        mask=(n < rows)[:, None] & (group < packed // 4)[None, :],
        other=0,
    )
    nibble = word >> (group % 8 * 4)[None, :]
    i0 = nibble & 3
    i1 = (nibble >> 2) & 3
    v0 = tl.where(i0 == 0, s0, tl.where(i0 == 1, s1, s2))
    v1 = tl.where(i1 == 1, s1, tl.where(i1 == 2, s2, s3))
    value = tl.program_id(1) * (2 * BG) + tl.arange(0, 2 * BG)
    tl.store(
        grad_values_ptr + row * (packed // 2) + value[None, :],
        tl.reshape(tl.join(v0, v1), (BN, 2 * BG)).to(grad_values_ptr.dtype.element_ty),
        mask=(n < rows)[:, None] & (value < packed // 2)[None, :],
    )


def config_of(dtype: torch.dtype) -> dict[str, int]:
    return CONFIGS["float32" if dtype is torch.float32 else "halves"]


def grad_values(grad: Tensor, x: Tensor, meta: Tensor) -> Tensor:
    """grad [tokens, O] and x [tokens, K] with elements next to each other in a row; meta [O, P/8] contiguous,
    from a multiple of 16 bytes on."""
    (tokens, rows), features, packed = grad.shape, x.shape[1], meta.shape[1] * 8
    out = grad.new_empty((rows, packed // 2))
    config = config_of(grad.dtype)
    grid = (triton.cdiv(rows, config["BN"]), triton.cdiv(packed // 4, config["BG"]))
    with device_of(grad):
        nm24_grad_values_kernel[grid](
            grad,
            x,
            meta.view(torch.int32),
            out,
            tokens,
            rows,
            features,
            packed,
            grad.stride(0),
            x.stride(0),
            PRECISION=precision(grad.dtype),
            **config,
        )
    return out


def _signature(name: str, dtype: torch.dtype, precision: str, **options: Any) -> Signature:
    return Signature(
        name,
        nm24_grad_values_kernel,
        pointers("grad_ptr x_ptr grad_values_ptr", dtype)
        | pointers("meta_ptr", torch.int32)
        | integers("tokens rows features packed grad_row x_row"),
        {"PRECISION": precision},
        config_of(dtype),
        unaligned=("tokens",),
        **options,
    )


AOT = (
    _signature("float16", torch.float16, "ieee"),
    _signature("bfloat16", torch.bfloat16, "ieee"),
    _signature("float32_tf32", torch.float32, "tf32"),
    _signature("float32_ieee", torch.float32, "ieee", product=False),
)
