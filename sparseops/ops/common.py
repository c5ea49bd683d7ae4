"""What the ops of a layer share: activations, argument checks, batch rule, inputs of test cases."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseops.formats.channel_pruned import ChannelPruned, Keep
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


def saved_epilogue(
    activation: str, bias: Tensor | None, residual: Tensor | None, output: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What the gradient of ``activation`` is going to need: bias and residual to compute its input again, or
    its output."""
    if activation in ("silu", "gelu"):
        return bias, residual, None
    return None, None, output if activation == "relu" else None


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
    check_dtypes(op, x, values)
    if meta.dtype is not _UINT8:
        raise TypeError(f"{op}: meta must have dtype torch.uint8, got {meta.dtype}")
    shape = values.shape
    if len(shape) != 2 or shape[1] % 16:
        raise ValueError(f"{op}: values must have shape [O, P/2], P divisible by 32, got {tuple(shape)}")
    rows, kept = shape
    if meta.shape != (rows, kept // 4):
        raise ValueError(f"{op}: meta must have shape {(rows, kept // 4)}, got {tuple(meta.shape)}")
    check_epilogue(op, x, bias, rows, activation)
    return rows, kept * 2


def check_dtypes(op: str, x: Tensor, values: Tensor) -> None:
    """Check the dtypes of activations and of a weight's values.

    Raises:
        TypeError: that of ``x`` is no floating-point one, or that of ``values`` another one.
    """
    dtype = x.dtype
    if dtype not in DTYPES:
        raise TypeError(f"{op}: x must be a floating-point tensor (16, 32 or 64 bits), got {dtype}")
    if values.dtype is not dtype:
        raise TypeError(f"{op}: values must have the dtype of x ({dtype}), got {values.dtype}")


def check_epilogue(op: str, x: Tensor, bias: Tensor | None, rows: int, activation: str) -> None:
    """Check the bias of ``rows`` outputs, and the activation.

    Raises:
        TypeError: the dtype of the bias is not that of ``x``.
        ValueError: its shape is wrong, or there is no such activation.
    """
    if bias is not None:
        if bias.dtype is not x.dtype:
            raise TypeError(f"{op}: bias must have the dtype of x ({x.dtype}), got {bias.dtype}")
        if bias.shape != (rows,):
            raise ValueError(f"{op}: bias must have shape {(rows,)}, got {tuple(bias.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


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


Kept = Sequence[int] | Callable[[int], list[int]] | None
"""The channels that a test case keeps: a list, what gives one for a width, or None for all."""


def blocks(size: int, *kept: int) -> Callable[[int], list[int]]:
    """The channels of these aligned blocks, as far as there are so many."""
    return lambda total: [i for i in range(total) if i // size in kept]


def make_pruned(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    generator: torch.Generator,
    inputs: Kept = None,
    outputs: Kept = None,
    groups: int = 1,
) -> ChannelPruned:
    """A random channel-pruned weight for test cases, scaled so that outputs stay near 1."""
    lists = []
    for kept, total in ((inputs, shape[1] * groups), (outputs, shape[0])):
        some = kept(total) if callable(kept) else kept
        lists.append(torch.arange(total) if some is None else torch.tensor(some, dtype=torch.long))
    fan_in = max(1, prod(shape[2:]) * len(lists[0]) // groups)
    w = (torch.randn(shape, generator=generator) * fan_in**-0.5).to(dtype)
    return ChannelPruned.from_dense(w, prune=Keep(lists[0], lists[1]), groups=groups)


def beside_nan(x: Tensor) -> Tensor:
    """``x`` as the left part of rows whose right part is NaN: a kernel that reads past K shows it."""
    return torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., : x.shape[-1]]


def behind_one(x: Tensor) -> Tensor:
    """``x`` one element behind the start of its storage."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def to_channels_last(x: Tensor) -> Tensor:
    """Images in the other memory format."""
    return x.contiguous(memory_format=torch.channels_last)


def cropped(x: Tensor) -> Tensor:
    """``x`` inside a frame of NaN: neither contiguous nor channels_last, and reading past it shows."""
    return F.pad(x, (1, 2, 3, 1), value=torch.nan)[..., 3:-1, 1:-2]


def make_bias(rows: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A random bias for test cases."""
    return torch.randn(rows, generator=generator).to(dtype)


def layer_vmap(
    op: torch._ops.OpOverload,
    info: Any,
    in_dims: tuple[int | None, ...],
    args: tuple[Any, ...],
    *,
    residual: int,
    images: bool,
) -> tuple[Tensor, int]:
    """Batch rule of a layer: one call for all, of more tokens or images, unless the weight is batched.

    residual: the position of that argument. What lies between it and the first is the weight, and what lies
    behind it no tensor.
    """
    x_dim, *weight_dims = in_dims[:residual]
    if x_dim is None or any(dim is not None for dim in weight_dims):
        return loop_vmap(op, info, in_dims, args), 0
    x, added = args[0].movedim(x_dim, 0), args[residual]
    if added is not None:
        whole = added.expand(info.batch_size, *added.shape)
        added = whole if in_dims[residual] is None else added.movedim(in_dims[residual], 0)
    weight, rest = args[1:residual], args[residual + 1 :]
    if not images:
        return op(x, *weight, added, *rest), 0
    added = None if added is None else added.flatten(0, 1)
    return op(x.flatten(0, 1), *weight, added, *rest).unflatten(0, x.shape[:2]), 0


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
