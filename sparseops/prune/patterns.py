"""Masks from scores: 2:4, 2:4 both ways, single weights, whole layers.

Scores are those of a weight [O, C, ...], C counting the channels of one convolution group, the larger the
more a weight matters; NaN counts as infinite. A mask is True where the weight is kept, and lies on the device
of the scores. ``level`` in [0, 1] is the share of the pruning that is done: what a level drops, every higher
one drops too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from sparseops.prune.unstructured import Layers, Unstructured

GROUP, KEPT = 4, 2
"""Of so many neighbours so many are kept."""

CHUNK = 1 << 15
"""Blocks that are compared with all patterns at a time; 50 MB of sums."""


def keep_24(scores: Tensor, level: float = 1.0) -> Tensor:
    """The mask [O, C, ...] that keeps the two largest scores of every four neighbouring input channels, for
    each tap; of equal ones the lower channel, as ``NM24`` does. A short last group keeps two as well.

    At a level below 1 that share of the groups is pruned, those that lose the least score; the others keep
    all.

    Raises:
        ValueError: scores have less than two dimensions, or level is not in [0, 1].
    """
    _check("keep_24", scores, level)
    scores = _ordered(scores)
    quads = _padded(_taps_last(scores), 1, -math.inf).unflatten(1, (-1, GROUP)).unbind(2)
    losses = [torch.zeros_like(quads[0], dtype=torch.uint8) for _ in range(GROUP)]
    for low, high in itertools.combinations(range(GROUP), 2):
        low_loses = quads[high] > quads[low]
        losses[low] += low_loses
        losses[high] += ~low_loses
    kept = torch.stack([lost < KEPT for lost in losses], dim=2).flatten(1, 2)
    return _spare(scores, kept[:, : scores.shape[1]].reshape(scores.shape), level, height=1)


def keep_24_transposable(scores: Tensor, level: float = 1.0) -> Tensor:
    """The mask [O, C, ...] that is 2:4 along the input channels and along the output channels, so that the
    product of the backward pass is sparse too: at most two are kept in each row and column of every 4x4 block
    of a tap (a short last block is narrower).

    It is the best there is: of all patterns of a block to which nothing can be added, the one that keeps the
    most score, which the search by flows of Hubara et al. 2021, "Accelerated sparse neural training" (section
    4), finds too. 90 of them have two in each row and column; in the other 96 one cell stands in a row and
    column of its own, and the rest is a cycle of six. Of equal ones the first counts, in the order of the
    cells.

    At a level below 1 that share of the blocks is pruned, those that lose the least score; the others keep
    all.

    Raises:
        ValueError: scores have less than two dimensions, or level is not in [0, 1].
    """
    _check("keep_24_transposable", scores, level)
    scores = _ordered(scores)
    by_tap = _exact(_taps_last(scores))
    kept = torch.ones_like(by_tap, dtype=torch.bool)
    for rows, columns in itertools.product(
        _whole_and_rest(scores.shape[0]), _whole_and_rest(scores.shape[1])
    ):
        kept[rows, columns] = _best_patterns(by_tap[rows, columns])
    return _spare(scores, kept.view(scores.shape), level, height=GROUP)


def keep_unstructured(scores: Sequence[Tensor], rule: Unstructured, level: float = 1.0) -> list[Tensor]:
    """The masks of weights by the ratio or the threshold of ``rule``: of each tensor, of each of its outputs,
    or of all tensors together, by the rule's scope. Of equal scores the first is kept.

    Raises:
        ValueError: level is not in [0, 1].
    """
    _check_level("keep_unstructured", level)
    tables = [_ordered(its.flatten(1) if rule.scope == "row" else its.reshape(1, -1)) for its in scores]
    least = [_round_up(rule.min_kept * table.shape[1]) for table in tables]
    if rule.threshold is not None:
        masks = [
            _above(table, rule.threshold, level) | _largest(table, few)
            for table, few in zip(tables, least, strict=True)
        ]
    elif rule.scope == "global":
        masks = _keep_global(tables, least, rule.ratio * level)
    else:
        masks = [
            _largest(table, max(few, table.shape[1] - _round_down(rule.ratio * level * table.shape[1])))
            for table, few in zip(tables, least, strict=True)
        ]
    return [mask.view(its.shape) for mask, its in zip(masks, scores, strict=True)]


def keep_layers(scores: Sequence[Tensor], rule: Layers, level: float = 1.0) -> list[bool]:
    """Which layers are kept, by the mean of their scores; of equal ones the first.

    Raises:
        ValueError: level is not in [0, 1].
    """
    _check_level("keep_layers", level)
    if not scores:
        return []
    means = torch.stack([_ordered(its).mean(dtype=torch.float64).cpu() for its in scores]).view(1, -1)
    means = _ordered(means)
    if rule.threshold is not None:
        mask = _above(means, rule.threshold, level) | _largest(means, min(rule.min_kept, len(scores)))
    else:
        kept = len(scores) - _round_down(rule.ratio * level * len(scores))
        mask = _largest(means, min(max(kept, rule.min_kept), len(scores)))
    return mask.flatten().tolist()


def is_24_transposable(weight: Tensor) -> bool:
    """Whether a weight [O, C, ...] has at most two non-zeros in every four neighbouring input channels and in
    every four neighbouring output channels, for each tap."""
    used = _taps_last(weight) != 0
    crowded = (
        _padded(used.movedim(dim, 1), 1, False).unflatten(1, (-1, GROUP)).sum(2).gt(KEPT).any()
        for dim in (0, 1)
    )
    return not any(crowded)


def _check(name: str, scores: Tensor, level: float) -> None:
    if scores.ndim < 2:
        raise ValueError(f"{name}: scores must have at least two dimensions, got shape {tuple(scores.shape)}")
    _check_level(name, level)


def _check_level(name: str, level: float) -> None:
    if not 0 <= level <= 1:
        raise ValueError(f"{name}: level must be in [0, 1], got {level}")


def _ordered(scores: Tensor) -> Tensor:
    """Scores that can be compared: NaN counts as infinite."""
    return scores.detach().nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)


def _taps_last(scores: Tensor) -> Tensor:
    """[O, C, ...] as [O, C, taps]."""
    return scores.reshape(*scores.shape[:2], math.prod(scores.shape[2:]))


def _padded(tensor: Tensor, dim: int, value: float | bool) -> Tensor:
    """``tensor`` with ``value`` behind it along ``dim``, up to whole groups."""
    missing = -tensor.shape[dim] % GROUP
    shape = [*tensor.shape[:dim], missing, *tensor.shape[dim + 1 :]]
    return torch.cat([tensor, tensor.new_full(shape, value)], dim) if missing else tensor


def _round_down(count: float) -> int:
    # Without the rounding 0.29 of 100 would be 28.
    return math.floor(round(count, 6))


def _round_up(count: float) -> int:
    return math.ceil(round(count, 6))


def _largest(scores: Tensor, count: int) -> Tensor:
    """Where the ``count`` largest of each row of scores [rows, n] are; of equal ones the first."""
    others = scores.shape[1] - count
    if not others:
        return torch.ones_like(scores, dtype=torch.bool)
    if not count or not scores.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    # The best that goes. A GPU refuses kthvalue where torch is to be deterministic; it sorts fast.
    if scores.is_cpu:
        edge = scores.kthvalue(others, dim=1, keepdim=True).values
    else:
        edge = scores.sort(dim=1).values[:, others - 1 : others]
    above, equal = scores > edge, scores == edge
    # What is as good stays as long as there is room.
    room = count - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1) <= room))


def _above(scores: Tensor, threshold: float, level: float) -> Tensor:
    """Where scores are over the share ``level`` of a threshold, everywhere at level 0."""
    return scores > threshold * level if level else torch.ones_like(scores, dtype=torch.bool)


def _keep_global(tables: list[Tensor], least: list[int], ratio: float) -> list[Tensor]:
    """The masks of tables [1, n] whose weights compete; each keeps its ``least`` largest."""
    if not tables:
        return []
    safe = [_largest(table, few) for table, few in zip(tables, least, strict=True)]
    device = tables[0].device
    pool = torch.cat([table[~its].to(device) for table, its in zip(tables, safe, strict=True)]).view(1, -1)
    dropped = _round_down(ratio * sum(table.numel() for table in tables))
    kept = _largest(pool, max(0, pool.shape[1] - dropped)).flatten()
    sizes = [table.numel() - few for table, few in zip(tables, least, strict=True)]
    return [
        its.masked_scatter(~its, part.to(its.device))
        for its, part in zip(safe, kept.split(sizes), strict=True)
    ]


def _spare(scores: Tensor, kept: Tensor, level: float, height: int) -> Tensor:
    """``kept``, and all of the blocks, [height, 4] of each tap, that are not pruned yet at this level: of
    those that lose something the ones that lose the most."""
    if level == 1:
        return kept
    lost, whole = _taps_last(scores.masked_fill(kept, 0)), _taps_last(kept)
    for dim in (0, 1) if height > 1 else (1,):
        lost, whole = _padded(lost, dim, 0), _padded(whole, dim, True)
    lost, whole = (its.unflatten(1, (-1, GROUP)).unflatten(0, (-1, height)) for its in (lost, whole))
    is_pruned = ~whole.all(3, keepdim=True).all(1, keepdim=True)
    losses = _ordered(lost.sum((1, 3), keepdim=True)[is_pruned]).view(1, -1)
    spared = _largest(losses, losses.shape[1] - _round_down(level * losses.shape[1]))
    by_block = torch.zeros_like(is_pruned).masked_scatter(is_pruned, spared)
    whole = (whole | by_block).flatten(0, 1).flatten(1, 2)
    return whole[: scores.shape[0], : scores.shape[1]].reshape(scores.shape)


# 2:4 both ways


@lru_cache
def _patterns(rows: int, columns: int) -> Tensor:
    """All masks [patterns, rows * columns] of a block with at most two in each row and column, to which
    nothing can be added; those that keep the first cells come first."""
    lines = [line for line in itertools.product((1, 0), repeat=columns) if sum(line) <= KEPT]
    masks = torch.tensor(list(itertools.product(lines, repeat=rows)), device="cpu")
    masks = masks[(masks.sum(1) <= KEPT).all(1)]
    has_room = (masks.sum(2, keepdim=True) < KEPT) & (masks.sum(1, keepdim=True) < KEPT) & (masks == 0)
    masks = masks[~has_room.flatten(1).any(1)].flatten(1)
    return masks.bool()


def _best_patterns(scores: Tensor) -> Tensor:
    """The mask of scores [O, C, taps], finite ones in float64; O and C are multiples of four, or less than
    four."""
    shape = scores.shape
    rows, columns = min(GROUP, shape[0]), min(GROUP, shape[1])
    blocks = scores.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).permute(0, 2, 4, 1, 3)
    patterns = _patterns(rows, columns).to(scores.device)
    sums = patterns.to(scores.dtype).t()
    best = [(chunk @ sums).argmax(1) for chunk in blocks.reshape(-1, rows * columns).split(CHUNK)]
    return patterns[torch.cat(best)].view(blocks.shape).permute(0, 3, 1, 4, 2).reshape(shape)


def _exact(scores: Tensor) -> Tensor:
    """Scores as float64, finite, and so that equal sums over a block stay equal: scaled by a power of two to
    [-1, 1], with infinite ones that outweigh a block of these."""
    infinite = scores.isinf()
    finite = scores.double().masked_fill(infinite, 0)
    top = float(finite.abs().amax()) if finite.numel() else 0.0
    scaled = finite * 2.0 ** min(1000, -math.frexp(top)[1])
    return torch.where(infinite, 4.0 * GROUP * GROUP * scores.sign(), scaled)


def _whole_and_rest(size: int) -> list[slice]:
    """The whole blocks along a dimension, and the short one behind them."""
    whole = size - size % GROUP
    return [its for its in (slice(0, whole), slice(whole, size)) if its.start < its.stop]
