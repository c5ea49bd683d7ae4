"""``nm24_grad_values``: the gradient of a 2:4 weight's values, without the dense gradient.

grad_values[o, j] = sum over t of grad[t, o] * x[t, k], where k is the column of value j of row o, as meta
says; 0 where k >= K. It is what ``nm24_linear`` needs on its way back, with grad [tokens, O] and x [tokens,
K].
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparseops import _native
from sparseops.formats.nm24 import DTYPES, PITCH, gather, pack_columns
from sparseops.ops import cuda, registry
from sparseops.ops.common import check_devices, loop_vmap, make_weight, rows_at_once

NAME = "nm24_grad_values"


def nm24_grad_values_reference(grad: Tensor, x: Tensor, meta: Tensor) -> Tensor:
    """Plain torch: the dense gradient, gathered."""
    return gather(pack_columns(grad.t() @ x), meta)


def supports(grad: Tensor, x: Tensor | None = None, *_: Any) -> str | None:
    """Why no kernel can run on ``grad``, None if one can (on the CPU, torch's own product is it)."""
    if grad.device.type == "cpu" and not registry.on_gpu(grad):
        return None
    if cuda.by_triton(grad):
        return cuda.no_triton_reason(grad)
    if registry.on_gpu(grad) and grad.dtype not in (torch.float16, torch.bfloat16):
        return f"there is no CUDA kernel for {grad.dtype}"
    return cuda.no_device_reason(grad)


def _check(grad: Tensor, x: Tensor, meta: Tensor) -> tuple[int, int]:
    """Check the arguments, and return the weight's rows and packed columns."""
    if grad.dtype not in DTYPES:
        raise TypeError(f"{NAME}: grad must be a floating-point tensor (16, 32 or 64 bits), got {grad.dtype}")
    if x.dtype is not grad.dtype:
        raise TypeError(f"{NAME}: x must have the dtype of grad ({grad.dtype}), got {x.dtype}")
    if meta.dtype is not torch.uint8:
        raise TypeError(f"{NAME}: meta must have dtype torch.uint8, got {meta.dtype}")
    if grad.ndim != 2:
        raise ValueError(f"{NAME}: grad must have shape [tokens, O], got {tuple(grad.shape)}")
    tokens, rows = grad.shape
    if x.ndim != 2 or x.shape[0] != tokens:
        raise ValueError(f"{NAME}: x must have shape [{tokens}, K], got {tuple(x.shape)}")
    packed = -(-x.shape[1] // PITCH) * PITCH
    if meta.shape != (rows, packed // 8):
        raise ValueError(f"{NAME}: meta must have shape {(rows, packed // 8)}, got {tuple(meta.shape)}")
    check_devices(NAME, "grad", grad=grad, x=x, meta=meta)
    return rows, packed


def _impl(grad: Tensor, x: Tensor, meta: Tensor) -> Tensor:
    rows, packed = _check(grad, x, meta)
    if reason := supports(grad):
        registry.fall_back(NAME, reason)
    if reason is not None or not registry.on_gpu(grad):
        return _by_rows(grad, x, meta)
    if not (grad.numel() and packed):
        return grad.new_zeros((rows, packed // 2))
    if cuda.by_triton(grad):
        from sparseops.triton.nm24_grad_values import grad_values as by_triton

        return by_triton(cuda.unit_rows(grad), cuda.unit_rows(x), cuda.aligned(meta))
    tokens, features = x.shape
    grad_values = grad.new_empty((rows, packed // 2))
    grad, x, meta = cuda.aligned_rows(grad), cuda.aligned_rows(x), meta.contiguous()
    _native.require(NAME).nm24_grad_values_cuda(
        grad.data_ptr(),
        cuda.row_stride(grad),
        x.data_ptr(),
        cuda.row_stride(x),
        meta.data_ptr(),
        grad_values.data_ptr(),
        tokens,
        rows,
        features,
        packed,
        registry.KERNEL_DTYPES[grad.dtype],
        *cuda.place(grad),
    )
    return grad_values


def _by_rows(grad: Tensor, x: Tensor, meta: Tensor) -> Tensor:
    """The reference for as many rows of the weight at a time as memory is meant for."""
    block = rows_at_once(x.shape[1] * x.element_size())
    if grad.shape[1] <= block:
        return nm24_grad_values_reference(grad, x, meta)
    parts = zip(grad.split(block, 1), meta.split(block), strict=True)
    return torch.cat([nm24_grad_values_reference(part, x, part_meta) for part, part_meta in parts])


def _fake(grad: Tensor, x: Tensor, meta: Tensor) -> Tensor:
    rows, packed = _check(grad, x, meta)
    return grad.new_empty((rows, packed // 2))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    """In grad it is linear as ``nm24_linear`` is in its values, in x as in its x."""
    grad, x, meta = ctx.saved_tensors
    ops, needs = torch.ops.sparseops, ctx.needs_input_grad
    grad_grad = ops.nm24_linear(x, cotangent.contiguous(), meta, None, None, "none") if needs[0] else None
    grad_x = grad @ ops.nm24_to_dense(cotangent, meta)[:, : x.shape[1]] if needs[1] else None
    return grad_grad, grad_x, None


def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    return loop_vmap(_op, info, in_dims, args), 0


_op = registry.define(
    f"{NAME}(Tensor grad, Tensor x, Tensor meta) -> Tensor",
    impl=_impl,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    vmap=_vmap,
    autocast=False,
)


def nm24_grad_values(grad: Tensor, x: Tensor, meta: Tensor) -> Tensor:
    """Gradient of ``sum(grad * nm24_linear(x, values, meta))`` with respect to values.

    Where no kernel can run (``supports`` says why) the dense gradient is computed in plain torch, a part of
    it at a time, and a warning says so once.

    Args:
        grad: [tokens, O], float16, bfloat16, float32 or float64.
        x: [tokens, K] in the dtype of grad.
        meta: [O, P/8], uint8, P being K rounded up to a multiple of 32.

    Returns:
        [O, P/2] in the dtype of grad; differentiable in grad and x.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or a device is wrong, or a ``SPARSEOPS_*`` variable is.
    """
    if reason := registry.transform_reason():
        registry.fall_back(NAME, reason)
        return nm24_grad_values_reference(grad, x, meta)
    return _op(grad, x, meta)


def _inputs(
    tokens: int, in_features: int, out_features: int, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(in_features * out_features)
    grad = torch.randn((tokens, out_features), generator=generator).to(dtype)
    x = torch.randn((tokens, in_features), generator=generator).to(dtype)
    return (grad, x, make_weight((out_features, in_features), dtype, generator).meta), {}


registry.register(
    registry.Op(
        name=NAME,
        fn=nm24_grad_values,
        reference=nm24_grad_values_reference,
        supports=supports,
        impls={
            ("cpu", "torch"): "torch's product, gathered",
            **cuda.impls("f16 and bf16", "f32, f16 and bf16"),
        },
        cases=tuple(
            registry.Case(name, partial(_inputs, tokens, in_features, out_features))
            for name, tokens, in_features, out_features in (
                ("lt_tile", 2, 8, 3),
                ("eq_tile", 64, 64, 64),
                ("gt_tile", 65, 160, 80),
                ("tail", 7, 37, 19),
                ("one_token", 1, 40, 16),
                ("deep", 300, 33, 10),
                ("no_tokens", 0, 64, 24),
                ("no_rows", 4, 64, 0),
            )
        ),
    )
)
