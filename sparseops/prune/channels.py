"""``Channels``: how the channels of layers are chosen, and the choice itself.

Channels go in *blocks* of neighbours that begin at a multiple of the block's width, within each convolution
group; where that does not divide the group's width, the last block is short. Each group drops as many blocks
as the others, and as many channels: a short last block goes in all groups or in none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sparseops.prune.criteria import Criterion, check_criterion, score, score_blocks
from sparseops.prune.fields import check_amount, check_integer, check_word, say_criterion, say_rule

SCOPES = ("local", "global")
SIDES = {"outputs": (0,), "inputs": (1,), "both": (0, 1)}
"""Sides of a layer, with the dimensions of its weight that the channels of these lie along."""

CRITERION = "l2"
"""What channels are judged by where no criterion was given."""

INPUTS_24 = 32
"""Kept inputs come in multiples of this where the compact weight becomes 2:4, whose rows are padded to it."""


@dataclass(frozen=True, repr=False)
class Channels:
    """Channel pruning: whole output channels (filters) or input channels of a layer become zero.

    Attributes:
        ratio: share of a layer's blocks that is dropped, in [0, 1), rounded down to whole blocks; with scope
            "global" the share of the channels of all layers together. A layer always keeps one block.
        criterion: how much a channel matters: a name of ``CRITERIA``, as "l1" (sum of magnitudes) and "l2"
            (root of the sum of squares), or a function (weight [O, C, ...], dim) -> scores
            [weight.shape[dim]]. NaN and infinite scores count as the largest; of equal ones the lower channel
            is kept. None for the pruner's, and for "l2" in ``convert``.
        round_to: the kept count is a multiple of this, but for a short last block and where all are kept.
            Kernels run in steps of 8 channels, so that other counts win nothing.
        scope: "local" drops the same share of each layer; "global" lets the blocks of all layers compete,
            each by its score over the mean score of its layer's blocks.
        block: width of the blocks that are kept or dropped as one, a divisor or a multiple of round_to; None
            for round_to. With 1 single channels are chosen, which kernels gather slowly.
        side: "outputs", "inputs", or "both", where ratio applies to each: 0.5 leaves 25 % of the products.
        then: "2:4" prunes the compact weight to 2:4 by magnitude, with kept inputs in multiples of 32.
        keep_last: the outputs of the model's last layer are the model's own, and are all kept.
        together: layers whose outputs meet in additions, as those of residual blocks do, drop the same ones,
            by the sum of their scores, each over the mean of its layer. What each loses alone is little less,
            and ``compact`` can then leave those channels out everywhere. Takes ``example_inputs`` to see
            which layers meet.
        threshold: blocks that score at most this go, and ratio and scope are not used; a block's score is the
            mean of its channels', for "l2" the root of the mean square. Of a grouped convolution each group
            loses as many as the one that has the fewest of them. None for ratio; not with ``together``.
        min_kept: a layer keeps at least so many channels, and at least one block.

    Raises:
        TypeError: a field is of the wrong type.
        ValueError: a field has a value that it must not have.
    """

    ratio: float = 0.5
    criterion: str | Criterion | None = None
    round_to: int = 8
    scope: str = "local"
    block: int | None = None
    side: str = "outputs"
    then: str | None = None
    keep_last: bool = True
    together: bool = False
    threshold: float | None = None
    min_kept: int = 1

    def __post_init__(self) -> None:
        check_amount(self)
        for name in ("round_to", "block", "min_kept"):
            if name != "block" or self.block is not None:
                check_integer(self, name)
        if self.round_to % self.width and self.width % self.round_to:
            raise ValueError(
                f"Channels: block must be a divisor or a multiple of round_to ({self.round_to}), "
                f"got {self.block}"
            )
        for name, allowed in (("scope", SCOPES), ("side", tuple(SIDES)), ("then", (None, "2:4"))):
            check_word(self, name, allowed)
        for name in ("keep_last", "together"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Channels: {name} must be True or False, got {getattr(self, name)!r}")
        if self.threshold is not None and self.together:
            raise ValueError(f"Channels: threshold must be None with together=True, got {self.threshold}")
        if self.criterion is not None:
            check_criterion(self.criterion, "Channels", SIDES[self.side])

    def __repr__(self) -> str:
        """The ratio or the threshold, and what differs from the defaults."""
        return say_rule(self)

    @property
    def judge(self) -> str | Criterion:
        """The criterion that counts."""
        return CRITERION if self.criterion is None else self.criterion

    @property
    def criterion_name(self) -> str:
        """The name of the criterion that counts, or that of the function."""
        return say_criterion(self.judge)

    @property
    def width(self) -> int:
        """Channels of a block."""
        return self.round_to if self.block is None else self.block


@dataclass(frozen=True, eq=False)
class ChannelSet:
    """Channels of which some can be dropped: those of one side of a layer.

    weight: [O, C, ...], C counting the channels of one group. dim: where the channels lie, 0 for outputs and
    1 for inputs. groups: of the convolution. others: sets of the same size that lose the same channels.
    evidence: what criteria ask for beside the weight: tensors of its shape, and settings.
    """

    weight: Tensor
    dim: int = 0
    groups: int = 1
    others: tuple[ChannelSet, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def per_group(self) -> int:
        """Channels of a group."""
        return self.weight.shape[1] if self.dim == 1 else self.weight.shape[0] // self.groups

    @property
    def total(self) -> int:
        """Channels of all groups."""
        return self.per_group * self.groups

    @property
    def layers(self) -> int:
        """How many sets lose what is chosen."""
        return 1 + len(self.others)

    def losses(self, rule: Channels) -> Tensor:
        """[groups, blocks of a group]: the scores of blocks over their mean, of all sets together."""
        scores = self.block_scores(rule)
        finite = scores[scores.isfinite()].abs()
        mean = float(finite.mean()) if finite.numel() else 0.0
        return sum((other.losses(rule) for other in self.others), scores / (mean or 1.0))

    def block_scores(self, rule: Channels) -> Tensor:
        """[groups, blocks of a group]: the scores of blocks by the rule's criterion."""
        return score_blocks(self.scores(rule.judge), rule.width, rule.judge)

    def scores(self, criterion: str | Criterion) -> Tensor:
        """[groups, channels of a group] by ``criteria.score``."""
        if self.dim == 0:
            return score(self.weight, 0, criterion, self.evidence).view(self.groups, self.per_group)
        # Of a group's inputs nothing but the group's own filters is a reader.
        parts = zip(self.weight.chunk(self.groups), self._evidence_by_group(), strict=True)
        return torch.stack([score(part, 1, criterion, known) for part, known in parts])

    def _evidence_by_group(self) -> list[dict[str, Any]]:
        parts = {
            name: its.chunk(self.groups) if isinstance(its, Tensor) else [its] * self.groups
            for name, its in self.evidence.items()
        }
        return [{name: its[group] for name, its in parts.items()} for group in range(self.groups)]


@dataclass(frozen=True, eq=False)
class Selection:
    """kept: channels counted through all groups, ascending, int64 on the CPU; None for all ``total``. note:
    why that is all of them, or so few; "" where there is nothing to say."""

    kept: Tensor | None
    total: int
    note: str = ""

    @property
    def count(self) -> int:
        """How many are kept."""
        return self.total if self.kept is None else len(self.kept)


def select(rule: Channels, sets: Sequence[ChannelSet]) -> list[Selection]:
    """Which channels of each set are kept; with scope "global" the sets compete.

    Raises:
        ValueError: the criterion does not give one number per channel.
    """
    ladders = [_Ladder.of(rule, channels) for channels in sets]
    if rule.scope == "local" or rule.threshold is not None:
        return [_select_local(rule, ladder) for ladder in ladders]
    return _select_global(rule, ladders)


@dataclass(frozen=True, eq=False)
class _Ladder:
    """The blocks of a set in the order in which they go.

    unit: the kept blocks are a multiple of it. order: block numbers [groups, blocks]. losses: the scores of
    the blocks in that order, [groups, blocks]; over the mean score, but where a threshold judges them. least:
    channels that are kept.
    """

    channels: ChannelSet
    width: int
    unit: int
    order: Tensor
    losses: Tensor
    least: int

    @classmethod
    def of(cls, rule: Channels, channels: ChannelSet) -> _Ladder:
        unit = max(rule.width, rule.round_to)
        if rule.then is not None and channels.dim == 1:
            unit = math.lcm(unit, INPUTS_24)
        losses = channels.losses(rule) if rule.threshold is None else channels.block_scores(rule)
        # Sorted from the back, so that of equal blocks the higher one goes first.
        order = losses.shape[1] - 1 - losses.flip(1).sort(dim=1, stable=True).indices
        if channels.groups > 1 and channels.per_group % rule.width:
            order = _last_in_step(order)
        losses = losses.gather(1, order) / channels.layers
        return cls(channels, rule.width, unit // rule.width, order, losses, rule.min_kept)

    @property
    def blocks(self) -> int:
        """Blocks of a group."""
        return self.order.shape[1]

    @cached_property
    def steps(self) -> list[int]:
        """Numbers of blocks that a group can lose, ascending; with the last one too few would be left."""
        steps = [self.blocks - kept for kept in range(0, self.blocks, self.unit)][::-1]
        left = [self.channels.total - self.dropped[blocks] // self.channels.layers for blocks in steps]
        return steps[: 1 + sum(count >= self.least for count in left)]

    @cached_property
    def dropped(self) -> list[int]:
        """Channels of all groups and layers that go with the first blocks, by how many these are."""
        sizes = (self.channels.per_group - self.order[0] * self.width).clamp(max=self.width)
        return [0, *(sizes.cumsum(0) * self.channels.groups * self.channels.layers).tolist()]

    def selection(self, blocks: int, note: str = "") -> Selection:
        """What is left without the first ``blocks`` blocks."""
        total = self.channels.total
        if not blocks:
            return Selection(None, total, note)
        kept = torch.ones(self.channels.groups, self.blocks, dtype=torch.bool, device="cpu")
        kept.scatter_(1, self.order[:, :blocks], False)
        by_channel = kept.repeat_interleave(self.width, 1)[:, : self.channels.per_group]
        return Selection(by_channel.flatten().nonzero().flatten(), total, note)

    def whole(self, rule: Channels) -> Selection | None:
        """All channels, where none can go; else None."""
        if not rule.ratio and rule.threshold is None:
            return self.selection(0, "ratio is 0")
        if self.blocks <= self.unit:
            few = f"{self.channels.per_group} channels"
            few += " per group" if self.channels.groups > 1 else ""
            return self.selection(0, f"{few} are no more than one block of {self.unit * self.width}")
        if len(self.steps) == 1:
            all_kept = f"min_kept {self.least} of {self.channels.total} leaves none that can go"
            return self.selection(0, all_kept)
        return None

    def goal(self, rule: Channels) -> float:
        """Blocks of a group that the rule drops, if nothing stands against it."""
        if rule.threshold is not None:
            return int((self.losses <= rule.threshold).long().cumprod(1).sum(1).min())
        # Without the margin 0.9 of ten blocks would be nine less a rounding error.
        return rule.ratio * self.blocks + 1e-9

    def last(self, rule: Channels) -> str:
        """The note of a layer that keeps only what no layer may lose."""
        what = f"one block of {self.unit * self.width} is"
        if self.steps[-1] < self.blocks:
            what = f"min_kept {self.least} channels are"
        return f"{what} kept, more than {_say_amount(rule)} would leave"


def _say_amount(rule: Channels) -> str:
    return f"ratio {rule.ratio:g}" if rule.threshold is None else f"threshold {rule.threshold:g}"


def _select_local(rule: Channels, ladder: _Ladder) -> Selection:
    if (whole := ladder.whole(rule)) is not None:
        return whole
    goal = ladder.goal(rule)
    fitting = [blocks for blocks in ladder.steps[:-1] if blocks <= goal]
    if not fitting:
        words = f"of {ladder.blocks} blocks of {ladder.width} is none that can go"
        return ladder.selection(0, f"{_say_amount(rule)} {words}")
    is_least = fitting[-1] == ladder.steps[-2] and goal > fitting[-1] + 1e-6
    return ladder.selection(fitting[-1], ladder.last(rule) if is_least else "")


def _select_global(rule: Channels, ladders: Sequence[_Ladder]) -> list[Selection]:
    """Steps of all sets in the order of their losses, as long as the channels of all fit into the ratio."""
    budget = rule.ratio * sum(ladder.channels.total * ladder.channels.layers for ladder in ladders) + 1e-9
    steps = []
    for number, ladder in enumerate(ladders):
        if ladder.whole(rule) is not None:
            continue
        before, loss = 0, -math.inf
        for place, blocks in enumerate(ladder.steps):
            # A step never comes before an earlier one of its set, whatever a short last block scores.
            loss = max(loss, float(ladder.losses[:, before:blocks].mean()))
            steps.append((loss, -number, place, blocks))
            before = blocks
    taken, done, notes = [0] * len(ladders), 0, [""] * len(ladders)
    for _, negative, place, blocks in sorted(steps):
        number = -negative
        ladder = ladders[number]
        size = ladder.dropped[blocks] - ladder.dropped[taken[number]]
        # What one step passes over counts in the next of its set, which then does not fit either.
        if done + size > budget:
            continue
        if place == len(ladder.steps) - 1:
            notes[number] = ladder.last(rule)
        else:
            taken[number] = blocks
            done += size
    return [
        ladder.whole(rule)
        or ladder.selection(blocks, note or ("" if blocks else "blocks of other layers matter less"))
        for ladder, blocks, note in zip(ladders, taken, notes, strict=True)
    ]


def _last_in_step(order: Tensor) -> Tensor:
    """``order`` [groups, blocks] with the last block, which is short, at the same place in each group: the
    median of its places."""
    last = order.shape[1] - 1
    place = int((order == last).int().argmax(1).median())
    others = order[order != last].view(len(order), last)
    tail = order.new_full((len(order), 1), last)
    return torch.cat([others[:, :place], tail, others[:, place:]], dim=1)
