"""``nm24_linear``: y[..., o] = act(sum over k of x[..., k] * w[o, k] + bias[o] + residual[..., o]) with a 2:4
weight w [O, K].

``sparseops.formats.nm24`` draws the layout of values [O, P/2] and meta [O, P/8]; P is K rounded up to a
multiple of 32, and x is never padded on the CPU. In float16 and bfloat16 the kernels accumulate in float32
and round once (with a residual the CPU rounds three times, as plain torch does).
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseops import _native
from sparseops.formats.nm24 import PITCH, expand
from sparseops.ops import cuda, registry
from sparseops.ops.common import (
    ACTIVATIONS,
    activate,
    activation_grad,
    behind_one,
    beside_nan,
    check_devices,
    check_residual,
    check_weight,
    finish,
    layer_vmap,
    make_bias,
    make_weight,
    saved_epilogue,
)
from sparseops.ops.nm24_to_dense import expanded

NAME = "nm24_linear"


def nm24_linear_reference(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "none",
) -> Tensor:
    """Plain torch: expand the weight and call ``F.linear``."""
    return _dense(x, expand(values, meta), bias, residual, activation)


def _dense(
    x: Tensor, columns: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    return finish(F.linear(x, columns[:, : x.shape[-1]], bias), residual, activation)


def supports(x: Tensor, values: Tensor | None = None, *_: Any) -> str | None:
    """Why no kernel can run on ``x`` and ``values``, None if one can; looks at devices and dtypes alone."""
    return cuda.no_triton_reason(x, values) if _by_triton(x) else cuda.no_product_reason(x, values)


def _by_triton(x: Tensor) -> bool:
    return _native.impl in ("auto", "triton") and cuda.by_triton(x)


def kernel(values: Tensor) -> str:
    """The kernel that runs for ``values``, where ``supports`` finds nothing against it."""
    if _by_triton(values):
        return cuda.triton_name("expanded in registers")
    return cuda.kernel_name(values, no_wgmma(values) if registry.on_gpu(values) else None)


def prepare(values: Tensor, meta: Tensor, **options: Any) -> None:
    """``cuda.prepare``, where a CUDA kernel is going to run."""
    if not _by_triton(values):
        cuda.prepare(values, meta, **options)


def no_wgmma(values: Tensor) -> str | None:
    """Why the CUDA kernel for ``values`` is none by wgmma.sp, None if it is one, or none runs."""
    return None if _by_triton(values) else cuda.no_wgmma_reason(values, values.shape[0], values.dtype)


def _check(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> tuple[int, int]:
    """Check every argument but the devices, and return the weight's rows and packed columns."""
    rows, packed = check_weight(NAME, x, values, meta, bias, activation)
    if x.ndim == 0:
        raise ValueError(f"{NAME}: x must have at least one dimension, got a scalar")
    _check_features(x.shape[-1], packed)
    check_residual(NAME, x, residual, (*x.shape[:-1], rows))
    return rows, packed


def _check_features(features: int, packed: int) -> None:
    if not packed - PITCH < features <= packed:
        raise ValueError(
            f"{NAME}: x must have {max(packed - PITCH + 1, 0)} to {packed} features to match values of "
            f"{packed} packed columns, got {features}"
        )


def _as_rows(x: Tensor) -> Tensor:
    """[..., K] as [tokens, K]; the count is spelled out because -1 is ambiguous where there is no element."""
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])


def _kernel(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Check the arguments and run the CPU kernel."""
    shape = x.shape
    if len(shape) != 2:
        rows, _ = _check(x, values, meta, bias, None, activation)
        return _kernel(_as_rows(x), values, meta, bias, activation).view(*shape[:-1], rows)
    rows, packed = check_weight(NAME, x, values, meta, bias, activation)
    tokens, features = shape
    _check_features(features, packed)
    row_stride, column_stride = x.stride()
    if column_stride != 1:
        x = x.contiguous()
        row_stride = features
    if not (values.is_contiguous() and meta.is_contiguous() and (bias is None or bias.is_contiguous())):
        values, meta = values.contiguous(), meta.contiguous()
        bias = None if bias is None else bias.contiguous()
    y = x.new_empty(tokens, rows)  # two ints: a tuple takes 0.6 us longer
    if not (tokens and rows):
        return y
    _native.C.nm24_linear(
        x.data_ptr(),
        row_stride,
        values.data_ptr(),
        meta.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        tokens,
        features,
        rows,
        packed,
        registry.KERNEL_DTYPES[x.dtype],
        ACTIVATIONS[activation],
        torch.get_num_threads(),
    )
    return y


def _impl(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    check_devices(NAME, "x", x=x, values=values, meta=meta, bias=bias, residual=residual)
    reason = supports(x, values)
    if reason is None and residual is None and not registry.on_gpu(x):
        return _kernel(x, values, meta, bias, activation)
    _, packed = _check(x, values, meta, bias, residual, activation)
    if reason is not None:
        registry.fall_back(NAME, reason)
        return _dense(x, expanded(values, meta), bias, residual, activation).contiguous()
    if residual is not None and not registry.on_gpu(x):
        return activate(_kernel(x, values, meta, bias, "none").add_(residual), activation)
    shape = (*x.shape[:-1], values.shape[0])
    if not prod(shape):
        return x.new_empty(shape)
    if not packed:  # nothing to multiply
        return _dense(x, expanded(values, meta), bias, residual, activation).contiguous()
    residual = None if residual is None else _as_rows(residual)
    if _by_triton(x):
        return _in_triton(_as_rows(x), values, meta, bias, residual, activation).view(shape)
    return cuda.linear(NAME, _as_rows(x), values, meta, bias, residual, activation, x.dtype).view(shape)


def _in_triton(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    """Run the kernel in Triton on checked tensors; x and residual are rows."""
    from sparseops.triton.nm24_linear import linear

    return linear(
        cuda.unit_rows(x),
        cuda.aligned(values),
        cuda.aligned(meta),
        None if bias is None else bias.contiguous(),
        None if residual is None else cuda.unit_rows(residual),
        activation,
    )


def _fake(
    x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    rows, _ = _check(x, values, meta, bias, residual, activation)
    check_devices(NAME, "x", x=x, values=values, meta=meta, bias=bias, residual=residual)
    return x.new_empty((*x.shape[:-1], rows))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, meta, bias, residual, activation = inputs
    ctx.activation = activation
    ctx.save_for_backward(
        x,
        values,
        meta,
        *saved_epilogue(activation, bias, residual, output),
    )
    cuda.forget_values(values)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, meta, bias, residual, y = ctx.saved_tensors
    at = _op(x, values, meta, bias, residual, "none") if ctx.activation in ("silu", "gelu") else y
    grad = activation_grad(grad, at, ctx.activation)
    grad_x = grad_values = grad_bias = None
    ops, needs = torch.ops.sparseops, ctx.needs_input_grad
    if needs[0]:
        grad_x = grad @ ops.nm24_to_dense(values, meta)[:, : x.shape[-1]]
    if needs[1]:
        grad_values = ops.nm24_grad_values(_as_rows(grad), _as_rows(x), meta)
    if needs[3]:
        grad_bias = _as_rows(grad).sum(0)
    return grad_x, grad_values, None, grad_bias, grad if needs[4] else None, None


def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    return layer_vmap(_op, info, in_dims, args, residual=4, images=False)


_op = registry.define(
    f"{NAME}(Tensor x, Tensor values, Tensor meta, Tensor? bias, Tensor? residual, str activation) -> Tensor",
    impl=_impl,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    vmap=_vmap,
    autocast=True,
)


def nm24_linear(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: str = "none",
) -> Tensor:
    """Linear layer with a 2:4 weight, bias, residual and activation in one pass.

    Where no kernel can run (``supports`` says why) the plain torch reference runs, and a warning says so
    once.

    Args:
        x: activations [..., K], float16, bfloat16, float32 or float64.
        values: kept weights [O, P/2] in the dtype of x, P being K rounded up to a multiple of 32.
        meta: their columns [O, P/8], uint8.
        bias: [O] in the dtype of x, or None.
        residual: what is added before the activation, [..., O] in the dtype of x, or None.
        activation: ``"none"``, ``"relu"``, ``"silu"`` or ``"gelu"`` (the exact one).

    Returns:
        [..., O], contiguous; differentiable in x, values, bias and residual.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, a device or the activation is wrong, or a ``SPARSEOPS_*`` variable is.
    """
    if residual is None and registry.fast(x, values, meta, bias):
        return _kernel(x, values, meta, bias, activation)
    if registry.fast_on_gpu(x, values, meta, bias, residual):
        return _impl(x, values, meta, bias, residual, activation)
    if reason := registry.transform_reason():
        registry.fall_back(NAME, reason)
        return nm24_linear_reference(x, values, meta, bias, residual, activation=activation)
    return _op(x, values, meta, bias, residual, activation)


def _inputs(
    tokens: int | tuple[int, ...],
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    residual: Callable[[Tensor], Tensor] | None = None,
    activation: str = "none",
    view: Callable[[Tensor], Tensor] | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    lead = (tokens,) if isinstance(tokens, int) else tokens
    generator = torch.Generator().manual_seed(in_features * out_features)
    x = torch.randn((*lead, in_features), generator=generator).to(dtype)
    weight = make_weight((out_features, in_features), dtype, generator)
    offset = make_bias(out_features, dtype, generator) if bias else None
    args: tuple[Any, ...] = (view(x) if view else x, weight.values, weight.meta, offset)
    if residual:
        args += (residual(torch.randn((*lead, out_features), generator=generator).to(dtype)),)
    return args, {"activation": activation}


def _case(name: str, *sizes: Any, **options: Any) -> registry.Case:
    return registry.Case(name, partial(_inputs, *sizes, **options))


CASES = (
    _case("one_token", 1, 64, 48),
    _case("lt_tile", 2, 8, 3),
    _case("eq_tile", 16, 64, 32),
    _case("gt_tile", 33, 160, 80),
    _case("tail", 7, 37, 19),
    _case("one_feature", 3, 1, 5),
    _case("no_features", 3, 0, 5),
    _case("one_row", 5, 96, 1),
    _case("deep", 9, 1100, 33),
    _case("wide", 4, 64, 517),
    _case("many_tokens", 203, 72, 40),
    _case("no_bias", 5, 64, 24, bias=False),
    _case("relu", 6, 64, 24, activation="relu"),
    _case("silu", 6, 64, 24, activation="silu"),
    _case("gelu", 6, 64, 24, activation="gelu"),
    _case("relu_no_bias_tail", 5, 70, 21, activation="relu", bias=False),
    _case("batched", (2, 3, 5), 64, 24),
    _case("vector", (), 40, 12),
    _case("strided", 6, 40, 24, view=beside_nan),
    _case("strided_one_token", 1, 39, 24, view=beside_nan),
    _case("misaligned", 6, 64, 24, view=behind_one),
    _case("transposed", 6, 64, 24, view=lambda x: x.t().contiguous().t()),
    _case("expanded", 1, 64, 24, view=lambda x: x.expand(5, -1)),
    _case(
        "batched_transposed", (3, 4), 64, 24, view=lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)
    ),
    _case("negated", 6, 64, 24, view=torch._neg_view),
    _case("residual", 6, 64, 24, residual=torch.clone),
    _case("residual_tail", (2, 5), 37, 19, residual=beside_nan, bias=False),
    # small: the sign of a rounded sum near 0, and with it relu's slope, is a matter of rounding
    _case("residual_relu", 2, 64, 20, residual=behind_one, activation="relu"),
    _case("residual_gelu", 40, 64, 70, residual=behind_one, activation="gelu"),
    _case("empty", 0, 64, 24),
    _case("batched_empty", (2, 0), 64, 24, activation="gelu"),
    _case("no_rows", 4, 64, 0),
)

registry.register(
    registry.Op(
        name=NAME,
        fn=nm24_linear,
        reference=nm24_linear_reference,
        supports=supports,
        impls=registry.cpu_impls("f32, f16 and bf16, any shape")
        | cuda.impls(
            "f16 and bf16 by mma.sp, any shape, and by wgmma.sp on compute capability 9.0 for multiples of 8 "
            "outputs; f32 where torch allows bf16 for it",
            "f32, f16 and bf16, any shape",
        ),
        cases=CASES,
        prepare=prepare,
        no_wgmma=no_wgmma,
        kernel=kernel,
    )
)
