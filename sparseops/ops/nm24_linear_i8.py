"""``nm24_linear_i8``: nm24_linear of 8-bit integers, with a scale for each token and each output feature.

y[..., o] = act(x_scale[...] * w_scale[o] * (sum over k of x[..., k] * w[o, k]) + bias[o])

``scaled_linear`` has the code. The sum is an int32 (exact: K stays below 2**17).
"""

from typing import Any

import torch
from torch import Tensor

from sparseops import _native
from sparseops.ops import cuda, registry, scaled_linear

NAME = "nm24_linear_i8"

_MOST_FEATURES = 1 << 17  # 2**17 products of at most 2**14 fit in an int32


def supports(x: Tensor, values: Tensor | None = None, *_: Any) -> str | None:
    """Why no kernel can run on ``x`` and ``values``, None if one can; looks at devices and dtypes alone."""
    if x.dtype is not torch.int8:
        return f"there is no kernel for {x.dtype}"
    if reason := cuda.no_device_reason(x):
        return reason
    return cuda.DENSE_REASON if _native.impl == "dense" else None


_op = scaled_linear.ScaledLinear(NAME, torch.int8, supports, _MOST_FEATURES)


def nm24_linear_i8(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    activation: str = "none",
) -> Tensor:
    """Linear layer of 8-bit integers with a 2:4 weight: scales, bias and activation in one pass. It has no
    gradient.

    Where no kernel can run (``supports`` says why) the plain torch reference runs, and a warning says so
    once.

    Args:
        x: quantized activations [..., K], int8.
        values: quantized kept weights [O, P/2], int8, P being K rounded up to a multiple of 32.
        meta: their columns [O, P/8], uint8.
        x_scale: what one unit of x stands for, [...] for each token, or [1]; float32.
        w_scale: the same for each row of the weight, [O], float32.
        bias: [O] in out_dtype, or None.
        out_dtype: float16, bfloat16 or float32.
        activation: ``"none"``, ``"relu"``, ``"silu"`` or ``"gelu"`` (the exact one).

    Returns:
        [..., O] in out_dtype, contiguous.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, a device or the activation is wrong, or a ``SPARSEOPS_*`` variable is.
        RuntimeError: on the way back, a gradient was asked for.
    """
    return _op(x, values, meta, x_scale, w_scale, bias, out_dtype, activation)


registry.register(
    registry.Op(
        name=NAME,
        fn=nm24_linear_i8,
        reference=scaled_linear.reference,
        supports=supports,
        impls=cuda.impls(
            "int8 by mma.sp, any shape, and by wgmma.sp on compute capability 9.0 where rows of y are whole "
            "16 bytes; f16, bf16 or f32 out"
        ),
        cases=scaled_linear.cases(lambda x: x.to(torch.int8)),
        dtype=torch.int8,
        differentiable=False,
    )
)
