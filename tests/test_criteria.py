"""Scores of weights and channels by each criterion, against loops in float64; evidence, and wrong use."""

import itertools
import math

import numpy as np
import pytest
import torch
from criteria_cases import DTYPES, EVIDENCE, OF_CHANNELS, OF_WEIGHTS, SHAPES, case
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sparseops.prune import CRITERIA, criteria
from sparseops.prune.criteria import score, score_blocks, score_weights


def lamp_by_loops(sizes):
    """Of equal ones the lower index counts as the larger."""
    scores = []
    for i, size in enumerate(sizes):
        above = [other for j, other in enumerate(sizes) if other > size or (other == size and j <= i)]
        scores.append(size**2 / math.fsum(other**2 for other in above) if size else 0.0)
    return scores


def weights_by_loops(name, weight, evidence):
    """Scores of single weights, by plain Python."""
    w = weight.double().flatten().tolist()
    g, x, m = (evidence[key].double().flatten().tolist() for key in ("gradient", "inputs", "movement"))
    n = range(len(w))
    if name in ("l1", "l2"):
        scores = [abs(value) for value in w]
    elif name == "gradient":
        scores = g
    elif name == "taylor":
        scores = [(g[i] * w[i]) ** 2 for i in n]
    elif name == "lamp":
        scores = lamp_by_loops([abs(v) for v in w])
    elif name == "wanda":
        scores = [abs(w[i]) * x[i] for i in n]
    elif name == "movement":
        scores = m
    return torch.tensor(scores, dtype=torch.float64).view(weight.shape)


def channels_by_loops(name, weight, dim, evidence):
    """Scores of channels, by plain Python."""

    def rows(tensor):
        array = tensor.double().numpy()
        return [array.take(c, axis=dim).ravel().tolist() for c in range(array.shape[dim])]

    w = rows(weight)
    g, x, m, s = (rows(evidence[key]) for key in ("gradient", "inputs", "movement", "scale"))
    n = range(len(w))
    if name == "l1":
        scores = [math.fsum(map(abs, row)) for row in w]
    elif name == "l2":
        scores = [math.hypot(*row) for row in w]
    elif name == "gradient":
        scores = [math.hypot(*row) for row in g]
    elif name == "taylor":
        scores = [math.fsum((a * b) ** 2 for a, b in zip(g[c], w[c], strict=True)) for c in n]
    elif name == "fpgm":
        scores = [math.fsum(math.dist(w[c], w[d]) for d in n) for c in n]
    elif name == "lamp":
        scores = lamp_by_loops([math.hypot(*row) for row in w])
    elif name == "wanda":
        scores = [math.fsum(abs(a) * b for a, b in zip(w[c], x[c], strict=True)) for c in n]
    elif name == "movement":
        scores = [math.fsum(row) for row in m]
    elif name == "bn":
        scores = [s[c][0] for c in n]
    return torch.tensor(scores, dtype=torch.float64)


def assert_scores(actual, expected, rtol=1e-5, atol=1e-7):
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol)


# Formulas


@pytest.mark.parametrize("name", OF_WEIGHTS)
@pytest.mark.parametrize(("shape", "dtype"), [*itertools.product(SHAPES, DTYPES)])
def test_scores_of_weights(name, shape, dtype):
    weight, evidence = case(shape, dtype=dtype)
    scores = score_weights(weight, name, evidence)
    assert scores.dtype == torch.float32 and scores.shape == weight.shape
    assert_scores(scores, weights_by_loops(name, weight, evidence))


@pytest.mark.parametrize("name", [*OF_CHANNELS, "bn"])
@pytest.mark.parametrize(("shape", "dtype"), [*itertools.product(SHAPES, DTYPES)])
def test_scores_of_channels(name, shape, dtype):
    weight, evidence = case(shape, dtype=dtype)
    for dim in (0,) if name == "bn" else (0, 1):
        scores = score(weight, dim, name, evidence)
        assert scores.dtype == torch.float64 and scores.device.type == "cpu"
        assert_scores(scores, channels_by_loops(name, weight, dim, evidence))


@pytest.mark.parametrize("name", [name for name in OF_CHANNELS if name != "fpgm"])
def test_channels_in_float64_lose_nothing(name):
    weight = torch.randn(5, 4, 3, dtype=torch.float64)
    evidence = {key: torch.rand(5, 4, 3, dtype=torch.float64) for key in EVIDENCE}
    for dim in (0, 1):
        expected = channels_by_loops(name, weight, dim, evidence)
        assert_scores(score(weight, dim, name, evidence), expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("name", OF_CHANNELS)
def test_views_are_scored_as_their_copies(name):
    """Transposed, sliced and expanded ones, as grouped and transposed convolutions give them."""
    weight, evidence = case((8, 6, 3))

    def view(tensor):
        return tensor.transpose(0, 1)[:, 2:6]

    views = {key: view(value) for key, value in evidence.items()}
    copies = {key: value.contiguous() for key, value in views.items()}
    for dim in (0, 1):
        by_view = score(view(weight), dim, name, views)
        assert_scores(by_view, score(view(weight).contiguous(), dim, name, copies), rtol=1e-7)
    if name in OF_WEIGHTS:
        by_view = score_weights(view(weight), name, views)
        assert_scores(by_view, score_weights(view(weight).contiguous(), name, copies).double(), rtol=1e-6)


@pytest.mark.parametrize("name", OF_CHANNELS)
def test_half_evidence_and_half_weights_do_not_overflow(name):
    weight = torch.full((4, 4), 6e4, dtype=torch.float16)
    weight[0] = 3e4
    evidence = {key: weight.clone() for key in EVIDENCE}
    for dim in (0, 1):
        expected = channels_by_loops(name, weight, dim, evidence)
        assert_scores(score(weight, dim, name, evidence), expected, atol=1e-2)
    if name in OF_WEIGHTS:
        assert_scores(score_weights(weight, name, evidence), weights_by_loops(name, weight, evidence))


@pytest.mark.parametrize("name", ["l1", "l2", "lamp"])
@pytest.mark.parametrize("size", [3e38, 1e-42])
def test_sums_beyond_the_range_of_float32(name, size):
    weight = torch.tensor([[1.0, -0.5, 0.25], [0.125, 1.0, 0.0]]) * size
    _, evidence = case((2, 3))
    assert_scores(score_weights(weight, name), weights_by_loops(name, weight, evidence))
    assert_scores(score(weight, 0, name), channels_by_loops(name, weight, 0, evidence), atol=0.0)


@pytest.mark.parametrize("name", OF_CHANNELS)
def test_a_weight_of_zeros_scores_zero(name):
    evidence = {key: torch.zeros(3, 5) for key in EVIDENCE}
    for dim in (0, 1):
        assert score(torch.zeros(3, 5), dim, name, evidence).tolist() == [0.0] * (3, 5)[dim]
    if name in OF_WEIGHTS:
        assert not score_weights(torch.zeros(3, 5), name, evidence).any()


@pytest.mark.parametrize("name", [*OF_CHANNELS, "bn", "random"])
def test_scores_are_the_same_each_time_and_inputs_as_they_were(name):
    weight, evidence = case((40, 30, 3))
    weight[3, 4, 1] = torch.nan
    before = weight.clone(), {key: value.clone() for key, value in evidence.items()}
    for dim in CRITERIA[name].dims:
        first, second = (
            score_weights(weight, name, evidence) if dim is None else score(weight, dim, name, evidence)
            for _ in range(2)
        )
        assert torch.equal(first, second)
    assert torch.equal(weight.nan_to_num(7.0), before[0].nan_to_num(7.0))
    assert all(torch.equal(evidence[key], before[1][key]) for key in evidence)


def test_scores_carry_no_gradient():
    weight, evidence = case((4, 3))
    weight.requires_grad_()
    for value in evidence.values():
        value.requires_grad_()
    for name in OF_WEIGHTS:
        assert not score_weights(weight, name, evidence).requires_grad
        assert not score(weight, 1, name, evidence).requires_grad


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", [*OF_CHANNELS, "bn", "random"])
def test_scores_on_a_gpu(name):
    weight, evidence = case((300, 200, 3))
    on_gpu = {key: value.cuda() for key, value in evidence.items()}
    for dim in CRITERIA[name].dims:
        if dim is None:
            scores = score_weights(weight.cuda(), name, on_gpu)
            assert scores.is_cuda
            again, expected = (
                score_weights(weight.cuda(), name, on_gpu),
                score_weights(weight, name, evidence),
            )
        else:
            scores = score(weight.cuda(), dim, name, on_gpu)
            again, expected = score(weight.cuda(), dim, name, on_gpu), score(weight, dim, name, evidence)
        assert torch.equal(scores, again)
        assert_scores(scores.cpu(), expected.double(), atol=0.0)


# NaN and infinity


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weight", "evidence"])
@pytest.mark.parametrize("name", [*OF_CHANNELS, "bn", "random"])
def test_nonfinite_ones_score_infinite_and_do_not_count_in_the_others(name, where, bad):
    weight, evidence = case((6, 4, 2))
    evidence = {key: value.clone() for key, value in evidence.items()}
    needs = CRITERIA[name].needs
    if where == "evidence" and not needs:
        pytest.skip("takes no evidence")
    zeroed = weight.clone(), {key: value.clone() for key, value in evidence.items()}
    for row, column in ((2, 1), (5, 3)):
        (weight if where == "weight" else evidence[needs[0]])[row, column, 0] = bad
        for tensor in (zeroed[0], *zeroed[1].values()):
            tensor[row, column, 0] = 0.0
    for dim in CRITERIA[name].dims:
        if dim is None:
            scores, expected = (
                score_weights(weight, name, evidence),
                score_weights(zeroed[0], name, zeroed[1]),
            )
            expected[2, 1, 0] = expected[5, 3, 0] = math.inf
        else:
            scores, expected = score(weight, dim, name, evidence), score(zeroed[0], dim, name, zeroed[1])
            expected[[(2, 5), (1, 3)][dim],] = math.inf
        assert torch.equal(scores, expected)


def test_nan_and_infinite_scores_of_a_function_count_as_the_largest():
    def strange(weight, dim):
        return torch.tensor([math.nan, math.inf, 1.0, -2.0])[(None,) if dim is None else ...]

    expected = [math.inf, math.inf, 1.0, -2.0]
    assert score(torch.ones(4, 2), 0, strange).dtype == torch.float64
    assert score(torch.ones(4, 2), 0, strange).tolist() == expected
    assert score_weights(torch.ones(1, 4), strange).tolist() == [expected]


# Channels of zeros


@pytest.mark.parametrize("name", [*OF_CHANNELS, "bn", "random"])
@pytest.mark.parametrize("shift", [0.0, -5.0, 5.0])
def test_channels_of_zeros_score_less_than_all_others(name, shift):
    """Whatever the evidence, and though of equal channels the lower one is kept."""
    weight, evidence = case((6, 5, 2))
    evidence = {key: value.clone() for key, value in evidence.items()}
    evidence["movement"] += shift
    evidence["gradient"][3], evidence["inputs"][3], evidence["scale"][3] = 0.0, 0.0, 0.0
    for dim in CRITERIA[name].dims:
        if dim is not None:
            pruned = weight.clone()
            pruned.movedim(dim, 0)[[0, 4]] = 0.0
            scores, before = score(pruned, dim, name, evidence), CRITERIA[name](pruned, dim, **evidence)
            others = [c for c in range(len(scores)) if c not in (0, 4)]
            assert scores[0] == scores[4] < scores[others].min()
            assert torch.equal(scores[others], before[others])
            assert scores[0] == 0 or scores[others].min() <= 0


def test_channels_of_zeros_by_functions():
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    assert score(weight, 0, lambda w, dim: torch.tensor([9.0, 3.0, 4.0])).tolist() == [0.0, 3.0, 4.0]
    assert score(weight, 0, lambda w, dim: torch.tensor([9.0, -3.0, 4.0])).tolist() == [-6.0, -3.0, 4.0]
    assert score(weight * 0, 0, lambda w, dim: torch.tensor([9.0, -3.0, 4.0])).tolist() == [9.0, -3.0, 4.0]
    ties = score(weight, 0, lambda w, dim: torch.zeros(3))
    assert ties[0] < 0 == ties[1] == ties[2]
    assert score_blocks(ties[None], 1, "l1").sort().indices[0, 0] == 0


# LAMP


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.sampled_from([1.0, 1e-30, 1e30, 0.1]))
def test_lamp_of_equal_magnitudes(values, scale):
    weight = torch.tensor([values], dtype=torch.float32) * scale
    expected = torch.tensor([lamp_by_loops([abs(float(value)) for value in values])])
    assert_scores(score_weights(weight, "lamp"), expected.double())
    assert_scores(score(weight, 1, "lamp"), expected[0].double(), rtol=1e-6)


def test_lamp_keeps_the_lower_of_equal_weights_in_any_place():
    weight = torch.tensor([[1.0, -1.0], [1.0, 2.0]])
    assert score_weights(weight, "lamp").flatten().tolist() == pytest.approx([1 / 5, 1 / 6, 1 / 7, 1.0])


def test_lamp_of_weights_of_all_sizes():
    weight = torch.logspace(-12, 6, 400, dtype=torch.float64)[torch.randperm(400)].view(20, 20)
    scores = score_weights(weight, "lamp").double()
    torch.testing.assert_close(scores, weights_by_loops("lamp", weight, case((20, 20))[1]), rtol=1e-6, atol=0)


@given(st.integers(2, 200), st.integers(0, 99))
def test_lamp_orders_weights_as_their_magnitudes_do(count, seed):
    weight = torch.randn(1, count, generator=torch.Generator().manual_seed(seed))
    scores = score_weights(weight, "lamp")
    by_score, by_size = scores.argsort(), weight.abs().argsort()
    assert torch.equal(by_score, by_size)
    assert scores.max() == 1.0


class Calls(TorchDispatchMode):
    """What runs under it: pairs of an operation and its first tensor, and the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func.overloadpacket.__name__, args[0] if args else None))
        made = result if isinstance(result, (tuple, list)) else [result]
        self.largest = max([self.largest, *(t.numel() for t in made if isinstance(t, torch.Tensor))])
        return result


def test_lamp_is_one_sort_and_no_cumulative_sum_of_floats():
    """The rounding of such a sum depends on the run, on a GPU."""
    with Calls() as seen:
        score_weights(torch.randn(30, 20), "lamp")
    assert [name for name, _ in seen.calls].count("sort") == 1
    summed = [tensor.dtype for name, tensor in seen.calls if name == "cumsum"]
    assert summed == [torch.int64]


# FPGM


def test_fpgm_makes_no_tensor_of_all_differences():
    weight = torch.randn(40, 8, 3, 3)
    with Calls() as seen:
        score(weight, 0, "fpgm")
    assert seen.largest == 40 * 8 * 9


@pytest.mark.parametrize("chunk", [1, 7 * 12, 1000])
def test_fpgm_in_chunks(monkeypatch, chunk):
    weight, evidence = case((12, 9))
    expected = channels_by_loops("fpgm", weight, 0, evidence)
    monkeypatch.setattr(criteria, "CHUNK", chunk)
    parts = []
    cdist = torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda a, b: parts.append(len(a)) or cdist(a, b))
    assert_scores(score(weight, 0, "fpgm"), expected)
    assert parts == {1: [1] * 12, 84: [7, 5], 1000: [12]}[chunk]


@pytest.mark.parametrize("channels", [6, 60])
def test_fpgm_of_channels_far_from_zero_and_close_together(channels):
    """More than 25 of them are multiplied, where a squared distance is a difference of large numbers."""
    weight = torch.randn(channels, 9, dtype=torch.float64) * 1e-4 + torch.randn(9) * 1000
    _, evidence = case((channels, 9))
    assert_scores(score(weight, 0, "fpgm"), channels_by_loops("fpgm", weight, 0, evidence), atol=0.0)


@pytest.mark.parametrize(("channels", "inputs"), [(5, 30), (26, 30), (257, 127), (1000, 9)])
def test_fpgm_of_equal_channels(channels, inputs):
    weight = torch.randn(channels, inputs)
    assert score(weight[:1].expand(channels, inputs), 0, "fpgm").tolist() == [0.0] * channels
    weight[-1] = weight[channels // 2] = weight[1]
    scores = score(weight, 0, "fpgm")
    assert scores[-1] == scores[channels // 2] == scores[1]


# Random


def test_random_scores_are_settled_by_the_seed_alone():
    weight = torch.randn(20, 30)
    torch.manual_seed(1)
    first = score_weights(weight, "random", {"seed": 5})
    state = torch.get_rng_state()
    torch.manual_seed(2)
    torch.rand(7)
    # Where a model is made on another device, tensors with no device lie there.
    with torch.device("meta"):
        second = score_weights((weight * 3).half(), "random", {"seed": 5})
    assert torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, score_weights(weight, "random", {"seed": 6}))
    assert torch.equal(score_weights(weight, "random"), score_weights(weight, "random", {"seed": 0}))
    assert torch.equal(score(weight, 0, "random"), score(weight, 0, "random", {"seed": 0}))


def test_random_scores_are_uniform_and_others_along_each_dimension():
    weight = torch.ones(2000, 2000)
    scores = [score_weights(weight[:50], "random").flatten(), *(score(weight, d, "random") for d in (0, 1))]
    for values in scores:
        assert 0 <= values.min() and values.max() < 1
        counts = values.double().histc(10) / len(values)
        assert 0.07 < counts.min() and counts.max() < 0.13
    for one, two in itertools.combinations(scores, 2):
        assert abs(np.corrcoef(one[:2000], two[:2000])[0, 1]) < 0.1


@pytest.mark.parametrize("seed", [-(2**63), 2**63, 2**64 - 1])
def test_random_takes_any_seed_of_64_bits(seed):
    assert score(torch.ones(3, 4), 1, "random", {"seed": seed}).shape == (4,)
    assert score_weights(torch.ones(3, 4), "random", {"seed": seed}).shape == (3, 4)
