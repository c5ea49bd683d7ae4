"""What the Triton kernels share: products, activations, and how they declare what they are compiled for."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
}
"""Names of dtypes in signatures; a pointer to one has a ``*`` before it."""

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""The dtypes that kernels move elements in whose dtype does not matter, by size."""


class Signature(NamedTuple):
    """One way a kernel is compiled, for the check of its machine code. It is compiled as it is, and as if no
    number and no pointer but those of ``aligned`` were a multiple of 16.

    name: what the check calls it. kernel: the ``triton.jit`` function. arguments: the types of what is given
    at run time, by name, such as ``"*fp16"`` or ``"i32"``; None is an optional pointer that is not given.
    constants: its ``tl.constexpr`` arguments that are not of the configuration. config: a shipped
    configuration, the constants of its tile with ``num_warps`` and ``num_stages``. unaligned: the run-time
    arguments that are not multiples of 16 even in the best case. aligned: those that are in the worst one
    too, because the launch takes another configuration otherwise. product: whether it multiplies matrices on
    tensor cores. instructions: a part of the name of the instruction that does it, by compute capability as
    80, 90 or 100, where it is another than the first choice there.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, str | None]
    constants: Mapping[str, Any]
    config: Mapping[str, int]
    unaligned: tuple[str, ...] = ()
    aligned: tuple[str, ...] = ()
    product: bool = True
    instructions: Mapping[int, str] = {}


def pointers(names: str, dtype: torch.dtype) -> dict[str, str | None]:
    """The types of some pointers, for a ``Signature``."""
    return dict.fromkeys(names.split(), f"*{TYPES[dtype]}")


def integers(names: str) -> dict[str, str | None]:
    """The types of some 32-bit numbers, for a ``Signature``."""
    return dict.fromkeys(names.split(), "i32")


def device_of(x: Tensor) -> AbstractContextManager[Any]:
    """What a kernel that reads ``x`` is launched within: Triton launches on torch's current GPU."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@triton.jit
def dot(a, b, sums, PRECISION: tl.constexpr):
    """``sums + a @ b``; PRECISION counts where a and b are float32."""
    return tl.dot(a, b, sums, input_precision=PRECISION, out_dtype=sums.dtype)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """One of ``sparseops.ops.common.ACTIVATIONS`` of float32; NaN stays NaN, as it does in torch."""
    if ACTIVATION == "relu":
        z = tl.where(z < 0.0, 0.0, z)
    elif ACTIVATION == "silu":
        z = z * tl.sigmoid(z)
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1.0 + tl.math.erf(z * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "none")
    return z


@triton.jit
def expand(v0, v1, nibble):
    """The two kept elements and the nibble of each group, [rows, groups], as [rows, groups, 2, 2]: its four
    columns in order, zeros filled in. Bits above the nibble are not looked at; v0 and v1 are bits of 8, 16 or
    32, in integers.

    Shorter ones are shifted into one word that is then cut in four, which takes a third fewer instructions
    than to compare and select.
    """
    i0 = nibble & 3
    i1 = (nibble >> 2) & 3
    if v0.dtype.primitive_bitwidth == 32:
        zero = tl.zeros_like(v0)
        e0 = tl.where(i0 == 0, v0, zero)
        e1 = tl.where(i0 == 1, v0, tl.where(i1 == 1, v1, zero))
        e2 = tl.where(i0 == 2, v0, tl.where(i1 == 2, v1, zero))
        e3 = tl.where(i1 == 3, v1, zero)
    else:
        e0, e1, e2, e3 = cut(v0, v1, i0, i1)
    return tl.join(tl.join(e0, e2), tl.join(e1, e3))


@triton.jit
def cut(v0, v1, i0, i1):
    """v0 at place i0 and v1 at place i1 of a word of four elements of 8 or 16 bits: the four."""
    WIDTH: tl.constexpr = v0.dtype.primitive_bitwidth
    NARROW: tl.constexpr = tl.uint16 if WIDTH == 16 else tl.uint8
    WIDE: tl.constexpr = tl.uint64 if WIDTH == 16 else tl.uint32
    u0 = v0.to(NARROW, bitcast=True).to(WIDE)
    u1 = v1.to(NARROW, bitcast=True).to(WIDE)
    word = (u0 << (i0 * WIDTH).to(WIDE)) | (u1 << (i1 * WIDTH).to(WIDE))
    e0 = word.to(NARROW).to(v0.dtype, bitcast=True)
    e1 = (word >> WIDTH).to(NARROW).to(v0.dtype, bitcast=True)
    e2 = (word >> (2 * WIDTH)).to(NARROW).to(v0.dtype, bitcast=True)
    e3 = (word >> (3 * WIDTH)).to(NARROW).to(v0.dtype, bitcast=True)
    return e0, e1, e2, e3
