"""``nm24_linear_f8``: nm24_linear of float8 numbers (e4m3), with a scale for each token and each output
feature.

y[..., o] = act(x_scale[...] * w_scale[o] * (sum over k of x[..., k] * w[o, k]) + bias[o])

``scaled_linear`` has the code. Products are exact. Their sums are float32 in name alone: the tensor cores
keep about 14 bits of one while they add to it (DeepSeek-V3's report, arXiv 2412.19437, section 3.3.2), and
the kernel does not carry sums over into others in between. So a GPU's results are less exact than those of
plain torch.
"""

from typing import Any

import torch
from torch import Tensor

from sparseops import _native
from sparseops.ops import cuda, registry, scaled_linear

NAME = "nm24_linear_f8"


def supports(x: Tensor, values: Tensor | None = None, *_: Any) -> str | None:
    """Why no kernel can run on ``x`` and ``values``, None if one can; looks at devices and dtypes alone."""
    if x.dtype is not torch.float8_e4m3fn:
        return f"there is no kernel for {x.dtype}"
    if reason := cuda.no_device_reason(x) or cuda.no_sm90_reason(x.device):
        return reason
    return cuda.DENSE_REASON if _native.impl == "dense" else None


_op = scaled_linear.ScaledLinear(NAME, torch.float8_e4m3fn, supports)


def nm24_linear_f8(
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
    """Linear layer of float8 numbers with a 2:4 weight: scales, bias and activation in one pass. It has no
    gradient.

    On a GPU sums keep fewer bits than float32, about 14. Where no kernel can run (``supports`` says why, and
    rows of the result must be multiples of 16 bytes) the plain torch reference runs, and a warning says so
    once.

    Args:
        x: quantized activations [..., K], float8_e4m3fn.
        values: quantized kept weights [O, P/2], float8_e4m3fn, P being K rounded up to a multiple of 32.
        meta: their columns [O, P/8], uint8.
        x_scale: what 1 in x stands for, [...] for each token, or [1]; float32.
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
        fn=nm24_linear_f8,
        reference=scaled_linear.reference,
        supports=supports,
        impls={("cuda", "sm_90a"): "e4m3 by wgmma.sp, rows of y of whole 16 bytes; f16, bf16 or f32 out"},
        cases=scaled_linear.cases(lambda x: (x / 16).to(torch.float8_e4m3fn)),
        dtype=torch.float8_e4m3fn,
        differentiable=False,
    )
)
