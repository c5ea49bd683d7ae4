"""The rules of a plan beside ratios of channels: ``Unstructured`` and ``Layers``, thresholds and least counts
of ``Channels``, criteria that the pruner chooses, and the evidence that they judge by."""

import copy
import math
import pickle

import pytest
import torch

from sparseops import prune
from sparseops.prune import Channels, ChannelSet, Layers, Plan, Unstructured, select


def weight_of(scores, per_channel=3):
    """[channels, per_channel] with these l1 scores."""
    return torch.tensor(scores, dtype=torch.float32).unsqueeze(1).repeat(1, per_channel) / per_channel


def pick(rule, *sets):
    """What is kept of each set, and the notes."""
    found = select(rule, [its if isinstance(its, ChannelSet) else ChannelSet(its) for its in sets])
    kept = [list(range(its.total)) if its.kept is None else its.kept.tolist() for its in found]
    return kept, [its.note for its in found]


# Fields

AMOUNTS = [
    ({"ratio": 1.0}, ValueError, r"ratio must be in \[0, 1\), got 1.0"),
    ({"ratio": -0.1}, ValueError, r"ratio must be in \[0, 1\), got -0.1"),
    ({"ratio": math.nan}, ValueError, r"ratio must be in \[0, 1\), got nan"),
    ({"ratio": "half"}, TypeError, r"ratio must be a number, got 'half'"),
    ({"ratio": True}, TypeError, r"ratio must be a number, got True"),
    ({"threshold": -1}, ValueError, r"threshold must be at least 0 and finite, got -1"),
    ({"threshold": math.inf}, ValueError, r"threshold must be at least 0 and finite, got inf"),
    ({"threshold": math.nan}, ValueError, r"threshold must be at least 0 and finite, got nan"),
    ({"threshold": "l1"}, TypeError, r"threshold must be a number, got 'l1'"),
    ({"threshold": False}, TypeError, r"threshold must be a number, got False"),
    ({"criterion": "l3"}, ValueError, r"criterion must be one of l1, l2, .* or a function .*, got 'l3'"),
    ({"criterion": 1}, ValueError, r"criterion must be one of l1, l2, .* or a function .*, got 1"),
]


@pytest.mark.parametrize("rule", [Channels, Unstructured, Layers])
@pytest.mark.parametrize(("arguments", "error", "message"), AMOUNTS)
def test_bad_amounts(rule, arguments, error, message):
    with pytest.raises(error, match=f"^{rule.__name__}: {message}$"):
        rule(**arguments)


@pytest.mark.parametrize(
    ("rule", "arguments", "error", "message"),
    [
        (Channels, {"min_kept": 0}, ValueError, r"min_kept must be at least 1, got 0"),
        (Channels, {"min_kept": 8.0}, TypeError, r"min_kept must be an integer, got 8.0"),
        (Channels, {"threshold": 1, "together": True}, ValueError, r"threshold must be None with .*, got 1"),
        (
            Channels,
            {"criterion": "bn", "side": "inputs"},
            ValueError,
            r'criterion "bn" scores output channels .*',
        ),
        (
            Channels,
            {"criterion": "bn", "side": "both"},
            ValueError,
            r'criterion "bn" scores output channels .*',
        ),
        (
            Channels,
            {"criterion": "sparsegpt"},
            ValueError,
            r'criterion "sparsegpt" scores single weights only.*',
        ),
        (Unstructured, {"criterion": "fpgm"}, ValueError, r'criterion "fpgm" scores .* only, got .*'),
        (
            Unstructured,
            {"scope": "layer"},
            ValueError,
            r'scope must be one of "local", "global", "row", got .*',
        ),
        (Unstructured, {"min_kept": 1.1}, ValueError, r"min_kept must be in \[0, 1\], got 1.1"),
        (Unstructured, {"min_kept": -0.1}, ValueError, r"min_kept must be in \[0, 1\], got -0.1"),
        (Unstructured, {"min_kept": None}, TypeError, r"min_kept must be a number, got None"),
        (Layers, {"criterion": "bn"}, ValueError, r'criterion "bn" scores output channels only.*'),
        (Layers, {"min_kept": -1}, ValueError, r"min_kept must be at least 0, got -1"),
        (Layers, {"min_kept": 0.5}, TypeError, r"min_kept must be an integer, got 0.5"),
    ],
)
def test_bad_fields(rule, arguments, error, message):
    with pytest.raises(error, match=f"^{rule.__name__}: {message}$"):
        rule(**arguments)


def test_repr_says_how_much_and_what_is_not_default():
    def size(weight, dim):
        return weight

    assert repr(Unstructured()) == "Unstructured(ratio=0.5)"
    rule = Unstructured(0.9, "taylor", "global", min_kept=0.05)
    assert repr(rule) == "Unstructured(ratio=0.9, criterion='taylor', scope='global', min_kept=0.05)"
    assert (
        repr(Unstructured(threshold=1e-3, criterion=size)) == "Unstructured(threshold=0.001, criterion=size)"
    )
    assert repr(Layers(0.25, min_kept=2)) == "Layers(ratio=0.25, min_kept=2)"
    assert repr(Layers(threshold=0)) == "Layers(threshold=0)"
    rule = Channels(threshold=0.25, min_kept=16, criterion="l2")
    assert repr(rule) == "Channels(threshold=0.25, criterion='l2', min_kept=16)"


@pytest.mark.parametrize("rule", [Channels(0.25), Unstructured(0.25), Layers(0.25)])
def test_rules_are_values(rule):
    same = pickle.loads(pickle.dumps(rule))
    assert same == rule == copy.deepcopy(rule) and hash(same) == hash(rule)
    assert rule != type(rule)() and rule != type(rule)(0.25, "l1")
    with pytest.raises(AttributeError):
        rule.ratio = 0.3


def test_plan_takes_all_of_them():
    rules = {
        "a": Unstructured(0.9),
        "b": Layers(),
        "c": "2:4t",
        "d": "2:4",
        "e": Channels(threshold=0.5),
        "*": None,
    }
    assert repr(Plan(rules)) == (
        "Plan({'a': Unstructured(ratio=0.9), 'b': Layers(ratio=0.5), 'c': '2:4t', 'd': '2:4', "
        "'e': Channels(threshold=0.5), '*': None})"
    )
    with pytest.raises(
        TypeError, match=r"Plan: rules\['a'\] must be a Channels, Unstructured, Layers, .* got <class"
    ):
        Plan({"a": Unstructured})


# The criterion that counts


def test_channels_without_a_criterion_go_by_l2():
    w = torch.ones(16, 9)
    w[0, 0] = 10.0  # block 0: l1 8 * 9 + 9, l2 sqrt(72 + 99)
    w[8:] = 1.2  # block 1: l1 8 * 9 * 1.2, l2 sqrt(72 * 1.44)
    assert pick(Channels(), w) == pick(Channels(criterion="l2"), w) != pick(Channels(criterion="l1"), w)
    assert Channels().criterion is None and Channels().judge == Channels().criterion_name == "l2"
    assert (
        Channels(criterion=prune.l1).judge is prune.l1 and Channels(criterion=prune.l1).criterion_name == "l1"
    )
    assert Channels(criterion=lambda w, dim: w).criterion_name == "<lambda>"


# Thresholds of channels

SCORES = [1.0] * 8 + [3.0] * 8 + [2.0] * 8 + [4.0] * 8


@pytest.mark.parametrize(
    ("threshold", "blocks"),
    [(0, [0, 1, 2, 3]), (0.99, [0, 1, 2, 3]), (1, [1, 2, 3]), (2.5, [1, 3]), (3.0, [3]), (9, [3])],
)
@pytest.mark.parametrize("scope", ["local", "global"])
def test_blocks_at_most_the_threshold_go(threshold, blocks, scope):
    rule = Channels(0.0, "l1", threshold=threshold, scope=scope)
    expected = [c for block in blocks for c in range(8 * block, 8 * block + 8)]
    other = weight_of([100.0] * 64)
    (kept, all_of_other), _ = pick(rule, weight_of(SCORES, 4), other)
    assert kept == expected
    assert all_of_other == list(range(64)), "a threshold is the same for all sets"


def test_threshold_is_in_the_scores_of_the_criterion():
    w = torch.cat([torch.full((8, 4), 1.0), torch.full((8, 4), 2.0)])  # l1 4 and 8, l2 2 and 4
    assert pick(Channels(threshold=3.0), w)[0] == [[*range(8, 16)]]
    assert pick(Channels(threshold=3.0, criterion="l1"), w)[0] == [[*range(16)]]
    short = torch.cat([w, torch.ones(3, 4)])
    assert pick(Channels(threshold=3.0), short)[0] == [[*range(8, 16)]]


def test_notes_of_thresholds():
    w = weight_of(SCORES)
    assert pick(Channels(threshold=0.5, criterion="l1"), w)[1] == [
        "threshold 0.5 of 4 blocks of 8 is none that can go"
    ]
    assert pick(Channels(threshold=9, criterion="l1"), w)[1] == [
        "one block of 8 is kept, more than threshold 9 would leave"
    ]
    assert pick(Channels(threshold=3.0, criterion="l1"), w)[1] == [""]


def test_groups_lose_as_many_blocks_below_the_threshold():
    few, many = [1.0] * 8 + [5.0] * 24, [1.0] * 24 + [5.0] * 8
    w = weight_of(few + many)
    kept, _ = pick(Channels(threshold=2.0, criterion="l1"), ChannelSet(w, groups=2))
    # of equal blocks the last one goes
    assert kept == [[*range(8, 32), *range(32, 48), *range(56, 64)]]
    assert pick(Channels(threshold=0.5, criterion="l1"), ChannelSet(w, groups=2))[0] == [[*range(64)]]


def test_short_block_stays_where_one_group_needs_it():
    """It goes in all groups or in none, and goes first here for the sake of the first group."""
    w = weight_of([5.0] * 16 + [1.0] * 4 + [1.0] * 16 + [9.0] * 4)
    assert pick(Channels(threshold=2.0, criterion="l1"), ChannelSet(w, groups=2))[0] == [[*range(40)]]


def test_threshold_leaves_a_multiple():
    rule = Channels(threshold=2.5, criterion="l1", round_to=16, block=8)
    assert pick(rule, weight_of(SCORES))[0] == [[*range(8, 16), *range(24, 32)]]
    assert pick(Channels(threshold=1.5, criterion="l1", round_to=16, block=8), weight_of(SCORES))[0] == [
        [*range(32)]
    ]


# The least that is kept


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize(
    ("least", "count"), [(1, 8), (8, 8), (9, 16), (16, 16), (17, 24), (25, 32), (99, 32)]
)
def test_a_layer_keeps_its_least(scope, least, count):
    weak, strong = weight_of([1.0] * 16 + [2.0] * 8 + [3.0] * 8), weight_of([50.0] * 32)
    rule = Channels(0.8, "l1", scope=scope, min_kept=least)
    kept, _ = pick(rule, weak, strong) if scope == "local" else pick(rule, weak)
    assert len(kept[0]) == count
    assert kept[0][-8:] == [*range(24, 32)]
    assert len(pick(Channels(threshold=9, criterion="l1", min_kept=least), weak)[0][0]) == count


def test_what_one_layer_has_to_keep_others_lose():
    uneven = weight_of([1.0] * 56 + [99.0] * 8)
    even = weight_of([5.0] * 64)
    free, _ = pick(Channels(0.5, "l1", scope="global"), uneven, even)
    assert [len(kept) for kept in free] == [8, 56]
    held, notes = pick(Channels(0.5, "l1", scope="global", min_kept=40), uneven, even)
    assert [len(kept) for kept in held] == [40, 40]
    assert notes == ["min_kept 40 channels are kept, more than ratio 0.5 would leave"] * 2


def test_notes_of_the_least():
    w = weight_of(SCORES)
    assert pick(Channels(0.75, min_kept=16), w)[1] == [
        "min_kept 16 channels are kept, more than ratio 0.75 would leave"
    ]
    assert pick(Channels(0.5, min_kept=16), w)[1] == [""]
    assert pick(Channels(0.5, min_kept=25), w)[1] == ["min_kept 25 of 32 leaves none that can go"]


def test_least_counts_the_channels_of_all_groups_but_not_of_other_layers():
    grouped = ChannelSet(weight_of(SCORES * 2), groups=2)
    assert len(pick(Channels(0.75, min_kept=17), grouped)[0][0]) == 32
    assert len(pick(Channels(0.75, min_kept=16), grouped)[0][0]) == 16
    together = ChannelSet(weight_of(SCORES), others=(ChannelSet(weight_of(SCORES)),))
    assert len(pick(Channels(0.75, min_kept=9), together)[0][0]) == 16


# Evidence


def evidence_of(weight, **blocks):
    """Evidence of the weight's shape that is the same within each block of eight channels."""
    return {
        key: torch.tensor(values).repeat_interleave(8).view(-1, *[1] * (weight.dim() - 1)).expand_as(weight)
        for key, values in blocks.items()
    }


def test_criteria_judge_by_the_evidence_of_their_set():
    w = torch.ones(16, 4)
    for name, key in (("taylor", "gradient"), ("bn", "scale"), ("wanda", "inputs"), ("movement", "movement")):
        for first, second, kept in ((1.0, 2.0, [*range(8, 16)]), (2.0, 1.0, [*range(8)])):
            channels = ChannelSet(w, evidence=evidence_of(w, **{key: [first, second]}))
            assert pick(Channels(criterion=name), channels)[0] == [kept], name
    with pytest.raises(
        ValueError, match=r'Channels: criterion "taylor" must have evidence "gradient", got none'
    ):
        select(Channels(criterion="taylor"), [ChannelSet(w)])


def test_evidence_of_inputs_is_that_of_their_group():
    w = torch.ones(8, 16, 3)  # two groups of four filters with sixteen inputs each
    gradient = torch.ones(8, 16, 3)
    gradient[:4, :8] = 9.0
    gradient[4:, 8:] = 9.0
    channels = ChannelSet(w, 1, 2, evidence={"gradient": gradient, "seed": 3})
    assert pick(Channels(criterion="taylor", side="inputs"), channels)[0] == [[*range(8), *range(24, 32)]]
    large, small = [4 * 3 * 81.0] * 8, [4 * 3 * 1.0] * 8
    expected = torch.tensor([large + small, small + large], dtype=torch.float64)
    torch.testing.assert_close(channels.scores("taylor"), expected)


def test_sets_that_lose_the_same_are_judged_by_their_own_evidence():
    w = torch.ones(16, 4)
    weak, strong = (
        ChannelSet(w, evidence=evidence_of(w, gradient=[1.0, 1.1])),
        ChannelSet(w, evidence=evidence_of(w, gradient=[9.0, 1.0])),
    )
    both = ChannelSet(w, evidence=weak.evidence, others=(strong,))
    assert pick(Channels(criterion="taylor"), weak)[0] == [[*range(8, 16)]]
    assert pick(Channels(criterion="taylor"), both)[0] == [[*range(8)]]
