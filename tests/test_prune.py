"""The pruner: scores of channels and blocks, and which channels ``select`` keeps."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparseops
from sparseops import prune
from sparseops.prune import CRITERIA, Channels, ChannelSet, select
from sparseops.prune.criteria import score, score_blocks


def weight_of(scores, per_channel=3):
    """[channels, per_channel] with these L1 scores."""
    return torch.tensor(scores, dtype=torch.float32).unsqueeze(1).repeat(1, per_channel) / per_channel


def kept(rule, weight, dim=0, groups=1):
    selection = select(rule, [ChannelSet(weight, dim, groups)])[0]
    return list(range(selection.total)) if selection.kept is None else selection.kept.tolist()


# Criteria


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_norms_of_channels(dim, dtype):
    w = torch.randn(6, 5, 3, 2).to(dtype)
    rows = w.double().movedim(dim, 0).flatten(1)
    for name, expected in (("l1", rows.abs().sum(1)), ("l2", rows.square().sum(1).sqrt())):
        scores = CRITERIA[name](w, dim)
        assert scores.dtype == torch.float64
        torch.testing.assert_close(scores, expected)
        assert torch.equal(score(w, dim, name), scores)
    assert CRITERIA["l1"] is prune.l1 and CRITERIA["l2"] is prune.l2


def test_scores_do_not_overflow_and_carry_no_gradient():
    w = torch.full((2, 3), 6e4, dtype=torch.float16, requires_grad=True)
    scores = score(w, 0, "l2")
    assert not scores.requires_grad
    assert scores.tolist() == pytest.approx([math.sqrt(3) * 6e4] * 2)


def test_nan_and_inf_count_as_the_largest():
    w = torch.ones(4, 2)
    w[1, 0], w[2, 1] = float("nan"), -float("inf")
    for name in (name for name, criterion in CRITERIA.items() if 0 in criterion.dims):
        evidence = {key: torch.ones(4, 2) for key in CRITERIA[name].needs}
        assert score(w, 0, name, evidence).isinf().tolist() == [False, True, True, False]
    assert kept(Channels(0.5, block=1, round_to=1), w) == [1, 2]


@pytest.mark.parametrize(
    ("criterion", "found"),
    [
        (lambda w, dim: w.sum(), r"\(\)"),
        (lambda w, dim: w.abs().sum(1 - dim, keepdim=True), r"\(8, 1\)"),
        (lambda w, dim: [1.0] * 8, "list"),
    ],
)
def test_criterion_must_give_one_score_per_channel(criterion, found):
    with pytest.raises(
        ValueError, match=rf"Channels: criterion must give scores of shape \(8,\), got {found}"
    ):
        select(Channels(criterion=criterion, round_to=2), [ChannelSet(torch.ones(8, 4))])


def test_block_scores_order_blocks_as_their_norms_do():
    scores = torch.rand(3, 20, dtype=torch.float64)
    parts = scores.split(8, dim=1)
    by_l1, by_l2 = score_blocks(scores, 8, "l1"), score_blocks(scores, 8, "l2")
    for block, width in enumerate((8, 8, 4)):  # the short block is judged by its mean
        torch.testing.assert_close(by_l1[:, block] * width, parts[block].sum(1))
        torch.testing.assert_close(by_l2[:, block] * math.sqrt(width), parts[block].square().sum(1).sqrt())
    assert torch.equal(score_blocks(scores, 8, lambda w, dim: w), by_l1)


# Channels


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ratio": 1.5}, ValueError, r"Channels: ratio must be in \[0, 1\), got 1.5"),
        ({"ratio": 1}, ValueError, r"Channels: ratio must be in \[0, 1\), got 1"),
        ({"ratio": -0.1}, ValueError, r"Channels: ratio must be in \[0, 1\), got -0.1"),
        ({"ratio": math.nan}, ValueError, r"Channels: ratio must be in \[0, 1\), got nan"),
        ({"ratio": "half"}, TypeError, r"Channels: ratio must be a number, got 'half'"),
        ({"ratio": True}, TypeError, r"Channels: ratio must be a number, got True"),
        (
            {"criterion": "l3"},
            ValueError,
            r"Channels: criterion must be one of l1, .* or a function \(weight, dim\) -> scores, got 'l3'",
        ),
        ({"criterion": 2}, ValueError, r"Channels: criterion must be one of l1, l2, .* got 2"),
        ({"round_to": 0}, ValueError, r"Channels: round_to must be at least 1, got 0"),
        ({"round_to": 8.0}, TypeError, r"Channels: round_to must be an integer, got 8.0"),
        ({"round_to": None}, TypeError, r"Channels: round_to must be an integer, got None"),
        ({"block": -8}, ValueError, r"Channels: block must be at least 1, got -8"),
        ({"block": True}, TypeError, r"Channels: block must be an integer, got True"),
        (
            {"block": 12},
            ValueError,
            r"Channels: block must be a divisor or a multiple of round_to \(8\), got 12",
        ),
        ({"scope": "layer"}, ValueError, r'Channels: scope must be one of "local", "global", got \'layer\''),
        ({"side": "input"}, ValueError, r'Channels: side must be one of "outputs", "inputs", "both", got'),
        ({"then": "1:2"}, ValueError, r'Channels: then must be one of None, "2:4", got \'1:2\''),
        ({"keep_last": 1}, TypeError, r"Channels: keep_last must be True or False, got 1"),
    ],
)
def test_bad_fields(arguments, error, message):
    with pytest.raises(error, match=message):
        Channels(**arguments)


def test_repr_says_the_ratio_and_what_is_not_default():
    assert repr(Channels()) == "Channels(ratio=0.5)"
    rule = Channels(0.25, "l1", 16, "global", 8, "both", "2:4", False)
    assert repr(rule) == (
        "Channels(ratio=0.25, criterion='l1', round_to=16, scope='global', block=8, side='both', then='2:4', "
        "keep_last=False)"
    )
    assert repr(Channels(criterion=prune.l1)) == "Channels(ratio=0.5, criterion=l1)"

    class Gradient:
        def __call__(self, weight, dim):
            return weight

    assert repr(Channels(criterion=Gradient())) == "Channels(ratio=0.5, criterion=Gradient)"


def test_channels_are_values():
    assert Channels() == sparseops.Channels(0.5) and hash(Channels()) == hash(Channels(0.5))
    assert Channels() != Channels(0.25)
    with pytest.raises(AttributeError):
        Channels().ratio = 0.3


# Local scope


def test_weakest_blocks_go():
    scores = [1.0] * 8 + [3.0] * 8 + [2.0] * 8 + [4.0] * 8
    assert kept(Channels(0.5), weight_of(scores)) == [*range(8, 16), *range(24, 32)]
    assert kept(Channels(0.25), weight_of(scores)) == [*range(8, 32)]
    assert kept(Channels(0.5, round_to=16), weight_of(scores)) == [*range(16, 32)]


def test_criteria_differ_on_one_large_weight():
    w = torch.ones(16, 9)
    w[0, 0] = 10.0  # block 0: l1 8 * 9 + 9, l2 sqrt(72 + 99)
    w[8:] = 1.2  # block 1: l1 8 * 9 * 1.2, l2 sqrt(72 * 1.44)
    assert kept(Channels(0.5, "l1"), w) == [*range(8, 16)]
    assert kept(Channels(0.5, "l2"), w) == [*range(8)]
    assert kept(Channels(0.5, lambda w, dim: -w.amax(1 - dim)), w) == [*range(8, 16)]


@pytest.mark.parametrize(
    ("ratio", "blocks"), [(0.5, 5), (0.59, 5), (0.6, 4), (0.9, 1), (0.7, 3), (0.1, 9), (1 / 3, 7)]
)
def test_ratio_is_rounded_down_to_blocks(ratio, blocks):
    assert len(kept(Channels(ratio), torch.rand(80, 4))) == 8 * blocks


@pytest.mark.parametrize("scope", ["local", "global"])
def test_lower_channels_win_ties(scope):
    assert kept(Channels(0.5, scope=scope), torch.ones(64, 3)) == [*range(32)]
    assert kept(Channels(0.5, scope=scope, block=1), torch.ones(64, 3)) == [*range(32)]


def test_ratio_that_rounds_below_a_whole_number():
    assert 0.29 * 100 < 29
    assert len(kept(Channels(0.29, round_to=1), torch.rand(100, 3))) == 71


def test_single_channels_leave_a_multiple():
    w = weight_of([float(c % 5) for c in range(40)])
    picked = kept(Channels(0.5, block=1), w)
    assert len(picked) == 24  # 20 is no multiple of 8
    assert sum(c % 5 == 4 for c in picked) == 8 and sum(c % 5 == 0 for c in picked) == 0
    assert len(kept(Channels(0.5, block=1), w[:20])) == 16
    assert len(kept(Channels(0.1, block=1), w[:20])) == 20


def test_blocks_narrower_than_the_multiple():
    scores = [5.0] * 8 + [1.0] * 8 + [2.0] * 8 + [4.0] * 8
    w = weight_of(scores)
    assert kept(Channels(0.5, round_to=16, block=8), w) == [*range(8), *range(24, 32)]
    assert kept(Channels(0.3, round_to=16, block=8), w) == [*range(32)]


def test_blocks_wider_than_the_multiple():
    w = weight_of([5.0] * 8 + [1.0] * 8 + [2.0] * 8 + [5.0] * 8)
    assert kept(Channels(0.5, block=16), w) == [*range(16, 32)]


@pytest.mark.parametrize(
    ("tail", "local", "globally"), [(3.0, [*range(8, 20)], [*range(20)]), (0.5, [*range(16)], [*range(16)])]
)
def test_short_last_block_is_judged_by_its_mean(tail, local, globally):
    w = weight_of([1.0] * 8 + [2.0] * 8 + [tail] * 4)
    assert kept(Channels(1 / 3), w) == local  # of 3 blocks
    assert kept(Channels(1 / 3, scope="global"), w) == globally  # of 20 channels, so that no 8 can go


def test_inputs_are_scored_over_the_filters_of_their_group():
    w = torch.zeros(8, 16, 3, 3)  # two groups of four filters that read 16 inputs each
    w[:4, :8], w[:4, 8:] = 1.0, 2.0
    w[4:, :8], w[4:, 8:] = 4.0, 3.0
    assert kept(Channels(0.5), w, dim=1, groups=2) == [*range(8, 16), *range(16, 24)]
    assert kept(Channels(0.5), w, dim=1) == [*range(8)]


def test_each_group_drops_as_many_outputs():
    scores = torch.arange(1.0, 65.0)
    w = scores.view(64, 1).repeat(1, 4)
    picked = kept(Channels(0.5), w, groups=2)
    assert picked == [*range(16, 32), *range(48, 64)]
    assert kept(Channels(0.5), w) == [*range(32, 64)]


@pytest.mark.parametrize(("third", "width"), [((1.0, 5.0), 12), ((5.0, 1.0), 16)])
def test_short_last_block_goes_in_all_groups_or_in_none(third, width):
    """A third group sides with one of two that disagree on whether the middle or the last block goes."""
    groups = [[9.0] * 8 + [middle] * 8 + [last] * 4 for middle, last in ((5.0, 1.0), (1.0, 5.0), third)]
    picked = kept(Channels(1 / 3), weight_of(sum(groups, [])), groups=3)
    local = [*range(8), *range(16, 20)] if width == 12 else [*range(16)]
    assert picked == [20 * group + channel for group in range(3) for channel in local]


@given(
    widths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    groups=st.sampled_from([1, 1, 2, 3]),
    ratio=st.floats(0, 0.99),
    block=st.sampled_from([None, 1, 2, 4, 8, 16]),
    round_to=st.sampled_from([1, 8, 16]),
    scope=st.sampled_from(["local", "global"]),
    dim=st.sampled_from([0, 1]),
)
def test_what_always_holds(widths, groups, ratio, block, round_to, scope, dim):
    rule = Channels(ratio, round_to=round_to, block=block, scope=scope)
    sets = []
    for seed, width in enumerate(widths):
        shape = (width * groups, 5) if dim == 0 else (2 * groups, width)
        sets.append(ChannelSet(torch.rand(shape, generator=torch.manual_seed(seed)), dim, groups))
    selections = select(rule, sets)
    unit = max(rule.width, round_to)
    for width, selection in zip(widths, selections, strict=True):
        assert selection.total == width * groups
        index = torch.arange(selection.total) if selection.kept is None else selection.kept
        assert selection.count == len(index) >= 1
        assert (selection.kept is None) <= bool(selection.note)
        assert torch.equal(index, index.unique())
        by_group = [index[index // width == group] % width for group in range(groups)]
        assert len({len(local) for local in by_group}) == 1, "groups are balanced"
        for local in by_group:
            blocks = local.unique_consecutive() // rule.width
            whole = [
                c for b in blocks.unique() for c in range(b * rule.width, min((b + 1) * rule.width, width))
            ]
            assert local.tolist() == whole, "blocks go as a whole"
            is_all = len(local) == width
            assert is_all or len(blocks.unique()) % (unit // rule.width) == 0
    dropped = sum(s.total - s.count for s in selections)
    if scope == "global":
        assert dropped <= ratio * sum(s.total for s in selections) + 1e-6
    if ratio == 0:
        assert not dropped


def test_a_step_never_overtakes_an_earlier_one():
    """The first group holds up the others; the short last block is weaker than what goes before it."""
    groups = [[99.0] * 8 + [50.0] * 8 + [1.0] * 4] + [[99.0] * 8 + [1.0] * 8 + [1.5] * 4] * 2
    w = weight_of(sum(groups, []))
    picked = kept(Channels(0.6, scope="global"), w, groups=3)
    assert picked == [20 * group + channel for group in range(3) for channel in range(8)]


# Notes


def note(rule, weight, **options):
    return select(rule, [ChannelSet(weight, **options)])[0].note


@pytest.mark.parametrize("scope", ["local", "global"])
def test_layer_that_keeps_all_is_told_why(scope):
    w = torch.rand(64, 8)
    assert note(Channels(0, scope=scope), w) == "ratio is 0"
    assert note(Channels(0.5, scope=scope), w[:8]) == "8 channels are no more than one block of 8"
    assert note(Channels(0.5, scope=scope), w[:3]) == "3 channels are no more than one block of 8"
    assert note(Channels(0.5, scope=scope, round_to=16, block=8), w[:10], groups=1) == (
        "10 channels are no more than one block of 16"
    )
    assert note(Channels(0.5, scope=scope), w, groups=8) == (
        "8 channels per group are no more than one block of 8"
    )
    assert note(Channels(0.5, scope=scope), w) == ""


def test_ratio_smaller_than_a_block_is_told():
    assert note(Channels(0.2), torch.rand(32, 8)) == "ratio 0.2 of 4 blocks of 8 is none that can go"


@pytest.mark.parametrize(("ratio", "is_said"), [(0.99, True), (0.8, True), (0.75, False)])
def test_layer_that_would_lose_all_keeps_one_block(ratio, is_said):
    w = weight_of([1.0] * 8 + [3.0] * 8 + [2.0] * 8 + [1.0] * 8)
    selection = select(Channels(ratio), [ChannelSet(w)])[0]
    assert selection.kept.tolist() == [*range(8, 16)]
    assert selection.note == (
        f"one block of 8 is kept, more than ratio {ratio:g} would leave" if is_said else ""
    )


# Global scope


def test_blocks_of_all_layers_compete():
    a = weight_of([1.0] * 8 + [1.1] * 8 + [1.2] * 8 + [0.7] * 8)  # mean 1
    b = weight_of([10.0] * 8 + [1.0] * 8 + [28.0] * 8 + [1.0] * 8) * 10  # mean 10, then 10 times that
    one, two = select(Channels(0.375, scope="global"), [ChannelSet(a), ChannelSet(b)])
    # relative scores: a 1, 1.1, 1.2, 0.7; b 1, 0.1, 2.8, 0.1
    assert one.kept.tolist() == [*range(24)]
    assert two.kept.tolist() == [*range(8), *range(16, 24)]
    one, two = select(Channels(0.5, scope="global"), [ChannelSet(a), ChannelSet(b)])
    assert one.kept.tolist() == [*range(24)], "of equal scores the later layer goes first"
    assert two.kept.tolist() == [*range(16, 24)]
    assert (one.note, two.note) == ("", "")


def test_infinite_scores_do_not_make_the_rest_of_a_layer_worthless():
    a, b = weight_of([1.0] * 24 + [float("nan")] * 8), weight_of([1.0] * 8 + [0.5] * 8 + [1.0] * 8)
    one, two = select(Channels(0.2, scope="global"), [ChannelSet(a), ChannelSet(b)])
    assert one.kept is None
    assert two.kept.tolist() == [*range(8), *range(16, 24)]


def test_layer_whose_blocks_matter_more_keeps_them_and_is_told():
    uneven, even = weight_of([8.0] + [0.0] * 7, 1), weight_of([1.0] * 8, 1)
    rule = Channels(0.25, scope="global", round_to=1, block=1)
    one, two = select(rule, [ChannelSet(uneven), ChannelSet(even)])
    assert one.count == 4
    assert two.kept is None and two.note == "blocks of other layers matter less"


def test_layer_that_would_lose_all_to_others_keeps_one_block_and_is_told():
    weak, strong = (
        weight_of([0.0] * 16 + [2.0] * 8),
        weight_of([1.0] * 80),
    )  # relative: 0, 0, 3 and ten times 1
    weak_last = weight_of([1.0] * 24)
    one, two = select(Channels(0.8, scope="global"), [ChannelSet(weak), ChannelSet(strong)])  # 83 of 104
    assert one.kept.tolist() == [*range(16, 24)] and one.note == ""
    assert two.count == 16 and two.note == ""
    one, two = select(Channels(0.8, scope="global"), [ChannelSet(strong), ChannelSet(weak_last)])
    assert one.count == 16 and one.note == ""
    assert two.count == 8
    assert two.note == "one block of 8 is kept, more than ratio 0.8 would leave"


def test_block_that_does_not_fit_is_passed_over():
    wide = ChannelSet(torch.ones(64, 4), groups=4)  # a step takes 8 channels of each of the four groups
    narrow = ChannelSet(torch.ones(32, 4) * torch.tensor([1.0, 1, 1, 1]))
    one, two = select(Channels(0.25, scope="global"), [wide, narrow])  # 24 channels
    assert one.kept is None
    assert two.count == 8


def test_then_24_leaves_inputs_in_multiples_of_32():
    w = torch.rand(96, 96)
    rule = Channels(0.5, then="2:4")
    assert len(kept(rule, w, dim=1)) == 64
    assert len(kept(rule, w, dim=0)) == 48
    assert note(rule, w[:, :32], dim=1) == "32 channels are no more than one block of 32"
    assert len(kept(Channels(0.5, then="2:4", round_to=24), torch.rand(4, 192), dim=1)) == 96


def test_selection_does_not_depend_on_the_run():
    sets = [ChannelSet(torch.rand(40, 6, generator=torch.manual_seed(seed))) for seed in range(3)]
    for scope, criterion in itertools.product(("local", "global"), ("l1", "l2")):
        rule = Channels(0.5, criterion, scope=scope)
        first, second = select(rule, sets), select(rule, sets)
        for one, two in zip(first, second, strict=True):
            assert torch.equal(one.kept, two.kept)
