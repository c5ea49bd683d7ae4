"""Masks from scores, next to plain loops over every group, block and weight."""

import itertools
import math
from fractions import Fraction
from functools import lru_cache

import pytest
import torch
from conftest import GPU
from hypothesis import given
from hypothesis import strategies as st

from sparseops.formats import NM24
from sparseops.prune import (
    Layers,
    Unstructured,
    is_24_transposable,
    keep_24,
    keep_24_transposable,
    keep_layers,
    keep_unstructured,
)

INF, NAN = math.inf, math.nan

SHAPES = [(1, 1), (3, 8), (5, 10), (4, 3), (2, 7, 3), (6, 5, 2, 2), (9, 4), (1, 6), (7, 2), (2, 2), (8, 8)]

values = st.one_of(st.integers(-3, 6).map(float), st.sampled_from([INF, NAN, -INF, 0.5]))
levels = st.integers(0, 20).map(lambda n: n / 20)


@st.composite
def tensors(draw, dims=(2, 4), size=9):
    shape = draw(st.lists(st.integers(1, size), min_size=dims[0], max_size=dims[1]))
    shape[2:] = [min(n, 2) for n in shape[2:]]
    seed = draw(st.integers(0, 2**20))
    some = draw(st.lists(values, min_size=1, max_size=6))
    pick = torch.randint(len(some), shape, generator=torch.Generator().manual_seed(seed))
    return torch.tensor(some)[pick]


def worth(score):
    return INF if math.isnan(score) else score


def by_worth(scores):
    """Places of a list of scores, the best first, of equal ones the first."""
    return sorted(range(len(scores)), key=lambda place: (-worth(scores[place]), place))


def share(level, count):
    return math.floor(Fraction(level).limit_denominator(1000) * count)


def taps_of(shape):
    return list(itertools.product(*(range(n) for n in shape[2:])))


def starts(size):
    return range(0, size, 4)


# 2:4


def loops_24(scores):
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for row, tap, start in itertools.product(
        range(len(scores)), taps_of(scores.shape), starts(scores.shape[1])
    ):
        four = [scores[(row, c, *tap)].item() for c in range(start, min(start + 4, scores.shape[1]))]
        for place in by_worth(four)[:2]:
            mask[(row, start + place, *tap)] = True
    return mask


@given(tensors())
def test_24_keeps_the_two_largest_of_four(scores):
    assert torch.equal(keep_24(scores), loops_24(scores))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_24_is_what_nm24_keeps(shape, dtype):
    w = torch.randint(-3, 4, shape).to(dtype)
    expected = NM24.from_dense(w, prune="magnitude").to_dense()
    assert torch.equal(w * keep_24(w.abs()), expected)


def test_padding_wins_nothing():
    scores = -torch.arange(1.0, 7).view(1, 6)
    assert keep_24(scores).tolist() == [[True, True, False, False, True, True]]
    assert keep_24(torch.full((2, 3), -INF)).tolist() == [[True, True, False]] * 2


# 2:4 both ways


@lru_cache
def legal(rows, columns):
    """Every mask of a block with at most two in each row and column, as a list of cells."""
    found = []
    for bits in itertools.product((1, 0), repeat=rows * columns):
        lines = [bits[row * columns : (row + 1) * columns] for row in range(rows)]
        if max(map(sum, lines)) <= 2 and max(map(sum, zip(*lines, strict=True))) <= 2:
            found.append(bits)
    return found


@lru_cache
def maximal(rows, columns):
    """Those to which no cell can be added."""
    masks = set(legal(rows, columns))

    def is_full(bits):
        more = ((*bits[:n], 1, *bits[n + 1 :]) for n, bit in enumerate(bits) if not bit)
        return not any(one in masks for one in more)

    return [bits for bits in legal(rows, columns) if is_full(bits)]


def total(bits, block):
    """How good a mask is: infinite scores outweigh all others."""
    kept = [worth(score) for bit, score in zip(bits, block, strict=True) if bit]
    return sum(math.copysign(1, s) for s in kept if math.isinf(s)), sum(s for s in kept if math.isfinite(s))


def loops_transposable(scores, masks=maximal):
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    rows, columns = scores.shape[:2]
    for top, left, tap in itertools.product(starts(rows), starts(columns), taps_of(scores.shape)):
        high, wide = min(4, rows - top), min(4, columns - left)
        cells = list(itertools.product(range(top, top + high), range(left, left + wide)))
        block = [scores[(*cell, *tap)].item() for cell in cells]
        best = max(masks(high, wide), key=lambda bits: total(bits, block))  # the first of equal ones
        for cell, bit in zip(cells, best, strict=True):
            mask[(*cell, *tap)] = bool(bit)
    return mask


def test_maximal_patterns_are_90_and_96():
    counts = [sum(bits) for bits in maximal(4, 4)]
    assert (counts.count(8), counts.count(7), len(counts)) == (90, 96, 186)


@given(tensors(dims=(2, 3), size=6))
def test_transposable_is_the_best_of_the_maximal_patterns(scores):
    assert torch.equal(keep_24_transposable(scores), loops_transposable(scores))


@pytest.mark.parametrize("shape", SHAPES)
def test_transposable_is_the_best_of_all_patterns(shape):
    scores = torch.randint(0, 1000, shape).double()
    mask = keep_24_transposable(scores)
    best = (scores * loops_transposable(scores, legal)).sum()
    assert (scores * mask).sum() == best
    assert is_24_transposable(mask)


def test_transposable_on_many_blocks_of_real_scores():
    scores = torch.rand(40, 40, dtype=torch.float64)
    blocks = scores.view(10, 4, 10, 4).transpose(1, 2).reshape(100, 16)
    best = (blocks @ torch.tensor(legal(4, 4), dtype=torch.float64).t()).amax(1)
    found = (scores * keep_24_transposable(scores)).view(10, 4, 10, 4).transpose(1, 2).reshape(100, 16).sum(1)
    torch.testing.assert_close(found, best, rtol=1e-12, atol=0)


def test_cycle_of_six_and_a_cell_of_its_own():
    scores = torch.tensor([[5.0, 5, 0, 1], [0, 5, 5, 1], [5, 0, 5, 1], [1, 1, 1, 9]])
    assert torch.equal(keep_24_transposable(scores), scores >= 5)
    turned = scores.roll((1, 2), (0, 1))
    assert torch.equal(keep_24_transposable(turned), turned >= 5)


def test_transposable_mask_is_that_of_a_block_many_times():
    scores = torch.rand(4, 4)
    one = keep_24_transposable(scores)
    many = keep_24_transposable(scores.repeat(200, 200))  # more blocks than are compared at a time
    assert torch.equal(many, one.repeat(200, 200))


def test_transposable_border_keeps_all_that_fits():
    mask = keep_24_transposable(-torch.rand(6, 7))
    assert mask[4:, :4].sum() == 4 and mask[:4, 4:].sum() == 6 and mask[4:, 4:].sum() == 4
    assert keep_24_transposable(torch.zeros(2, 2)).all()


@pytest.mark.parametrize("scale", [2.0**-900, 2.0**-149, 2.0**1019])
def test_transposable_of_tiny_and_huge_scores(scale):
    scores = torch.randint(0, 9, (8, 8)).double()
    scores[0, 0] = NAN
    assert torch.equal(keep_24_transposable(scores * scale), keep_24_transposable(scores))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_transposable_sums_do_not_overflow(dtype):
    scores = torch.randint(1, 9, (8, 8)).to(dtype)
    large = scores * 2.0 ** math.floor(math.log2(torch.finfo(dtype).max / 8))
    assert torch.equal(keep_24_transposable(large), keep_24_transposable(scores))


def test_transposable_sums_are_not_rounded():
    scores = torch.ones(4, 4)
    scores[3, 0] += 2.0**-23  # in float32 eight of them are 8 with it or without
    assert keep_24_transposable(scores)[3, 0]


@pytest.mark.parametrize("dim", [0, 1])
def test_is_24_transposable(dim):
    mask = torch.zeros(8, 8, 2, 2).movedim(dim, 1)
    mask[:, :2] = 1
    mask = mask.movedim(1, dim)
    assert not is_24_transposable(mask)
    assert is_24_transposable(mask * keep_24_transposable(mask))
    assert is_24_transposable(torch.ones(2, 2)) and not is_24_transposable(torch.ones(6, 7)[:, :3])
    assert not is_24_transposable(torch.full((1, 3), NAN))


# Levels


def loops_spared(scores, mask, level, height):
    """The mask at a level below 1: blocks that lose the most keep all, of equal ones the first."""
    rows, columns = scores.shape[:2]
    losses = {}
    for block in itertools.product(range(0, rows, height), starts(columns), taps_of(scores.shape)):
        top, left, tap = block
        cells = [
            (row, column, *tap)
            for row in range(top, min(top + height, rows))
            for column in range(left, min(left + 4, columns))
        ]
        lost = [scores[cell].item() for cell in cells if not mask[cell]]
        if lost:
            losses[tuple(cells)] = sum(map(worth, lost))
    blocks = list(losses)
    order = by_worth(list(losses.values()))
    mask = mask.clone()
    for place in order[: len(blocks) - share(level, len(blocks))]:
        for cell in blocks[place]:
            mask[cell] = True
    return mask


@given(tensors(size=7), levels)
def test_24_at_a_level(scores, level):
    assert torch.equal(keep_24(scores, level), loops_spared(scores, keep_24(scores), level, 1))


@given(tensors(size=7), levels)
def test_transposable_at_a_level(scores, level):
    mask = keep_24_transposable(scores)
    assert torch.equal(keep_24_transposable(scores, level), loops_spared(scores, mask, level, 4))


RULES = [
    Unstructured(0.6),
    Unstructured(0.6, scope="row", min_kept=0.5),
    Unstructured(0.6, scope="global", min_kept=0.25),
    Unstructured(threshold=4.0, min_kept=0.1),
]


@pytest.mark.parametrize(
    "masks",
    [
        lambda scores, level: [keep_24(scores, level)],
        lambda scores, level: [keep_24_transposable(scores, level)],
        *(
            lambda scores, level, rule=rule: keep_unstructured([scores, scores + 1], rule, level)
            for rule in RULES
        ),
        lambda scores, level: [torch.tensor(keep_layers(list(scores), Layers(0.7), level))],
        lambda scores, level: [torch.tensor(keep_layers(list(scores), Layers(threshold=3.0), level))],
    ],
)
@given(scores=tensors(size=6), pair=st.tuples(levels, levels))
def test_what_a_level_drops_every_higher_one_drops(masks, scores, pair):
    low, high = (masks(scores, level) for level in sorted(pair))
    assert all((few <= many).all() for few, many in zip(high, low, strict=True))


@given(tensors(size=6))
def test_at_level_0_all_is_kept(scores):
    assert keep_24(scores, 0.0).all() and keep_24_transposable(scores, 0.0).all()
    for rule in RULES:
        assert keep_unstructured([scores], rule, 0.0)[0].all()
    assert all(keep_layers([scores, scores], Layers(threshold=9.0), 0.0))


# Single weights


def loops_unstructured(scores, rule, level=1.0):
    """Weights by their places (tensor, row, column); each list of them competes."""
    tables = [its.flatten(1) if rule.scope == "row" else its.reshape(1, -1) for its in scores]
    masks = [torch.ones_like(table, dtype=torch.bool) for table in tables]
    pools = []
    for number, table in enumerate(tables):
        rows = [[(number, row, column) for column in range(table.shape[1])] for row in range(len(table))]
        pools += rows
    safe = set()
    for pool in pools:
        order = by_worth([tables[n][r, c].item() for n, r, c in pool])
        least = math.ceil(Fraction(rule.min_kept).limit_denominator(1000) * len(pool))
        safe |= {pool[place] for place in order[:least]}
    if rule.scope == "global":
        pools = [[cell for pool in pools for cell in pool]]
    for pool in pools:
        order = [pool[place] for place in by_worth([tables[n][r, c].item() for n, r, c in pool])]
        if rule.threshold is None:
            count = share(
                Fraction(rule.ratio).limit_denominator(1000) * Fraction(level).limit_denominator(1000),
                len(pool),
            )
        else:
            count = (
                sum(worth(tables[n][r, c].item()) <= rule.threshold * level for n, r, c in pool)
                if level
                else 0
            )
        going = [cell for cell in reversed(order) if cell not in safe]
        if rule.threshold is not None:
            going = [
                (n, r, c) for n, r, c in going if worth(tables[n][r, c].item()) <= rule.threshold * level
            ]
        for n, r, c in going[:count]:
            masks[n][r, c] = False
    return [mask.view(its.shape) for mask, its in zip(masks, scores, strict=True)]


shares = st.integers(0, 19).map(lambda n: n / 20)


@given(
    st.lists(tensors(dims=(2, 3), size=7), min_size=1, max_size=3),
    st.builds(
        Unstructured,
        ratio=shares,
        scope=st.sampled_from(["local", "global", "row"]),
        threshold=st.one_of(st.none(), st.just(0), st.just(2.0)),
        min_kept=st.one_of(st.just(0.0), shares, st.just(1)),
    ),
    levels,
)
def test_unstructured(scores, rule, level):
    found = keep_unstructured(scores, rule, level)
    for mask, expected in zip(found, loops_unstructured(scores, rule, level), strict=True):
        assert torch.equal(mask, expected)


@pytest.mark.parametrize(("ratio", "dropped"), [(0.29, 29), (0.57, 57), (0.999, 99), (1 / 3, 33), (0, 0)])
def test_unstructured_counts_are_exact(ratio, dropped):
    scores = torch.rand(10, 10)
    for scope, count in (("local", dropped), ("global", dropped), ("row", 10 * (dropped // 10))):
        assert (~keep_unstructured([scores], Unstructured(ratio, scope=scope))[0]).sum() == count


@pytest.mark.parametrize(("scope", "kept"), [("local", 24), ("row", 30)])
def test_a_share_is_kept_whatever_the_ratio(scope, kept):
    scores = torch.rand(10, 12)
    rule = Unstructured(0.9, scope=scope, min_kept=0.2)
    mask = keep_unstructured([scores], rule)[0]
    assert mask.sum() == kept
    assert torch.equal(mask, loops_unstructured([scores], rule)[0])


def test_share_that_rounds_above_a_whole_number():
    assert 0.07 * 100 > 7
    assert keep_unstructured([torch.rand(10, 10)], Unstructured(0.99, min_kept=0.07))[0].sum() == 7


def test_global_scope_spares_a_share_of_each_tensor():
    weak, strong = torch.rand(10, 10), 1 + torch.rand(10, 30)
    counts = [
        mask.sum().item() for mask in keep_unstructured([weak, strong], Unstructured(0.5, scope="global"))
    ]
    assert counts == [0, 200]
    rule = Unstructured(0.5, scope="global", min_kept=0.1)
    masks = keep_unstructured([weak, strong], rule)
    assert [mask.sum().item() for mask in masks] == [10, 190], "what is spared goes elsewhere"
    assert weak[masks[0]].min() > weak[~masks[0]].max()
    assert keep_unstructured([], rule) == []
    assert keep_unstructured([weak, strong], Unstructured(0.9, scope="global", min_kept=1))[1].all()


def test_threshold_is_in_the_scores_and_grows_with_the_level():
    scores = torch.tensor([[0.0, 0.1, 0.2, 0.3, NAN]])
    rule = Unstructured(0.9, threshold=0.2)
    assert keep_unstructured([scores.double()], rule)[0].tolist() == [[False] * 2 + [True] * 3]  # 0.2f > 0.2
    assert keep_unstructured([scores.double()], rule, 0.25)[0].tolist() == [[False] + [True] * 4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scope", ["local", "global", "row"])
def test_unstructured_takes_every_dtype_and_layout(dtype, scope):
    scores = torch.randint(0, 50, (6, 9, 2)).to(dtype).transpose(0, 1)
    found = keep_unstructured([scores], Unstructured(0.4, scope=scope))[0]
    assert torch.equal(found, loops_unstructured([scores], Unstructured(0.4, scope=scope))[0])


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (3, 0, 2)])
def test_tensors_without_elements(shape):
    scores = torch.zeros(shape)
    for level in (0.5, 1.0):
        assert keep_24(scores, level).shape == keep_24_transposable(scores, level).shape == shape
        for rule in RULES:
            assert keep_unstructured([scores], rule, level)[0].shape == shape


def test_scores_are_left_alone_and_masks_carry_no_gradient():
    scores = torch.tensor([[NAN, 1.0, 2.0, 3.0]], requires_grad=True)
    for mask in (keep_24(scores), keep_24_transposable(scores), *keep_unstructured([scores], Unstructured())):
        assert mask.dtype == torch.bool and not mask.requires_grad
    assert scores[0, 0].isnan()


# Layers


@pytest.mark.parametrize(
    ("rule", "level", "expected"),
    [
        (Layers(0.5), 1.0, [0, 1, 0, 1]),
        (Layers(0.5), 0.5, [0, 1, 1, 1]),
        (Layers(0.49), 1.0, [0, 1, 1, 1]),
        (Layers(0.99), 1.0, [0, 0, 0, 1]),
        (Layers(0.99, min_kept=2), 1.0, [0, 1, 0, 1]),
        (Layers(0.5, min_kept=9), 1.0, [1, 1, 1, 1]),
        (Layers(threshold=2.0), 1.0, [0, 1, 0, 1]),
        (Layers(threshold=2.0), 0.75, [0, 1, 1, 1]),
        (Layers(threshold=9.0), 1.0, [0, 0, 0, 1]),
        (Layers(threshold=9.0, min_kept=0), 1.0, [0, 0, 0, 1]),
        (Layers(threshold=9.0, min_kept=3), 1.0, [0, 1, 1, 1]),
    ],
)
def test_layers_go_by_their_mean(rule, level, expected):
    small, large = torch.full((9, 9), 1.0), torch.tensor([[3.0, 1.0]])
    infinite = torch.tensor([[NAN, -9.0]])
    assert keep_layers([small, torch.tensor([2.5]), large, infinite], rule, level) == list(
        map(bool, expected)
    )


def test_of_equal_layers_the_first_is_kept():
    assert keep_layers([torch.ones(2, 2)] * 5, Layers(0.6)) == [True, True, False, False, False]
    assert keep_layers([], Layers()) == []
    assert keep_layers([torch.zeros(2, 2)] * 2, Layers(threshold=1.0, min_kept=0)) == [False, False]


# What is refused


@pytest.mark.parametrize("level", [-0.1, 1.1, NAN])
def test_level_must_be_a_share(level):
    scores = torch.ones(4, 4)
    calls = {
        "keep_24": lambda: keep_24(scores, level),
        "keep_24_transposable": lambda: keep_24_transposable(scores, level),
        "keep_unstructured": lambda: keep_unstructured([scores], Unstructured(), level),
        "keep_layers": lambda: keep_layers([scores], Layers(), level),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"^{name}: level must be in \[0, 1\], got {level}$"):
            call()


@pytest.mark.parametrize("keep", [keep_24, keep_24_transposable])
def test_scores_must_have_two_dimensions(keep):
    message = rf"^{keep.__name__}: scores must have at least two dimensions, got shape \(4,\)$"
    with pytest.raises(ValueError, match=message):
        keep(torch.ones(4))


@pytest.mark.cuda
@pytest.mark.skipif(GPU != "cuda", reason="needs a GPU")
def test_masks_are_made_on_the_device_of_the_scores():
    scores = torch.randint(0, 99, (50, 70, 3)).float()
    on_gpu = scores.cuda()
    for level in (0.4, 1.0):
        pairs = [
            (keep_24(on_gpu, level), keep_24(scores, level)),
            (keep_24_transposable(on_gpu, level), keep_24_transposable(scores, level)),
        ]
        for rule in RULES:
            found = keep_unstructured([on_gpu, on_gpu], rule, level)
            pairs += zip(found, keep_unstructured([scores, scores], rule, level), strict=True)
        for found, expected in pairs:
            assert found.is_cuda and torch.equal(found.cpu(), expected)
