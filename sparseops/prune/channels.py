"""``Channels``: how the channels of layers are chosen, and the choice itself.

Channels go in *blocks* of neighbours that begin at a multiple of the block's width, within each convolution
group; where that does not divide the group's width, the last block is short. Each group drops as many blocks
as the others, and as many channels: a short last block goes in all groups or in none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sparseops.prune.criteria import CRITERIA, Criterion, score, score_blocks

SCOPES = ("local", "global")
SIDES = ("outputs", "inputs", "both")

INPUTS_24 = 32
"""Kept inputs come in multiples of this where the compact weight becomes 2:4, whose rows are padded to it."""


@dataclass(frozen=True, repr=False)
class Channels:
    """Channel pruning: whole output channels (filters) or input channels of a layer become zero.

    Attributes:
        ratio: share of a layer's blocks that is dropped, in [0, 1), rounded down to whole blocks; with scope
            "global" the share of the channels of all layers together. A layer always keeps one block.
        criterion: how much a channel matters: "l1" (sum of magnitudes), "l2" (root of the sum of squares), or
            a function (weight [O, C, ...], dim) -> scores [weight.shape[dim]]. NaN and infinite scores count
            as the largest; of equal ones the lower channel is kept.
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

    Raises:
        TypeError: a field is of the wrong type.
        ValueError: a field has a value that it must not have.
    """

    ratio: float = 0.5
    criterion: str | Criterion = "l2"
    round_to: int = 8
    scope: str = "local"
    block: int | None = None
    side: str = "outputs"
    then: str | None = None
    keep_last: bool = True
    together: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, (int, float)):
            raise TypeError(f"Channels: ratio must be a number, got {self.ratio!r}")
        if not 0 <= self.ratio < 1:
            raise ValueError(f"Channels: ratio must be in [0, 1), got {self.ratio}")
        if not callable(self.criterion) and self.criterion not in CRITERIA:
            raise ValueError(
                f"Channels: criterion must be one of {', '.join(CRITERIA)} or a function "
                f"(weight, dim) -> scores, got {self.criterion!r}"
            )
        for name in ("round_to", "block"):
            value = getattr(self, name)
            if value is None and name == "block":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Channels: {name} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"Channels: {name} must be at least 1, got {value}")
        if self.round_to % self.width and self.width % self.round_to:
            raise ValueError(
                f"Channels: block must be a divisor or a multiple of round_to ({self.round_to}), "
                f"got {self.block}"
            )
        for name, allowed in (("scope", SCOPES), ("side", SIDES), ("then", (None, "2:4"))):
            value = getattr(self, name)
            if value not in allowed:
                words = ", ".join("None" if word is None else f'"{word}"' for word in allowed)
                raise ValueError(f"Channels: {name} must be one of {words}, got {value!r}")
        for name in ("keep_last", "together"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Channels: {name} must be True or False, got {getattr(self, name)!r}")

    def __repr__(self) -> str:
        """The ratio, and what differs from the defaults."""
        words = [f"ratio={self.ratio:g}"]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default:
                words.append(f"{field.name}={self.criterion_name if callable(value) else repr(value)}")
        return f"Channels({', '.join(words)})"

    @property
    def criterion_name(self) -> str:
        """The criterion's name, or that of the function."""
        if isinstance(self.criterion, str):
            return self.criterion
        return getattr(self.criterion, "__name__", type(self.criterion).__name__)

    @property
    def width(self) -> int:
        """Channels of a block."""
        return self.round_to if self.block is None else self.block


@dataclass(frozen=True, eq=False)
class ChannelSet:
    """Channels of which some can be dropped: those of one side of a layer.

    weight: [O, C, ...], C counting the channels of one group. dim: where the channels lie, 0 for outputs and
    1 for inputs. groups: of the convolution. others: sets of the same size that lose the same channels.
    """

    weight: Tensor
    dim: int = 0
    groups: int = 1
    others: tuple[ChannelSet, ...] = ()

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
        scores = score_blocks(self.scores(rule.criterion), rule.width, rule.criterion)
        finite = scores[scores.isfinite()].abs()
        mean = float(finite.mean()) if finite.numel() else 0.0
        return sum((other.losses(rule) for other in self.others), scores / (mean or 1.0))

    def scores(self, criterion: str | Criterion) -> Tensor:
        """[groups, channels of a group] by ``criteria.score``."""
        if self.dim == 0:
            return score(self.weight, 0, criterion).view(self.groups, self.per_group)
        # Of a group's inputs nothing but the group's own filters is a reader.
        return torch.stack([score(part, 1, criterion) for part in self.weight.chunk(self.groups)])


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
    if rule.scope == "local":
        return [_select_local(rule, ladder) for ladder in ladders]
    return _select_global(rule, ladders)


@dataclass(frozen=True, eq=False)
class _Ladder:
    """The blocks of a set in the order in which they go.

    unit: the kept blocks are a multiple of it. order: block numbers [groups, blocks]. losses: the scores of
    the blocks in that order, over the mean score, [groups, blocks].
    """

    channels: ChannelSet
    width: int
    unit: int
    order: Tensor
    losses: Tensor

    @classmethod
    def of(cls, rule: Channels, channels: ChannelSet) -> _Ladder:
        unit = max(rule.width, rule.round_to)
        if rule.then is not None and channels.dim == 1:
            unit = math.lcm(unit, INPUTS_24)
        losses = channels.losses(rule)
        # Sorted from the back, so that of equal blocks the higher one goes first.
        order = losses.shape[1] - 1 - losses.flip(1).sort(dim=1, stable=True).indices
        if channels.groups > 1 and channels.per_group % rule.width:
            order = _last_in_step(order)
        losses = losses.gather(1, order) / channels.layers
        return cls(channels, rule.width, unit // rule.width, order, losses)

    @property
    def blocks(self) -> int:
        """Blocks of a group."""
        return self.order.shape[1]

    @property
    def steps(self) -> list[int]:
        """Numbers of blocks that a group can lose, ascending; with the last one none would be left."""
        return [self.blocks - kept for kept in range(0, self.blocks, self.unit)][::-1]

    @property
    def words(self) -> str:
        return f"block{'s' if self.unit > 1 else ''} of {self.width}"

    def dropped(self, blocks: int) -> int:
        """Channels of all groups and layers that go with the first ``blocks`` blocks."""
        starts = self.order[0, :blocks] * self.width
        channels = int((self.channels.per_group - starts).clamp(max=self.width).sum())
        return channels * self.channels.groups * self.channels.layers

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
        if not rule.ratio:
            return self.selection(0, "ratio is 0")
        if self.blocks <= self.unit:
            few = f"{self.channels.per_group} channels"
            few += " per group" if self.channels.groups > 1 else ""
            return self.selection(0, f"{few} are no more than one block of {self.unit * self.width}")
        return None

    def last(self, rule: Channels) -> str:
        """The note of a layer that keeps only what no layer may lose."""
        return f"one block of {self.unit * self.width} is kept, more than ratio {rule.ratio:g} would leave"


def _select_local(rule: Channels, ladder: _Ladder) -> Selection:
    if (whole := ladder.whole(rule)) is not None:
        return whole
    # Without the margin 0.9 of ten blocks would be nine less a rounding error.
    goal = rule.ratio * ladder.blocks + 1e-9
    fitting = [blocks for blocks in ladder.steps[:-1] if blocks <= goal]
    if not fitting:
        return ladder.selection(
            0, f"ratio {rule.ratio:g} of {ladder.blocks} blocks of {ladder.width} is none that can go"
        )
    is_least = fitting[-1] == ladder.blocks - ladder.unit and goal > fitting[-1] + 1e-6
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
        size = ladder.dropped(blocks) - ladder.dropped(taken[number])
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
