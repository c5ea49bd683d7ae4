"""``nm24_to_dense``: a 2:4 weight as packed columns with the zeros filled in.

values [O, P/2], meta [O, P/8] -> [O, P], bit for bit. ``sparseops.formats.nm24`` draws the layout.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparseops import _native, triton
from sparseops.formats.nm24 import DTYPES, expand, gather
from sparseops.ops import cuda, registry
from sparseops.ops.common import check_devices, check_weight, make_weight

NAME = "nm24_to_dense"


def nm24_to_dense_reference(values: Tensor, meta: Tensor) -> Tensor:
    """Plain torch: scatter the kept values into zeros."""
    return expand(values, meta)


def supports(values: Tensor, meta: Tensor | None = None) -> str | None:
    """Why no kernel can expand ``values``, None if one can (on the CPU, torch's own scatter is it)."""
    if values.device.type == "cpu" and not registry.on_gpu(values):
        return None
    by_triton = cuda.by_triton(values)
    if registry.on_gpu(values) and values.element_size() not in (1, 2, 4):
        return f"there is no {'Triton' if by_triton else 'CUDA'} kernel for {values.dtype}"
    return triton.no_triton_reason(values) if by_triton else cuda.no_device_reason(values)


def _check(values: Tensor, meta: Tensor) -> None:
    if values.dtype not in DTYPES:
        raise TypeError(
            f"{NAME}: values must be a floating-point tensor (16, 32 or 64 bits), got {values.dtype}"
        )
    check_weight(NAME, values, values, meta, None, "none")
    check_devices(NAME, "values", values=values, meta=meta)


def _impl(values: Tensor, meta: Tensor) -> Tensor:
    _check(values, meta)
    if reason := supports(values):
        registry.fall_back(NAME, reason)
    return expanded(values, meta)


def expanded(values: Tensor, meta: Tensor) -> Tensor:
    """The packed columns of a checked weight, by the kernel where one can run, and without a word where none
    can."""
    if not registry.on_gpu(values) or supports(values) is not None or not values.numel():
        return expand(values, meta)
    values, meta = cuda.aligned(values), meta.contiguous()
    if cuda.by_triton(values):
        from sparseops.triton.nm24_to_dense import to_dense

        return to_dense(values, cuda.aligned(meta))
    rows, kept = values.shape
    dense = values.new_empty((rows, kept * 2))
    _native.require(NAME).nm24_to_dense_cuda(
        values.data_ptr(),
        meta.data_ptr(),
        dense.data_ptr(),
        rows,
        kept * 2,
        values.element_size(),
        *cuda.place(values),
    )
    return dense


def _fake(values: Tensor, meta: Tensor) -> Tensor:
    _check(values, meta)
    return values.new_empty((values.shape[0], values.shape[1] * 2))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (meta,) = ctx.saved_tensors
    return gather(grad, meta), None


def _vmap(info: Any, in_dims: tuple[int | None, ...], values: Tensor, meta: Tensor) -> tuple[Tensor, int]:
    stacked = [
        t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip((values, meta), in_dims, strict=True)
    ]
    dense = _op(*(t.flatten(0, 1) for t in stacked))
    return dense.unflatten(0, (info.batch_size, -1)), 0


_op = registry.define(
    f"{NAME}(Tensor values, Tensor meta) -> Tensor",
    impl=_impl,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    vmap=_vmap,
    autocast=False,
)


def nm24_to_dense(values: Tensor, meta: Tensor) -> Tensor:
    """Expand a 2:4 weight to its packed columns.

    Args:
        values: kept elements [O, P/2], float16, bfloat16, float32 or float64.
        meta: their columns [O, P/8], uint8, on the device of values.

    Returns:
        The packed columns [O, P] in the dtype of values; differentiable in values.
        ``sparseops.formats.nm24.unpack_columns`` gives them the weight's logical shape.

    Raises:
        TypeError: values is not floating point or meta is not uint8.
        ValueError: the shapes or devices do not fit together.
    """
    if reason := registry.transform_reason():
        registry.fall_back(NAME, reason)
        return nm24_to_dense_reference(values, meta)
    return _op(values, meta)


def _inputs(rows: int, cols: int, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    weight = make_weight((rows, cols), dtype, torch.Generator().manual_seed(rows + cols))
    return (weight.values, weight.meta), {}


registry.register(
    registry.Op(
        name=NAME,
        fn=nm24_to_dense,
        reference=nm24_to_dense_reference,
        supports=supports,
        impls={
            ("cpu", "torch"): "torch's scatter",
            **cuda.impls("copies 1, 2 and 4-byte elements", "the same"),
        },
        cases=tuple(
            registry.Case(name, partial(_inputs, rows, cols))
            for name, rows, cols in (
                ("lt_tile", 1, 4),
                ("eq_tile", 16, 32),
                ("gt_tile", 17, 96),
                ("tail", 5, 37),
                ("no_rows", 0, 64),
            )
        ),
    )
)
