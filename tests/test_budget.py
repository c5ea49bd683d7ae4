"""The knapsack against every combination there is, and the search along its answers."""

import itertools
import math
import random

import pytest

from sparseops.train import budget
from sparseops.train.budget import STEPS, Combination, Item, cost_of, frontier, search


def combinations(layers):
    """(cost, time, picks) of every combination of one item of each layer."""
    for picks in itertools.product(*(range(len(items)) for items in layers)):
        chosen = [items[pick] for items, pick in zip(layers, picks, strict=True)]
        yield sum(item.cost for item in chosen), sum(item.time for item in chosen), picks


def random_layers(seed, most_cost=12):
    """Layers of one to four items; the times are whole numbers, so that sums are exact."""
    generator = random.Random(seed)
    return [
        [
            Item(0, 50.0),
            *(
                Item(generator.randint(1, most_cost), float(generator.randint(1, 60)))
                for _ in range(generator.randint(0, 3))
            ),
        ]
        for _ in range(generator.randint(1, 6))
    ]


@pytest.mark.parametrize("seed", range(60))
def test_every_cost_has_its_fastest_combination(seed):
    layers = random_layers(seed)
    limit = random.Random(seed).randint(0, 40)
    everything = list(combinations(layers))
    found = frontier(layers, limit)
    best = math.inf
    expected = []
    for cost in range(limit + 1):
        fastest = min((time for its, time, _ in everything if its <= cost), default=math.inf)
        if fastest < best:
            expected.append((cost, fastest))
            best = fastest
    assert [(one.cost, one.time) for one in found] == expected
    for one in found:
        assert (one.cost, one.time, one.picks) in everything


def test_times_that_are_no_whole_numbers():
    generator = random.Random(0)
    layers = [
        [Item(0, 1.0), *(Item(generator.randint(1, 9), generator.random()) for _ in range(3))]
        for _ in range(6)
    ]
    fastest = min(time for cost, time, _ in combinations(layers) if cost <= 20)
    assert frontier(layers, 20)[-1].time == pytest.approx(fastest, rel=1e-12)


def test_the_greedy_choice_is_not_always_the_best():
    # by time saved for each step the first layer goes first, and then the second no longer fits
    layers = [[Item(0, 10.0), Item(6, 3.0)], [Item(0, 10.0), Item(5, 4.5)], [Item(0, 10.0), Item(5, 4.5)]]
    assert frontier(layers, 10)[-1] == Combination(10, 19.0, (0, 1, 1))


def test_of_equals_the_first_item():
    assert frontier([[Item(0, 2.0), Item(0, 2.0), Item(1, 1.0), Item(1, 1.0)]], 5) == [
        Combination(0, 2.0, (0,)),
        Combination(1, 1.0, (2,)),
    ]


def test_layers_without_a_choice_and_none_at_all():
    assert frontier([[Item(0, 2.0)], [Item(0, 3.0), Item(4, 1.0)]], 3) == [Combination(0, 5.0, (0, 0))]
    assert frontier([], 3) == [Combination(0, 0.0, ())]


def test_no_combination_is_within_the_limit():
    with pytest.raises(ValueError, match="frontier: limit must allow one item for each layer, got 3"):
        frontier([[Item(2, 1.0)], [Item(2, 1.0)]], 3)


def test_a_large_problem():
    layers = random_layers(1) * 30
    limit = 4 * STEPS
    assert frontier(layers, limit)[-1].time == sum(min(item.time for item in items) for items in layers)


def test_cost_of_one_task():
    assert cost_of({"": 0.005}, {"": 0.01}) == STEPS // 2
    for tenths in range(1, 40):
        assert cost_of({"": tenths / 1000}, {"": 0.01}) == tenths * STEPS // 10, "no step for rounding alone"
    assert cost_of({"": 0.0050001}, {"": 0.01}) == STEPS // 2 + 1, "rounded up"
    assert cost_of({"": 0.04}, {"": 0.01}) == budget.REACH * STEPS
    assert cost_of({"": 0.0401}, {"": 0.01}) is None


def test_a_gain_costs_as_little_as_no_change():
    assert cost_of({"": -0.5}, {"": 0.01}) == cost_of({"": 0.0}, {"": 0.01}) == 1


def test_without_a_budget_nothing_may_fall():
    assert cost_of({"": 0.0}, {"": 0.0}) == 1
    assert cost_of({"": 1e-9}, {"": 0.0}) is None


def test_cost_of_several_tasks_is_the_largest_share():
    limits = {"a": 0.01, "b": 0.1}
    assert cost_of({"a": 0.002, "b": 0.05}, limits) == STEPS // 2
    assert cost_of({"a": 0.006, "b": 0.05}, limits) == 6 * STEPS // 10
    assert cost_of({"a": -1.0, "b": 0.03}, limits) == 3 * STEPS // 10
    assert cost_of({"a": 0.0, "b": 1.0}, limits) is None


@pytest.mark.parametrize("seed", range(10))
def test_what_fits_together_fits_each_task(seed):
    generator = random.Random(seed)
    limits = {"a": 0.01, "b": 0.1}
    drops = [{task: generator.uniform(-0.2, 0.5) * limits[task] for task in limits} for _ in range(6)]
    layers = [[Item(0, 1.0), Item(cost_of(drop, limits), 0.5 * generator.random())] for drop in drops]
    for one in frontier(layers, STEPS):
        for task, limit in limits.items():
            total = sum(max(0.0, drop[task]) for drop, pick in zip(drops, one.picks, strict=True) if pick)
            assert total <= limit


LINE = [Combination(10 * n, 100.0 - n, (n,)) for n in range(101)]


def tried(passes, cost=300, tries=8, line=LINE):
    """The answer of the search, and what it tried, in order."""
    order = []

    def asked(one):
        order.append(one.picks[0])
        return passes(one)

    return search(line, cost, asked, tries), order


def test_search_begins_within_the_cost_and_goes_up():
    found, order = tried(lambda one: True)
    assert order[:3] == [30, 65, 83]
    assert found is LINE[order[-1]]
    assert tried(lambda one: True, tries=20)[0] is LINE[-1], "the last one is reached"


@pytest.mark.parametrize("border", [1, 2, 17, 29, 30, 31, 77, 99, 100])
def test_search_finds_the_border(border):
    found, order = tried(lambda one: one.picks[0] <= border, tries=20)
    assert found is LINE[border]
    assert len(set(order)) == len(order), "nothing is tried twice"
    assert len(order) <= 9


def test_search_of_what_never_passes():
    found, order = tried(lambda one: False, tries=20)
    assert found is LINE[0]
    assert order[0] == 30
    assert order[-1] == 1
    assert 0 not in order


def test_search_keeps_the_fastest_that_passed():
    found, order = tried(lambda one: one.picks[0] in (15, 30), tries=3)
    assert order == [30, 65, 48]
    assert found is LINE[30]


def test_search_stops_after_so_many_tries():
    for tries in (0, 1, 4):
        assert len(tried(lambda one: True, tries=tries)[1]) == tries


def test_search_where_there_is_nothing_to_choose():
    assert tried(lambda one: True, line=LINE[:1]) == (LINE[0], [])
    assert tried(lambda one: True, cost=0, line=LINE[:2]) == (LINE[1], [1])


def test_search_goes_half_way_in_time_not_in_number():
    times = [100.0, 99.0, 98.0, 97.0, 96.0, 10.0, 0.0]
    line = [Combination(n, time, (n,)) for n, time in enumerate(times)]
    assert tried(lambda one: one.picks[0] <= 4, cost=2, tries=2, line=line)[1] == [2, 5]
