"""SparseGPT: what is left of a weight is changed so that the layer's outputs change least.

The columns of a weight [O, C, *taps] are (tap, c), c fastest, as in ``NM24``: groups of four run along the
input channels of each tap.
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from sparseops.prune.patterns import GROUP, keep_24, keep_unstructured
from sparseops.prune.unstructured import Unstructured


@torch.no_grad()
def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    rule: str | float | None = None,
    *,
    mask: Tensor | None = None,
    damp: float = 0.01,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """A pruned weight whose outputs on the calibration data are near those of the old one, and its mask.

    Frantar and Alistarh 2023, "SparseGPT", algorithm 1: column by column, weights are dropped and the others
    to the right are moved to make up for it, by the inverse of the Hessian of the layer's squared error.
    Which weights go is decided by ``w^2 / U[j, j]^2``, with U the upper Cholesky factor of that inverse: for
    "2:4" when the column reaches a group of four, for a ratio when it reaches a block. The weights of an
    input that is always zero become zero.

    Args:
        weight: [O, C, *taps], C counting the channels of one convolution group.
        hessian: [K, K], or [groups, K, K] for the outputs of each convolution group, with K = taps * C: the
            mean of x x^T over the inputs x (of an output position) that a row of the weight multiplies.
        rule: "2:4", or the share of the weights in each block of columns that is dropped, in [0, 1), rounded
            down to whole weights.
        mask: bool [O, C, *taps], True where a weight is kept, in place of a rule.
        damp: the share of the Hessian's mean diagonal that is added to the diagonal, so that it has an
            inverse.
        block: columns after which the error goes on to all later ones; a multiple of 4.

    Returns:
        The weight in its dtype, exactly zero where the mask is False; computed in float32, of a float64
        weight in float64. The mask, bool [O, C, *taps].

    Raises:
        TypeError: weight or hessian is no floating-point tensor, or mask no bool tensor.
        ValueError: a shape or value is wrong, or the Hessian has no inverse.
    """
    groups = _check(weight, hessian, rule, mask, damp, block)
    pitch = -(-weight.shape[1] // GROUP) * GROUP if rule == "2:4" else weight.shape[1]
    with torch.autocast(weight.device.type, enabled=False):
        # [groups, rows, columns]: the convolution groups are problems of their own, solved side by side.
        w = _columns(weight, pitch).unflatten(0, (groups, -1)).to(_wide(weight))
        kept = None if mask is None else _columns(mask, pitch).view(w.shape)
        hessian = hessian.to(w).reshape(groups, *hessian.shape[-2:])
        factor, is_dead = _factor(_padded(hessian, weight.shape[1], pitch), damp)
        w.masked_fill_(is_dead.unsqueeze(1), 0)
        kept = _solve(w, factor, rule, kept, block)
        w.masked_fill_(~kept, 0)
    shape = weight.shape
    return _logical(w, shape, pitch).to(weight.dtype), _logical(kept, shape, pitch)


def _solve(w: Tensor, factor: Tensor, rule: str | float | None, kept: Tensor | None, block: int) -> Tensor:
    """Prune w [groups, rows, columns] in place but for the zeros themselves; the mask."""
    made = torch.ones_like(w, dtype=torch.bool) if kept is None else kept
    scale = factor.diagonal(dim1=1, dim2=2)
    for start in range(0, w.shape[2], block):
        inside = slice(start, min(start + block, w.shape[2]))
        part, u, d = w[:, :, inside], factor[:, inside, inside], scale[:, inside]
        mask, errors = made[:, :, inside], torch.zeros_like(part)
        if isinstance(rule, Real):
            drop = Unstructured(float(rule))
            scores = (part / d.unsqueeze(1)).square()
            mask.copy_(torch.stack(keep_unstructured(list(scores), drop)))
        for j in range(part.shape[2]):
            if rule == "2:4" and j % GROUP == 0:
                quad = slice(j, j + GROUP)
                scores = (part[:, :, quad] / d[:, None, quad]).square()
                mask[:, :, quad] = keep_24(scores.flatten(0, 1)).view(scores.shape)
            # Masked, since of an infinite weight that is kept no error is to come.
            error = (part[:, :, j] / d[:, None, j]).masked_fill(mask[:, :, j], 0)
            part[:, :, j:] -= error.unsqueeze(2) * u[:, None, j, j:]
            errors[:, :, j] = error
        w[:, :, inside.stop :] -= errors @ factor[:, inside, inside.stop :]
    return made


def _factor(hessian: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor U of the inverse of the damped Hessian, U^T U = H^-1, [groups, K, K]; and
    which inputs were always zero, [groups, K]."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    is_dead = diagonal == 0
    mean = diagonal.sum(1, keepdim=True) / (~is_dead).sum(1, keepdim=True).clamp(min=1)
    damped = hessian + torch.diag_embed((damp * mean).expand_as(diagonal).masked_fill(is_dead, 1.0))
    # With both axes reversed, the lower factor L of H = L L^T is the upper one V of H = V V^T, and U is the
    # inverse of that: a triangular one, where H itself would have to be inverted and factored again.
    lower, failed = torch.linalg.cholesky_ex(damped.flip(1, 2))
    if failed.any():
        raise ValueError(
            f"sparsegpt: hessian must be positive definite with damp {damp} of its mean diagonal added, got "
            "one that is not (raise damp, or calibrate with more data)"
        )
    unit = torch.eye(hessian.shape[1], dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(lower.flip(1, 2), unit.expand_as(lower), upper=True), is_dead


def _columns(weight: Tensor, pitch: int) -> Tensor:
    """A copy of [O, C, *taps] as [O, taps * pitch], c fastest, with zeros behind the channels of each tap."""
    by_tap = weight.flatten(2).transpose(1, 2) if weight.ndim > 2 else weight.unsqueeze(1)
    columns = weight.new_zeros(*by_tap.shape[:2], pitch)
    columns[:, :, : weight.shape[1]] = by_tap
    return columns.flatten(1)


def _logical(columns: Tensor, shape: torch.Size, pitch: int) -> Tensor:
    """The inverse of ``_columns``, of [groups, rows, columns], contiguous."""
    by_tap = columns.reshape(shape[0], math.prod(shape[2:]), pitch)[:, :, : shape[1]]
    return by_tap.transpose(1, 2).reshape(shape).contiguous()


def _padded(hessian: Tensor, channels: int, pitch: int) -> Tensor:
    """[groups, K, K] with inputs that are always zero behind the channels of each tap."""
    if pitch == channels:
        return hessian
    taps = hessian.shape[1] // channels
    blocks = hessian.unflatten(2, (taps, channels)).unflatten(1, (taps, channels))
    padded = blocks.new_zeros(len(blocks), taps, pitch, taps, pitch)
    padded[:, :, :channels, :, :channels] = blocks
    return padded.flatten(3, 4).flatten(1, 2)


def _wide(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _check(
    weight: Tensor,
    hessian: Tensor,
    rule: str | float | None,
    mask: Tensor | None,
    damp: float,
    block: int,
) -> int:
    """The number of groups of the Hessian."""
    for name, tensor in (("weight", weight), ("hessian", hessian)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"sparsegpt: {name} must be a floating-point tensor, got {got}")
    if weight.ndim < 2 or not weight.numel():
        raise ValueError(
            f"sparsegpt: weight must have at least two dimensions and one element, "
            f"got shape {tuple(weight.shape)}"
        )
    columns = math.prod(weight.shape[1:])
    groups = len(hessian) if hessian.ndim == 3 else 1
    if hessian.ndim not in (2, 3) or hessian.shape[-2:] != (columns, columns):
        raise ValueError(
            f"sparsegpt: hessian must have shape {(columns, columns)} or (groups, {columns}, {columns}), "
            f"got {tuple(hessian.shape)}"
        )
    if not groups or weight.shape[0] % groups:
        raise ValueError(
            f"sparsegpt: hessian must have groups that divide the {weight.shape[0]} outputs, got {groups}"
        )
    if not hessian.isfinite().all():
        raise ValueError("sparsegpt: hessian must be finite, got NaN or infinite elements")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"sparsegpt: mask must be a bool tensor, got {got}")
        if mask.shape != weight.shape:
            raise ValueError(
                f"sparsegpt: mask must have the weight's shape {tuple(weight.shape)}, got {tuple(mask.shape)}"
            )
        if rule is not None:
            raise ValueError(f"sparsegpt: rule must be None where a mask is given, got {rule!r}")
    else:
        is_ratio = isinstance(rule, Real) and not isinstance(rule, bool)
        if rule != "2:4" and not (is_ratio and 0 <= rule < 1):  # type: ignore[operator]
            raise ValueError(
                f'sparsegpt: rule must be "2:4", or a ratio in [0, 1), where no mask is given, got {rule!r}'
            )
    if not 0 <= damp < math.inf:
        raise ValueError(f"sparsegpt: damp must be at least 0 and finite, got {damp}")
    if block < GROUP or block % GROUP:
        raise ValueError(f"sparsegpt: block must be a multiple of {GROUP}, got {block}")
    return groups
