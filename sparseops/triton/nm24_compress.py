"""``nm24_compress``: packed columns [O, P] pruned to 2:4 by magnitude, as values [O, P/2] and meta [O, P/8].

Rows are whole words of metadata, so that all three are one row to the kernel. Magnitudes are compared as the
integers that their bits are, which order as the numbers do, subnormal ones too; NaN is cut down to infinity.
Bytes: 2 (of 16-bit elements) read and 1.125 written for each packed column, and nothing else bounds it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseops.triton.common import BITS, Signature, device_of, pointers

CONFIG = {"WORDS": 64, "num_warps": 4, "num_stages": 1}

INFINITY = {torch.float32: 0x7F800000, torch.float16: 0x7C00, torch.bfloat16: 0x7F80}
"""The bits of infinity."""


@triton.jit
def nm24_compress_kernel(
    packed_ptr, values_ptr, meta_ptr, words, INFINITY: tl.constexpr, SIGN: tl.constexpr, WORDS: tl.constexpr
):
    """Of each word of metadata the 8 groups. The elements are integers; SIGN is the number of the sign's
    bit."""
    first = tl.program_id(0).to(tl.int64) * WORDS
    left = words - first
    column = tl.arange(0, WORDS * 32)
    packed = tl.load(packed_ptr + first * 32 + column, mask=column < left * 32, other=0)
    even, odd = tl.split(tl.reshape(packed, (WORDS, 8, 2, 2)))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    s0 = tl.minimum(w0 & ((1 << SIGN) - 1), INFINITY)
    s1 = tl.minimum(w1 & ((1 << SIGN) - 1), INFINITY)
    s2 = tl.minimum(w2 & ((1 << SIGN) - 1), INFINITY)
    s3 = tl.minimum(w3 & ((1 << SIGN) - 1), INFINITY)
    # of equal ones the lower column wins
    l01 = (s1 > s0).to(tl.int32)
    l02 = (s2 > s0).to(tl.int32)
    l03 = (s3 > s0).to(tl.int32)
    l12 = (s2 > s1).to(tl.int32)
    l13 = (s3 > s1).to(tl.int32)
    l23 = (s3 > s2).to(tl.int32)
    keep0 = l01 + l02 + l03 < 2
    keep1 = (1 - l01) + l12 + l13 < 2
    keep2 = (1 - l02) + (1 - l12) + l23 < 2
    i0 = tl.where(keep0, 0, tl.where(keep1, 1, 2))
    i1 = tl.where(keep0 & keep1, 1, tl.where((keep0 | keep1) & keep2, 2, 3))
    v0 = tl.where(i0 == 0, w0, tl.where(i0 == 1, w1, w2))
    v1 = tl.where(i1 == 1, w1, tl.where(i1 == 2, w2, w3))
    value = tl.arange(0, WORDS * 16)
    values = tl.reshape(tl.join(v0, v1), (WORDS * 16,))
    tl.store(values_ptr + first * 16 + value, values, mask=value < left * 16)
    # the nibbles have no bit in common, so that their sum is all of them
    meta = tl.sum((i0 | (i1 << 2)) << (tl.arange(0, 8) * 4)[None, :], axis=1)
    word = tl.arange(0, WORDS)
    tl.store(meta_ptr + first + word, meta, mask=word < left)


def compress(packed: Tensor) -> tuple[Tensor, Tensor]:
    """values and meta of packed columns that are contiguous."""
    rows, columns = packed.shape
    values = packed.new_empty((rows, columns // 2))
    meta = packed.new_empty((rows, columns // 8), dtype=torch.uint8)
    bits = BITS[packed.element_size()]
    words = rows * columns // 32
    with device_of(packed):
        nm24_compress_kernel[(triton.cdiv(words, CONFIG["WORDS"]),)](
            packed.view(bits),
            values.view(bits),
            meta.view(torch.int32),
            words,
            INFINITY=INFINITY[packed.dtype],
            SIGN=8 * packed.element_size() - 1,
            **CONFIG,
        )
    return values, meta


AOT = tuple(
    Signature(
        str(dtype).removeprefix("torch."),
        nm24_compress_kernel,
        pointers("packed_ptr values_ptr", BITS[dtype.itemsize])
        | pointers("meta_ptr", torch.int32)
        | {"words": "i32"},
        {"INFINITY": INFINITY[dtype], "SIGN": 8 * dtype.itemsize - 1},
        CONFIG,
        product=False,
    )
    for dtype in (torch.float16, torch.float32)
)
