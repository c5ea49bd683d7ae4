"""``nm24_compress``: packed columns pruned to 2:4 by magnitude, as values and meta.

[O, P] -> values [O, P/2], meta [O, P/8], bit for bit what ``NM24.from_dense(w, prune="magnitude")`` stores:
of each four columns the two largest magnitudes, of equal ones the lower column; NaN and infinity count as the
largest. ``nm24_to_dense`` is its inverse where nothing was dropped. ``sparseops.formats.nm24`` draws the
layout.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparseops import _native
from sparseops.formats import nm24
from sparseops.formats.nm24 import DTYPES, PITCH, compress, pack_columns
from sparseops.ops import cuda, registry

NAME = "nm24_compress"


def nm24_compress_reference(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Plain torch: the format's own code."""
    return compress(packed)


def supports(packed: Tensor) -> str | None:
    """Why no kernel can compress ``packed``, None if one can (on the CPU, the format's own code is it)."""
    if not registry.on_gpu(packed):
        return None if packed.is_cpu else f"there is no {packed.device.type.upper()} kernel"
    if cuda.by_triton(packed):
        return cuda.no_triton_reason(packed)
    if packed.dtype not in registry.KERNEL_DTYPES:
        return f"there is no CUDA kernel for {packed.dtype}"
    return cuda.no_device_reason(packed)


def _check(packed: Tensor) -> None:
    if packed.dtype not in DTYPES:
        raise TypeError(
            f"{NAME}: packed must be a floating-point tensor (16, 32 or 64 bits), got {packed.dtype}"
        )
    if packed.ndim != 2 or packed.shape[1] % PITCH:
        raise ValueError(
            f"{NAME}: packed must have shape [O, P], P divisible by 32, got {tuple(packed.shape)}"
        )


def _impl(packed: Tensor) -> tuple[Tensor, Tensor]:
    _check(packed)
    if reason := supports(packed):
        registry.fall_back(NAME, reason)
    return _compressed(packed)


def _compressed(packed: Tensor) -> tuple[Tensor, Tensor]:
    """By the kernel where one can run, and without a word where none can."""
    if not registry.on_gpu(packed) or supports(packed) is not None or not packed.numel():
        return compress(packed)
    packed = cuda.aligned(packed)
    if cuda.by_triton(packed):
        from sparseops.triton.nm24_compress import compress as compress_by_triton

        return compress_by_triton(packed)
    values, meta = _fake(packed)
    _native.require(NAME).nm24_compress_cuda(
        packed.data_ptr(),
        values.data_ptr(),
        meta.data_ptr(),
        *packed.shape,
        registry.KERNEL_DTYPES[packed.dtype],
        *cuda.place(packed),
    )
    return values, meta


nm24.compressor = _compressed


def _fake(packed: Tensor) -> tuple[Tensor, Tensor]:
    _check(packed)
    rows, cols = packed.shape
    return packed.new_empty((rows, cols // 2)), packed.new_empty((rows, cols // 8), dtype=torch.uint8)


def _vmap(info: Any, in_dims: tuple[int | None, ...], packed: Tensor) -> tuple[Any, tuple[int, int]]:
    dim = in_dims[0]
    assert dim is not None
    values, meta = _op(packed.movedim(dim, 0).flatten(0, 1))
    count = (info.batch_size, -1)
    return (values.unflatten(0, count), meta.unflatten(0, count)), (0, 0)


_op = registry.define(
    f"{NAME}(Tensor packed) -> (Tensor, Tensor)", impl=_impl, fake=_fake, vmap=_vmap, autocast=False
)


def nm24_compress(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Prune packed columns to 2:4 by magnitude. It has no gradient.

    Args:
        packed: [O, P], P divisible by 32, float16, bfloat16, float32 or float64;
            ``sparseops.formats.nm24.pack_columns`` makes them of a weight.

    Returns:
        values [O, P/2] in the dtype of packed, and meta [O, P/8], uint8.

    Raises:
        TypeError: packed is not floating point.
        ValueError: its shape is wrong, or a ``SPARSEOPS_*`` variable is.
        RuntimeError: on the way back, a gradient was asked for.
    """
    if reason := registry.transform_reason():
        registry.fall_back(NAME, reason)
        return nm24_compress_reference(packed)
    return _op(packed)


def _inputs(
    rows: int, cols: int, dtype: torch.dtype, *, finite: bool = True
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(rows + cols)
    w = torch.randn((rows, cols), generator=generator)
    # few sizes, so that many groups have equal ones, or zeros
    w = torch.where(w > 1.5, w, (2 * w).round() / 2)
    hits = torch.randint(0, 5 if finite else 20, w.shape, generator=generator)
    for hit, value in enumerate((-0.0,) if finite else (-0.0, torch.nan, torch.inf, -torch.inf)):
        w = torch.where(hits == hit, value, w)
    return (pack_columns(w.to(dtype)),), {}


registry.register(
    registry.Op(
        name=NAME,
        fn=nm24_compress,
        reference=nm24_compress_reference,
        supports=supports,
        impls={
            ("cpu", "torch"): "the format's own code",
            **cuda.impls("f32, f16 and bf16", "f32, f16 and bf16"),
        },
        cases=tuple(
            registry.Case(name, partial(_inputs, rows, cols, finite=name != "nonfinite"))
            for name, rows, cols in (
                ("lt_tile", 1, 4),
                ("eq_tile", 16, 32),
                ("gt_tile", 17, 96),
                ("tail", 5, 37),
                ("many_rows", 300, 70),
                ("nonfinite", 40, 100),
                ("no_rows", 0, 64),
                ("no_columns", 3, 0),
            )
        ),
        differentiable=False,
    )
)
