"""The search for an order of columns: its table against plain loops, known optima, what it must not do."""

import itertools
import time

import pytest
import torch

from sparseops.train import permutation
from sparseops.train.permutation import best_order


def kept(weight, order):
    """The squares that 2:4 keeps of the columns [C, R] in this order, one row and one four at a time."""
    columns = [[float(value) ** 2 for value in weight[c]] for c in order]
    total = 0.0
    for start in range(0, len(columns), 4):
        for row in range(weight.shape[1]):
            total += sum(sorted((column[row] for column in columns[start : start + 4]), reverse=True)[:2])
    return total


def random_columns(count, rows, spread=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (torch.randn(count, 1, generator=generator) * spread).exp()
    return (torch.randn(count, rows, generator=generator) * sizes).double()


def clustered(count, rows):
    """Half of the columns are large, and stand side by side."""
    weight = torch.full((count, rows), 1e-3).double()
    weight[: count // 2] = 1 + torch.arange(count // 2 * rows).view(-1, rows) / (count * rows)
    return weight


def is_order(order, count):
    return order.dtype == torch.int64 and order.sort().values.tolist() == list(range(count))


@pytest.mark.parametrize("count", [8, 16, 64, 128])
def test_the_known_optimum(count):
    weight = clustered(count, 5)
    order = best_order(weight)
    assert is_order(order, count)
    assert all(sum(c < count // 2 for c in four) == 2 for four in order.view(-1, 4).tolist())


@pytest.mark.parametrize("count", [6, 10, 16, 40, 67])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_swap_gains_and_it_is_better_than_the_identity(count, seed):
    weight = random_columns(count, 7, seed=seed)
    order = best_order(weight)
    assert is_order(order, count)
    best = kept(weight, order.tolist())
    assert best > kept(weight, range(count))
    if count <= 16:
        for a, b in itertools.combinations(range(count), 2):
            other = order.tolist()
            other[a], other[b] = other[b], other[a]
            assert kept(weight, other) <= best * (1 + 1e-6)


def best_of_all(weight):
    """Of eight columns: whichever three stand with the first."""
    fours = [(0, *rest) for rest in itertools.combinations(range(1, 8), 3)]
    return max(kept(weight, [*four, *(c for c in range(8) if c not in four)]) for four in fours)


def test_eight_columns_come_close_to_the_best_order_of_all():
    shares = []
    for seed in range(20):
        weight = random_columns(8, 6, seed=seed)
        shares.append(kept(weight, best_order(weight).tolist()) / best_of_all(weight))
    assert max(shares) <= 1 + 1e-6
    assert min(shares) > 0.99
    assert sum(share > 1 - 1e-6 for share in shares) >= 15


def test_beginning_again_leads_further(monkeypatch):
    weight = random_columns(48, 20)
    far = kept(weight, best_order(weight).tolist())
    monkeypatch.setattr(permutation, "ESCAPES", 0)
    assert far > kept(weight, best_order(weight).tolist()) * 1.0001


def table_of(search, weight):
    """For each place and column: what the group keeps if the column stands there, by the scale of search."""
    scale = float(weight.abs().max()) ** 2
    columns = [*weight.tolist(), *[[0.0] * weight.shape[1]] * (len(search.order) - len(weight))]
    expected = torch.zeros(len(columns), len(columns), dtype=torch.float64)
    for place, column in itertools.product(range(len(columns)), repeat=2):
        four = search.order.view(-1, 4)[place // 4].tolist()
        four[place % 4] = column
        values = torch.tensor([columns[c] for c in four])
        expected[place, column] = kept(values, range(4)) / scale
    return expected


@pytest.mark.parametrize("count", [8, 11])
def test_the_table_of_swaps(count):
    weight = random_columns(count, 9).round(decimals=1)
    search = permutation._Search(weight)
    torch.testing.assert_close(search.table, table_of(search, weight), rtol=1e-5, atol=1e-6)
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(count, generator=generator), torch.arange(count, len(search.order))])
    search.place(order)
    torch.testing.assert_close(search.table, table_of(search, weight), rtol=1e-5, atol=1e-6)
    assert float(search.kept.sum()) * float(weight.abs().max()) ** 2 == pytest.approx(
        kept(weight, order[:count].tolist()), rel=1e-5
    )


def test_it_is_the_same_each_time():
    weight = random_columns(64, 30)
    state = torch.get_rng_state()
    first = best_order(weight)
    torch.manual_seed(7)
    assert torch.equal(best_order(weight), first)
    torch.set_rng_state(state)


def test_proposals_from_a_sample_of_the_rows_are_judged_by_all(monkeypatch):
    """In most rows each four has two large columns, which any swap would spoil. The rows of the sample alone
    ask for swaps."""
    monkeypatch.setattr(permutation, "_WORK", 0)
    generator = torch.Generator().manual_seed(0)
    weight = (
        torch.rand(8, 64 * 8, 4, generator=generator).argsort(-1).lt(2).double().transpose(1, 2).flatten(0, 1)
    )
    weight[:, ::8] = 0.1
    weight[16:, ::8] = 0.001
    search = permutation._Search(weight)
    assert search.sample.shape == (32, 64)
    assert list(search.proposals())
    assert best_order(weight).tolist() == list(range(32))


def test_a_sample_leads_to_most_of_the_gain(monkeypatch):
    weight = random_columns(64, 640, spread=0.7)
    before, whole = kept(weight, range(64)), kept(weight, best_order(weight).tolist())
    monkeypatch.setattr(permutation, "_WORK", 0)
    assert kept(weight, best_order(weight).tolist()) > before + 0.8 * (whole - before)


@pytest.mark.parametrize(
    "weight", [torch.ones(16, 3), torch.zeros(16, 3), torch.zeros(16, 0), torch.ones(3, 2)]
)
def test_nothing_to_gain_is_the_identity(weight):
    assert best_order(weight).tolist() == list(range(len(weight)))


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float16, 1e4), (torch.float16, 1e-6), (torch.bfloat16, 1e30)]
)
def test_the_scale_does_not_matter(dtype, scale):
    weight = (clustered(16, 4) * scale).to(dtype)
    order = best_order(weight)
    assert all(sum(c < 8 for c in four) == 2 for four in order.view(-1, 4).tolist())


def test_a_deadline_ends_the_search():
    weight = clustered(64, 5)
    assert best_order(weight, deadline=time.monotonic() - 1).tolist() == list(range(64))
    weight = random_columns(512, 2000)
    start = time.monotonic()
    order = best_order(weight, deadline=start + 0.5)
    assert is_order(order, 512)
    assert time.monotonic() - start < 5
