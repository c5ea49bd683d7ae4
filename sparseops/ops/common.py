"""What the ops with a 2:4 weight share: activations, argument checks and the inputs of their test cases."""

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseops.formats.nm24 import DTYPES, NM24

ACTIVATIONS = {"none": 0, "relu": 1, "silu": 2, "gelu": 3}
"""The fused activations, with their codes in csrc/ops.h. ``gelu`` is the exact one (erf)."""

_UINT8 = torch.uint8
_DENSE_GRAD_BYTES = 1 << 26


def rows_at_once(row_bytes: int) -> int:
    """How many rows of a weight's dense gradient are held in memory at once, where it has to be computed."""
    return max(1, _DENSE_GRAD_BYTES // max(1, row_bytes))


def activate(z: Tensor, activation: str) -> Tensor:
    """``activation`` of ``z``, in plain torch."""
    if activation == "relu":
        return F.relu(z)
    if activation == "silu":
        return F.silu(z)
    if activation == "gelu":
        return F.gelu(z)
    return z


def finish(z: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """``activation`` of ``z + residual``, in plain torch."""
    return activate(z if residual is None else z + residual, activation)


def activation_grad(grad: Tensor, at: Tensor, activation: str) -> Tensor:
    """Gradient with respect to the input of ``activation``; ``at`` is its output for relu, else its input."""
    aten = torch.ops.aten
    if activation == "relu":
        return aten.threshold_backward(grad, at, 0)
    if activation == "silu":
        if torch.is_grad_enabled():  # silu_backward has no derivative of its own
            slope = torch.sigmoid(at)
            return grad * slope * (1 + at * (1 - slope))
        return aten.silu_backward(grad, at)
    if activation == "gelu":
        return aten.gelu_backward(grad, at)
    return grad


def check_weight(
    op: str, x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, activation: str
) -> tuple[int, int]:
    """Check dtypes, activation and the shapes of a weight, and return its rows O and packed columns P.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or the activation is wrong.
    """
    dtype = x.dtype
    if dtype not in DTYPES:
        raise TypeError(f"{op}: x must be a floating-point tensor (16, 32 or 64 bits), got {dtype}")
    if values.dtype is not dtype:
        raise TypeError(f"{op}: values must have the dtype of x ({dtype}), got {values.dtype}")
    if meta.dtype is not _UINT8:
        raise TypeError(f"{op}: meta must have dtype torch.uint8, got {meta.dtype}")
    shape = values.shape
    if len(shape) != 2 or shape[1] % 16:
        raise ValueError(f"{op}: values must have shape [O, P/2], P divisible by 32, got {tuple(shape)}")
    rows, kept = shape
    if meta.shape != (rows, kept // 4):
        raise ValueError(f"{op}: meta must have shape {(rows, kept // 4)}, got {tuple(meta.shape)}")
    if bias is not None:
        if bias.dtype is not dtype:
            raise TypeError(f"{op}: bias must have the dtype of x ({dtype}), got {bias.dtype}")
        if bias.shape != (rows,):
            raise ValueError(f"{op}: bias must have shape {(rows,)}, got {tuple(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return rows, kept * 2


def check_residual(op: str, x: Tensor, residual: Tensor | None, shape: tuple[int, ...]) -> None:
    """Check what is added to an output of ``shape``.

    Raises:
        TypeError: its dtype is not that of ``x``.
        ValueError: its shape is another one.
    """
    if residual is None:
        return
    if residual.dtype is not x.dtype:
        raise TypeError(f"{op}: residual must have the dtype of x ({x.dtype}), got {residual.dtype}")
    if residual.shape != shape:
        raise ValueError(f"{op}: residual must have shape {shape}, got {tuple(residual.shape)}")


def check_devices(op: str, first: str, **tensors: Tensor | None) -> None:
    """Check that the tensors, given by name, are on the device of the one called ``first``."""
    device = tensors[first].device  # type: ignore[union-attr]
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{op}: {name} must be on the device of {first} ({device}), got {tensor.device}")


def make_weight(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> NM24:
    """A random 2:4 weight for test cases, scaled so that outputs stay near 1."""
    fan_in = max(1, prod(shape[1:]))
    w = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
    return NM24.from_dense(w.to(dtype), prune="magnitude")


def make_bias(rows: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A random bias for test cases."""
    return torch.randn(rows, generator=generator).to(dtype)


def loop_vmap(
    op: torch._ops.OpOverload, info: Any, in_dims: tuple[int | None, ...], args: tuple[Any, ...]
) -> Tensor:
    """Batch rule for when the weight itself is batched: one call per weight, stacked along dimension 0."""
    return torch.stack(
        [
            op(
                *(
                    arg.select(dim, i) if isinstance(dim, int) else arg
                    for arg, dim in zip(args, in_dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
    )
