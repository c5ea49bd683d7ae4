"""Which option each layer gets: the multiple-choice knapsack, and the search for what its answer can bear."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

STEPS = 10_000
"""The grid of costs: so many steps are one budget."""

REACH = 4
"""How many budgets the predicted drops may add up to, since they can be too high as well as too low."""


@dataclass(frozen=True)
class Item:
    """One option of a layer. cost: steps of the budget, at least 0. time: milliseconds."""

    cost: int
    time: float


@dataclass(frozen=True)
class Combination:
    """One option for each layer, by its number. cost, time: sums over the layers."""

    cost: int
    time: float
    picks: tuple[int, ...]


def cost_of(drop: Mapping[str, float], budget: Mapping[str, float]) -> int | None:
    """The cost of an option that lets the metrics of tasks fall by ``drop`` where each may fall by
    ``budget``: the largest of the shares drop over budget, rounded up to steps; None where it alone is more
    than what ``REACH`` allows.

    The sum of the largest shares is no less than the largest of the sums, so that what fits by this cost
    fits each task by the sum of its drops. An option that costs nothing by its drop costs one step: of
    options that are free, those that save most time come first.
    """
    share = 0.0
    for task, fall in drop.items():
        if fall > 0:
            share = max(share, fall / budget[task] if budget[task] else math.inf)
    # Without the margin a tenth of the budget would be 1001 steps by rounding alone.
    return None if share > REACH else max(1, math.ceil(share * STEPS - 1e-6))


def frontier(layers: Sequence[Sequence[Item]], limit: int) -> list[Combination]:
    """For each cost up to ``limit`` the fastest combination of one item of each layer, where it is faster
    than that of a smaller cost: ascending in cost, descending in time.

    The multiple-choice knapsack (Kellerer, Pferschy and Pisinger 2004, "Knapsack problems", chapter 11) by
    dynamic programming over the cost: exact, in time and memory proportional to the limit times the number of
    items. Of equally fast combinations of one cost, it is that of the items that come first.

    Raises:
        ValueError: no combination is within the limit.
    """
    # fastest[c]: the least time at a cost of at most c of the layers so far.
    fastest = torch.zeros(limit + 1, dtype=torch.float64, device="cpu")
    taken = []
    for items in layers:
        best = torch.full_like(fastest, math.inf)
        picks = torch.zeros(limit + 1, dtype=torch.int32, device="cpu")
        for number, item in enumerate(items):
            if item.cost > limit:
                continue
            times = fastest[: limit + 1 - item.cost] + item.time
            is_better = times < best[item.cost :]
            best[item.cost :] = torch.where(is_better, times, best[item.cost :])
            picks[item.cost :][is_better] = number
        fastest = best
        taken.append(picks)
    least = fastest.tolist()
    costs = [c for c, time in enumerate(least) if time < (least[c - 1] if c else math.inf)]
    if not costs:
        raise ValueError(f"frontier: limit must allow one item for each layer, got {limit}")
    return [_combination(layers, taken, cost) for cost in costs]


def _combination(layers: Sequence[Sequence[Item]], taken: Sequence[torch.Tensor], cost: int) -> Combination:
    """The combination that ends at a cost, from its last layer back to the first."""
    chosen: list[int] = []
    left = cost
    for items, picks in zip(reversed(layers), reversed(taken), strict=True):
        chosen.append(int(picks[left]))
        left -= items[chosen[-1]].cost
    whole = tuple(reversed(chosen))
    time = math.fsum(items[pick].time for items, pick in zip(layers, whole, strict=True))
    return Combination(cost, time, whole)


def search(
    combinations: Sequence[Combination], cost: int, passes: Callable[[Combination], bool], tries: int
) -> Combination:
    """The fastest of the combinations, as ``frontier`` gives them, that was seen to pass. The first, which
    leaves all as it is, needs no test.

    What is tried first is the fastest within ``cost``, and then what lies half-way in time between the
    fastest that passed and the slowest that did not, or the last of all; at most ``tries`` of them.
    """
    times = [-one.time for one in combinations]
    place = bisect_right([one.cost for one in combinations], cost) - 1
    good, bad = 0, len(combinations)
    for _ in range(tries):
        if bad - good <= 1:
            break
        place = min(max(place, good + 1), bad - 1)
        if passes(combinations[place]):
            good = place
        else:
            bad = place
        place = bisect_left(times, (times[good] + times[min(bad, len(times) - 1)]) / 2)
    return combinations[good]
