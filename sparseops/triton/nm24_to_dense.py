"""``nm24_to_dense``: values [O, P/2] and meta [O, P/8] as packed columns [O, P].

Rows are whole words of metadata, so that all three are one row to the kernel. It moves bits and knows no
dtype. Bytes: 1.125 (of 16-bit elements) read and 2 written for each packed column, and nothing else bounds
it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseops.triton.common import BITS, Signature, device_of, expand, pointers

CONFIG = {"WORDS": 64, "num_warps": 4, "num_stages": 1}


@triton.jit
def nm24_to_dense_kernel(values_ptr, meta_ptr, dense_ptr, words, WORDS: tl.constexpr):
    """Of each word of metadata the 8 groups: 16 values, 32 packed columns."""
    first = tl.program_id(0).to(tl.int64) * WORDS
    left = words - first
    word = tl.arange(0, WORDS)
    value = tl.arange(0, WORDS * 16)
    column = tl.arange(0, WORDS * 32)
    meta = tl.load(meta_ptr + first + word, mask=word < left, other=0)
    values = tl.load(values_ptr + first * 16 + value, mask=value < left * 16, other=0)
    v0, v1 = tl.split(tl.reshape(values, (WORDS, 8, 2)))
    dense = expand(v0, v1, meta[:, None] >> (tl.arange(0, 8) * 4)[None, :])
    tl.store(dense_ptr + first * 32 + column, tl.reshape(dense, (WORDS * 32,)), mask=column < left * 32)


def to_dense(values: Tensor, meta: Tensor) -> Tensor:
    """The packed columns of a weight whose tensors are contiguous and begin at multiples of 16 bytes."""
    rows, kept = values.shape
    dense = values.new_empty((rows, kept * 2))
    bits = BITS[values.element_size()]
    words = rows * kept // 16
    with device_of(values):
        nm24_to_dense_kernel[(triton.cdiv(words, CONFIG["WORDS"]),)](
            values.view(bits), meta.view(torch.int32), dense.view(bits), words, **CONFIG
        )
    return dense


AOT = tuple(
    Signature(
        f"{bits}".removeprefix("torch."),
        nm24_to_dense_kernel,
        pointers("values_ptr dense_ptr", bits) | pointers("meta_ptr", torch.int32) | {"words": "i32"},
        {},
        CONFIG,
        product=False,
    )
    for bits in BITS.values()
)
