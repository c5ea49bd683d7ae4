"""The order of columns in which 2:4 pruning keeps most: a search on one matrix, which knows no model."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

ESCAPES = 64
"""How often a search begins again at most, with fewer for a matrix of more than 2**18 elements."""

# Differences per table of swaps, which says how many rows the proposals see.
_WORK = 1 << 33
_OTHERS = ((1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2))


def best_order(weight: Tensor, *, deadline: float | None = None) -> Tensor:
    """An order int64 [C] of the columns of ``weight`` [C, R] (given one by one, each with its R rows): column
    ``order[j]`` comes to place j, and of each four neighbours in a row the two largest magnitudes are kept.

    Pool and Yu 2021, "Channel permutations for N:M sparsity": columns of different groups of four are swapped
    where that gains most squared magnitude, until no swap gains any. Then a few columns are rotated at random
    among groups and the swaps begin again, and the best order of all counts. Swaps in a round touch
    different groups, so their gains add up, and each is computed over all rows before it is made. The answer
    is never worse than the identity, which it is where nothing gains, and the same each time.

    Args:
        weight: floating point and finite. A last group of fewer than four keeps its two largest.
        deadline: by ``time.monotonic``, when the search ends with what it has.
    """
    if _is_over(deadline) or not weight.numel():
        return torch.arange(len(weight))
    search = _Search(weight)
    search.climb(deadline)
    best, kept = search.order.clone(), search.kept.sum()
    generator = torch.Generator().manual_seed(0)
    escapes = min(ESCAPES, (ESCAPES << 18) // weight.numel()) if weight.shape[0] >= 12 else 0
    for _ in range(escapes):
        if _is_over(deadline):
            break
        search.rotate(generator)
        search.climb(deadline)
        if search.kept.sum() > kept * (1 + 1e-9):
            best, kept = search.order.clone(), search.kept.sum()
    return best[: weight.shape[0]].cpu()


class _Search:
    """An order and what each swap of two places would keep.

    squares: [C, R], C padded to fours with zeros that never move. order: the columns by place. kept: float64
    [groups], over all rows. table: float64 [places, C], over a sample of the rows: what the group of a place
    keeps if this column stands there.
    """

    def __init__(self, weight: Tensor) -> None:
        self.count, rows = weight.shape
        self.groups = -(-self.count // 4)
        size = self.groups * 4
        weight = F.pad(weight.detach().float(), (0, 0, 0, size - self.count))
        # Scaled, so that no square of half precision's range is infinite or zero.
        self.squares = (weight / weight.abs().max().clamp_min(torch.finfo().tiny)).square_()
        seen = max(64, _WORK // size**2)
        self.sample = self.squares[:, :: -(-rows // seen)].double()
        self.order = torch.arange(size, device=weight.device)
        self.kept = weight.new_zeros(self.groups, dtype=torch.float64)
        self.table = weight.new_zeros(size, size, dtype=torch.float64)
        self.update(torch.arange(self.groups, device=weight.device))

    def place(self, order: Tensor) -> None:
        """Put the columns into this order."""
        changed = (order != self.order).view(-1, 4).any(1).nonzero().flatten()
        self.order = order.clone()
        self.update(changed)

    def update(self, groups: Tensor) -> None:
        """Find out anew what these groups keep, and would keep with another column.

        With the largest other value a and the second largest b, a group keeps a + max(b, x) of column x; and
        the sum of max(b, x) over the rows is half that of b + x + |b - x|.
        """
        columns = self.order.view(-1, 4)[groups]
        self.kept[groups] = self.energy(columns)
        places = (groups[:, None] * 4 + torch.arange(4, device=groups.device)).flatten()
        values = self.sample[columns]
        x, y, z = values[:, torch.tensor(_OTHERS, device=groups.device)].flatten(0, 1).unbind(1)
        low, high = torch.minimum(x, y), torch.maximum(x, y)
        second = torch.maximum(low, torch.minimum(high, z))
        first = torch.maximum(high, z).sum(1)
        distance = torch.cdist(second, self.sample, p=1)
        self.table[places] = first[:, None] + (second.sum(1)[:, None] + self.sample.sum(1) + distance) / 2

    def energy(self, columns: Tensor) -> Tensor:
        """float64 [n]: what groups of these columns [n, 4] keep over all rows."""
        a, b, c, d = self.squares[columns].unbind(1)
        high, other = torch.maximum(a, b), torch.maximum(c, d)
        low = torch.maximum(torch.minimum(a, b), torch.minimum(c, d))
        pair = torch.maximum(high, other).double() + torch.maximum(torch.minimum(high, other), low)
        return pair.sum(1)

    def climb(self, deadline: float | None) -> None:
        """Swap while that gains anything."""
        while not _is_over(deadline):
            swaps = torch.tensor(list(self.proposals()), device=self.order.device).view(-1, 2)
            if not len(swaps):
                return
            new = self.order.clone()
            new[swaps] = self.order[swaps.flip(1)]
            groups = swaps // 4
            gain = self.energy(new.view(-1, 4)[groups.flatten()]).view(-1, 2).sum(1)
            gain -= self.kept[groups].sum(1)
            good = gain > self.kept.sum() * 1e-9
            if not good.any():
                return
            self.order[swaps[good]] = new[swaps[good]]
            self.update(groups[good].flatten())

    def proposals(self) -> Iterator[tuple[int, int]]:
        """Pairs of places to swap, the best first, each group once."""
        placed = self.table[:, self.order]
        own = placed.diagonal()
        gain = placed + placed.T - own[:, None] - own
        gain[self.count :] = gain[:, self.count :] = -torch.inf
        pairs, where = gain.view(self.groups, 4, self.groups, 4).transpose(1, 2).flatten(2).max(2)
        pairs.fill_diagonal_(-torch.inf)
        least = float(own.sum()) * 1e-9
        while True:
            best = int(pairs.argmax())
            a, b = divmod(best, self.groups)
            if not pairs[a, b] > least:
                return
            yield a * 4 + int(where[a, b]) // 4, b * 4 + int(where[a, b]) % 4
            for group in (a, b):
                pairs[group] = pairs[:, group] = -torch.inf

    def rotate(self, generator: torch.Generator) -> None:
        """Rotate columns among three groups, so that no single swap leads back."""
        full = self.count // 4
        chosen = torch.randperm(full, generator=generator)[:3]
        places = (chosen * 4 + torch.randint(4, chosen.shape, generator=generator)).to(self.order.device)
        new = self.order.clone()
        new[places] = self.order[places.roll(1)]
        self.place(new)


def _is_over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() >= deadline
