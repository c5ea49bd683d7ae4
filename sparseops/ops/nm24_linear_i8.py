"""``nm24_linear_i8``: nm24_linear of 8-bit integers, with a scale for each token and each output feature.

y[..., o] = act(x_scale[...] * w_scale[o] * (sum over k of x[..., k] * w[o, k]) + bias[o])

x [..., K] and the 2:4 weight w [O, K] are int8, the sum is an int32 (exact: K stays below 2**17), the rest is
float32, rounded once to out_dtype. ``sparseops.formats.nm24`` draws the layout of values and meta.
"""

from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseops import _native
from sparseops.formats.nm24 import PITCH, expand
from sparseops.ops import cuda, registry
from sparseops.ops.common import ACTIVATIONS, activate, check_devices, loop_vmap, make_bias, make_weight
from sparseops.ops.nm24_to_dense import expanded

NAME = "nm24_linear_i8"

_MOST_FEATURES = 1 << 17  # 2**17 products of at most 2**14 fit in an int32


def nm24_linear_i8_reference(
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
    """Plain torch: expand the weight and multiply in float64, where sums of integers are exact. With float64
    scales all else is float64 too, the result included."""
    return _dense(x, expand(values, meta), x_scale, w_scale, bias, out_dtype, activation)


def _dense(
    x: Tensor,
    columns: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    activation: str,
) -> Tensor:
    sums = F.linear(x.double(), columns[:, : x.shape[-1]].double()).to(w_scale.dtype)
    z = sums * x_scale.unsqueeze(-1) * w_scale
    y = activate(z if bias is None else z + bias, activation)
    return y if y.dtype is torch.float64 else y.to(out_dtype)


def supports(x: Tensor, values: Tensor | None = None, *_: Any) -> str | None:
    """Why no kernel can run on ``x`` and ``values``, None if one can; looks at devices and dtypes alone."""
    if x.dtype is not torch.int8:
        return f"there is no kernel for {x.dtype}"
    if reason := cuda.no_device_reason(x):
        return reason
    return cuda.DENSE_REASON if _native.impl == "dense" else None


def _check(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    activation: str,
) -> tuple[int, ...]:
    """Check every argument, and return the shape of the output."""
    if out_dtype not in registry.KERNEL_DTYPES:
        names = ", ".join(str(dtype) for dtype in registry.KERNEL_DTYPES)
        raise TypeError(f"{NAME}: out_dtype must be one of {names}, got {out_dtype}")
    for name, tensor, dtype in (
        ("x", x, torch.int8),
        ("values", values, torch.int8),
        ("meta", meta, torch.uint8),
        ("x_scale", x_scale, torch.float32),
        ("w_scale", w_scale, torch.float32),
        ("bias", bias, out_dtype),
    ):
        if tensor is not None and tensor.dtype is not dtype:
            raise TypeError(f"{NAME}: {name} must have dtype {dtype}, got {tensor.dtype}")
    if x.ndim == 0:
        raise ValueError(f"{NAME}: x must have at least one dimension, got a scalar")
    if values.ndim != 2 or values.shape[1] % (PITCH // 2):
        raise ValueError(
            f"{NAME}: values must have shape [O, P/2], P divisible by 32, got {tuple(values.shape)}"
        )
    rows, features = values.shape[0], x.shape[-1]
    packed = values.shape[1] * 2
    if not packed - PITCH < features <= packed or features > _MOST_FEATURES:
        raise ValueError(
            f"{NAME}: x must have {max(packed - PITCH + 1, 0)} to {packed} features to match values of "
            f"{packed} packed columns, and at most {_MOST_FEATURES}, got {features}"
        )
    tokens = (*x.shape[:-1],)
    if x_scale.shape not in (tokens, (1,)):
        raise ValueError(f"{NAME}: x_scale must have shape {tokens} or (1,), got {tuple(x_scale.shape)}")
    for name, tensor, shape in (
        ("meta", meta, (rows, packed // 8)),
        ("w_scale", w_scale, (rows,)),
        ("bias", bias, (rows,)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{NAME}: {name} must have shape {shape}, got {tuple(tensor.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{NAME}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    tensors = {"values": values, "meta": meta, "x_scale": x_scale, "w_scale": w_scale, "bias": bias}
    check_devices(NAME, "x", x=x, **tensors)
    return (*tokens, rows)


def _impl(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    activation: str,
) -> Tensor:
    shape = _check(x, values, meta, x_scale, w_scale, bias, out_dtype, activation)
    reason = supports(x, values)
    if reason is not None:
        registry.fall_back(NAME, reason)
    if reason is not None or not values.numel():
        dense = _dense(x, expanded(values, meta), x_scale, w_scale, bias, out_dtype, activation)
        return dense.contiguous()
    tokens = prod(shape[:-1])
    if not tokens:
        return x.new_empty(shape, dtype=out_dtype)
    rows = x.reshape(tokens, x.shape[-1])
    scales = x_scale.reshape(-1).expand(tokens)
    return cuda.linear(
        NAME, rows, values, meta, bias, None, activation, out_dtype, x_scale=scales, w_scale=w_scale
    ).view(shape)


def _fake(x: Tensor, *rest: Any) -> Tensor:
    shape = _check(x, *rest)
    return x.new_empty(shape, dtype=rest[-2])


def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    return loop_vmap(_op, info, in_dims, args), 0


_op = registry.define(
    f"{NAME}(Tensor x, Tensor values, Tensor meta, Tensor x_scale, Tensor w_scale, Tensor? bias, "
    "ScalarType out_dtype, str activation) -> Tensor",
    impl=_impl,
    fake=_fake,
    vmap=_vmap,
    autocast=False,
)


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
    if registry.fast_on_gpu(x, values, meta, x_scale, w_scale, bias):
        return _impl(x, values, meta, x_scale, w_scale, bias, out_dtype, activation)
    if reason := registry.transform_reason():
        registry.fall_back(NAME, reason)
        return nm24_linear_i8_reference(
            x, values, meta, x_scale, w_scale, bias, out_dtype=out_dtype, activation=activation
        )
    return _op(x, values, meta, x_scale, w_scale, bias, out_dtype, activation)


def _inputs(
    tokens: int | tuple[int, ...],
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    per_token: bool = True,
    activation: str = "none",
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    lead = (tokens,) if isinstance(tokens, int) else tokens
    generator = torch.Generator().manual_seed(in_features * out_features)

    def quantized(shape: tuple[int, ...]) -> Tensor:
        return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)

    weight = make_weight((out_features, in_features), torch.float32, generator)
    values = torch.where(weight.values != 0, quantized(tuple(weight.values.shape)), 0)
    x_scale = torch.rand(lead if per_token else (1,), generator=generator) / 64
    w_scale = torch.rand(out_features, generator=generator) / max(1, in_features)
    offset = make_bias(out_features, dtype, generator) if bias else None
    args = (quantized((*lead, in_features)), values.to(torch.int8), weight.meta, x_scale, w_scale, offset)
    return args, {"out_dtype": dtype, "activation": activation}


registry.register(
    registry.Op(
        name=NAME,
        fn=nm24_linear_i8,
        reference=nm24_linear_i8_reference,
        supports=supports,
        impls=cuda.impls("int8 by mma.sp, any shape; f16, bf16 or f32 out"),
        cases=tuple(
            registry.Case(name, partial(_inputs, *sizes, **options))
            for name, sizes, options in (
                ("one_token", (1, 64, 48), {}),
                ("lt_tile", (2, 8, 3), {}),
                ("eq_tile", (64, 128, 64), {}),
                ("gt_tile", (65, 160, 80), {}),
                ("tail", (7, 37, 19), {}),
                ("deep", (9, 1100, 33), {"activation": "gelu"}),
                ("one_scale", (5, 64, 24), {"per_token": False}),
                ("no_bias", (5, 64, 24), {"bias": False, "activation": "relu"}),
                ("batched", ((2, 3, 5), 70, 24), {"activation": "silu"}),
                ("vector", ((), 40, 12), {}),
                ("no_features", (3, 0, 5), {}),
                ("empty", (0, 64, 24), {}),
                ("no_rows", (4, 64, 0), {}),
            )
        ),
        dtype=torch.int8,
        differentiable=False,
    )
)
