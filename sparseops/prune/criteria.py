"""How much a channel matters: one score for each, the larger the more.

A criterion is a function of a weight [O, C, ...] and of the dimension that the channels lie along. A new one
is a function here and a line in ``CRITERIA``, or is handed to ``Channels`` as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Criterion: TypeAlias = Callable[[Tensor, int], Tensor]
"""(weight [O, C, ...], dim) -> scores [weight.shape[dim]]"""


def l1(weight: Tensor, dim: int) -> Tensor:
    """Sum of the magnitudes of each channel, ``s[c] = sum |w[c]|``, in float64; Li et al. 2017, "Pruning
    filters for efficient ConvNets"."""
    return _norm(weight, dim, 1)


def l2(weight: Tensor, dim: int) -> Tensor:
    """Euclidean length of each channel, ``s[c] = sqrt(sum w[c]^2)``, in float64: of all choices of as many
    channels, those with the largest scores keep most of the squared weight."""
    return _norm(weight, dim, 2)


CRITERIA: dict[str, Criterion] = {"l1": l1, "l2": l2}
"""The criteria that have a name."""

ORDERS = {"l2": 2}
"""The order p of the mean over the channels of a block, where it is not 1."""


def score(weight: Tensor, dim: int, criterion: str | Criterion) -> Tensor:
    """Scores [weight.shape[dim]] by a criterion or its name, float64 on the CPU; NaN counts as infinite.

    Raises:
        ValueError: the criterion does not give one number per channel.
    """
    by = CRITERIA[criterion] if isinstance(criterion, str) else criterion
    scores = by(weight.detach(), dim)
    expected = (weight.shape[dim],)
    shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    if shape != expected:
        raise ValueError(f"Channels: criterion must give scores of shape {expected}, got {shape}")
    return scores.detach().to("cpu", torch.float64).nan_to_num(nan=torch.inf, posinf=torch.inf)


def score_blocks(scores: Tensor, block: int, criterion: str | Criterion) -> Tensor:
    """Scores of blocks of neighbouring channels: [groups, channels] gives [groups, blocks].

    A block's score is the mean of its channels', for "l2" the root of the mean square. With whole blocks that
    is the order of the l1 or l2 norms of the blocks; a short last block is judged by its mean too, and so
    neither kept nor dropped for being short.
    """
    order = ORDERS.get(criterion, 1) if isinstance(criterion, str) else 1
    means = [part.pow(order).mean(1).pow(1 / order) for part in scores.split(block, dim=1)]
    return torch.stack(means, dim=1)


def _norm(weight: Tensor, dim: int, order: int) -> Tensor:
    others = [other for other in range(weight.ndim) if other != dim]
    return torch.linalg.vector_norm(weight, order, dim=others, dtype=torch.float64)
