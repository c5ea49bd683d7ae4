"""SparseGPT against optimal brain surgery by explicit inverses, row by row, and against magnitude."""

import math

import pytest
import torch
import torch.nn.functional as F

from sparseops.formats import NM24
from sparseops.prune.sparsegpt import sparsegpt

DAMP = 0.01


def make_hessian(columns, groups=None, samples=None, dtype=torch.float64):
    """The mean of x x^T over inputs that depend on each other."""

    def one():
        mixed = torch.randn(columns, columns, dtype=torch.float64) / columns**0.5
        x = torch.randn(samples or 3 * columns, columns, dtype=torch.float64) @ (mixed + torch.eye(columns))
        return x.t() @ x / len(x)

    return (one() if groups is None else torch.stack([one() for _ in range(groups)])).to(dtype)


def place(shape, c, tap):
    """The place of a channel and tap in a row of a weight of this shape."""
    return (c, *(int(i) for i in torch.unravel_index(torch.tensor(tap), shape[2:]))) if shape[2:] else (c,)


def places(shape):
    """The places of all columns, tap after tap."""
    return [place(shape, c, tap) for tap in range(math.prod(shape[2:])) for c in range(shape[1])]


def quads(shape):
    """The columns of each group of four."""
    channels = range(shape[1])
    return [
        [tap * shape[1] + c for c in channels[start : start + 4]]
        for tap in range(math.prod(shape[2:]))
        for start in range(0, shape[1], 4)
    ]


def damped(hessian, damp):
    """The Hessian as a matrix that has an inverse; columns that are always zero are columns of the unit
    matrix."""
    h = hessian.clone().double()
    diagonal = h.diagonal().tolist()
    alive = [d for d in diagonal if d != 0]
    mean = sum(alive) / len(alive) if alive else 0.0
    for k, d in enumerate(diagonal):
        h[k, k] = d + damp * mean if d != 0 else 1.0
    return h


def reference(weight, hessian, rule=None, mask=None, damp=DAMP, block=128):
    """Rows one by one; each dropped weight is made up for by the inverse of the Hessian of the columns that
    are left."""
    groups = hessian.shape[0] if hessian.ndim == 3 else 1
    hessians = hessian.reshape(groups, *hessian.shape[-2:])
    out, kept = torch.zeros_like(weight), torch.ones(weight.shape, dtype=torch.bool)
    its_places, its_quads = places(weight.shape), quads(weight.shape)
    rows = weight.shape[0] // groups
    for group in range(groups):
        h = damped(hessians[group], damp)
        inverses = [torch.linalg.inv(h[k:, k:]) for k in range(len(h))]
        numbers = range(group * rows, (group + 1) * rows)
        w = torch.tensor([[float(weight[o][p]) for p in its_places] for o in numbers], dtype=torch.float64)
        w[:, hessians[group].diagonal() == 0] = 0.0
        keeps = torch.ones_like(w, dtype=torch.bool)
        if mask is not None:
            keeps = torch.tensor([[bool(mask[o][p]) for p in its_places] for o in numbers])
        for k in range(w.shape[1]):
            if rule == "2:4" and any(quad[0] == k for quad in its_quads):
                quad = next(quad for quad in its_quads if quad[0] == k)
                for r in range(rows):
                    scores = {j: float(w[r, j] ** 2 / inverses[j][0, 0]) for j in quad}
                    for j in sorted(quad, key=lambda j: (-scores[j], j))[2:]:  # noqa: B023
                        keeps[r, j] = False
            elif isinstance(rule, float) and k % block == 0:
                scores = {
                    (r, j): float(w[r, j] ** 2 / inverses[j][0, 0])
                    for r in range(rows)
                    for j in range(k, min(k + block, w.shape[1]))
                }
                for r, j in sorted(scores, key=scores.get)[: math.floor(rule * len(scores) + 1e-9)]:
                    keeps[r, j] = False
            for r in range(rows):
                if not keeps[r, k]:
                    w[r, k:] -= w[r, k].clone() / inverses[k][0, 0] * inverses[k][0]
        for r, o in enumerate(numbers):
            for k, p in enumerate(its_places):
                kept[o][p] = keeps[r, k]
                out[o][p] = w[r, k] if keeps[r, k] else 0.0
    return out, kept


SHAPES = {
    "linear": (6, 24),
    "short": (5, 22),
    "three": (4, 3),
    "conv1d": (4, 6, 3),
    "conv2d": (6, 5, 2, 3),
    "conv3d": (3, 4, 2, 1, 2),
    "one_output": (1, 16),
}


@pytest.mark.parametrize("rule", ["2:4", 0.5, 0.3, 0.0, 0.9])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_is_optimal_brain_surgery(shape, rule):
    weight = torch.randn(shape, dtype=torch.float64)
    hessian = make_hessian(weight[0].numel())
    before = weight.clone(), hessian.clone()
    for block in (8, 128):
        found, mask = sparsegpt(weight, hessian, rule, block=block)
        expected, kept = reference(weight, hessian, rule, block=block)
        assert torch.equal(mask, kept)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert found.shape == weight.shape and found.is_contiguous() and mask.is_contiguous()
        assert torch.equal(weight, before[0]) and torch.equal(hessian, before[1])
        assert (found[~mask] == 0).all()


@pytest.mark.parametrize("rule", ["2:4", 0.5])
@pytest.mark.parametrize("shape", [(6, 8), (9, 6, 3), (6, 5, 2, 2)], ids=str)
def test_groups_have_hessians_of_their_own(shape, rule):
    weight = torch.randn(shape, dtype=torch.float64)
    hessian = make_hessian(weight[0].numel(), groups=3)
    found, mask = sparsegpt(weight, hessian, rule, block=4)
    expected, kept = reference(weight, hessian, rule, block=4)
    assert torch.equal(mask, kept)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    alone = [sparsegpt(part, one, rule, block=4) for part, one in zip(weight.chunk(3), hessian, strict=True)]
    torch.testing.assert_close(found, torch.cat([one for one, _ in alone]), rtol=1e-12, atol=1e-12)
    assert torch.equal(mask, torch.cat([one for _, one in alone]))


@pytest.mark.parametrize("shape", [(6, 24), (4, 6, 3), (4, 3, 2, 2)], ids=str)
def test_a_given_mask_stays_and_the_rest_is_moved(shape):
    weight, given = torch.randn(shape, dtype=torch.float64), torch.rand(shape) < 0.6
    hessian = make_hessian(weight[0].numel())
    found, mask = sparsegpt(weight, hessian, mask=given, block=8)
    assert torch.equal(mask, given)
    expected, _ = reference(weight, hessian, mask=given)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_where_the_first_columns_go_the_rest_is_the_least_squares_solution():
    weight, hessian = torch.randn(7, 20, dtype=torch.float64), make_hessian(20)
    mask = torch.ones(7, 20, dtype=torch.bool)
    mask[:, :9] = False
    found, _ = sparsegpt(weight, hessian, mask=mask, damp=0.0, block=4)
    # (w - w') H = 0 for the columns that are left
    solved = torch.linalg.solve(hessian[9:, 9:], hessian[9:] @ weight.t()).t()
    torch.testing.assert_close(found[:, 9:], solved)


def test_the_block_makes_no_difference_to_groups_of_four():
    weight, hessian = torch.randn(5, 12, 3, 3, dtype=torch.float64), make_hessian(108)
    results = [sparsegpt(weight, hessian, "2:4", block=block) for block in (4, 20, 128)]
    for found, mask in results[1:]:
        assert torch.equal(mask, results[0][1])
        torch.testing.assert_close(found, results[0][0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rule", ["2:4", 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype, rule):
    weight = torch.randn(8, 36, 2).to(dtype)
    hessian = make_hessian(72, dtype=torch.float32)
    found, mask = sparsegpt(weight, hessian, rule)
    expected, kept = reference(weight.double(), hessian.double(), rule)
    assert found.dtype == dtype
    assert torch.equal(mask, kept)
    bound = max(1e-4, torch.finfo(dtype).eps)
    torch.testing.assert_close(found.double(), expected, rtol=bound, atol=bound)
    assert (found[~mask] == 0).all()


def test_autocast_and_gradients_make_no_difference():
    weight, hessian = torch.randn(8, 160, requires_grad=True), make_hessian(160, dtype=torch.float32)
    expected, _ = sparsegpt(weight, hessian, "2:4")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = sparsegpt(weight.t().contiguous().t(), hessian, "2:4")
    assert torch.equal(found, expected)
    assert not found.requires_grad


@pytest.mark.parametrize("rule", ["2:4", 0.5])
def test_inputs_that_are_always_zero_drop(rule):
    weight, hessian = torch.randn(6, 4, 3, dtype=torch.float64), make_hessian(12)
    dead = [0, 1, 2, 5, 10]  # three of the first group
    hessian[dead] = 0
    hessian[:, dead] = 0
    found, mask = sparsegpt(weight, hessian, rule)
    expected, kept = reference(weight, hessian, rule)
    assert torch.equal(mask, kept)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    by_column = found.transpose(1, 2).flatten(1)
    assert (by_column[:, dead] == 0).all()
    if rule == "2:4":  # the one that is left of the first group is kept
        assert (by_column[:, 3] != 0).all()


def test_without_any_input_all_is_zero():
    found, mask = sparsegpt(torch.randn(4, 8), torch.zeros(8, 8), "2:4")
    assert (found == 0).all()
    assert mask.view(4, 2, 4).sum(2).eq(2).all()


def test_infinite_and_nan_weights_are_kept_and_spoil_nothing():
    weight = torch.randn(4, 16)
    weight[0, 1], weight[2, 6] = math.inf, math.nan
    found, mask = sparsegpt(weight, make_hessian(16, dtype=torch.float32), "2:4")
    assert found[0, 1] == math.inf and found[2, 6].isnan() and mask[0, 1] and mask[2, 6]
    assert found.isfinite().sum() == 4 * 16 - 2


# The claim: the outputs change less than those of the largest weights alone


def columns_of_conv(x, channels, kernel, groups, **options):
    """[groups, outputs, taps * channels of a group], by torch's own unfold."""
    unfolded = F.unfold(x, kernel, **options).unflatten(1, (groups, channels // groups, -1))
    return unfolded.permute(1, 0, 4, 3, 2).flatten(3).flatten(1, 2)


def images(channels):
    """Channels and neighbouring pixels that depend on each other."""
    x = torch.randn(16, channels, 9, 9)
    x = F.avg_pool2d(x, 3, 1, 1) + 0.3 * x
    return torch.einsum("nchw,cd->ndhw", x, torch.eye(channels) + torch.randn(channels, channels) / 4).relu()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rule", ["2:4", 0.5, 0.7])
def test_conv_outputs_change_less_than_by_magnitude(rule, groups):
    channels, options = 32, {"stride": 2, "padding": 1}
    weight, x = torch.randn(16, channels // groups, 3, 3), images(channels)
    columns = columns_of_conv(x, channels, 3, groups, **options)
    hessian = columns.transpose(1, 2) @ columns / columns.shape[1]
    found, mask = sparsegpt(weight, hessian, rule)
    if rule == "2:4":
        by_magnitude = NM24.from_dense(weight, prune="magnitude").to_dense()
        NM24.from_dense(found, prune=None)
        assert mask.unflatten(1, (-1, 4)).sum(2).eq(2).all()
    else:
        size = weight.abs().flatten().sort().values[int(rule * weight.numel()) - 1]
        by_magnitude = weight * (weight.abs() > size)
        assert (~mask).sum() == pytest.approx(rule * mask.numel(), abs=8 * groups)

    def error(other):
        return F.conv2d(x, weight - other, groups=groups, **options).norm()

    assert error(found) < 0.9 * error(by_magnitude)
    assert error(found) < 0.9 * error(weight * mask)  # which is not for the mask alone


@pytest.mark.parametrize("rule", ["2:4", 0.5])
def test_linear_outputs_change_less_than_by_magnitude(rule):
    weight = torch.randn(32, 200)
    x = torch.randn(1000, 60) @ torch.randn(60, 200) + 0.3 * torch.randn(1000, 200)
    hessian = x.t() @ x / len(x)
    found, mask = sparsegpt(weight, hessian, rule)
    if rule == "2:4":
        by_magnitude = NM24.from_dense(weight, prune="magnitude").to_dense()
        NM24.from_dense(found, prune=None)
    else:
        by_magnitude = weight * (weight.abs() > weight.abs().median())
    assert mask.float().mean() == pytest.approx(0.5, abs=1e-3)
    error = [((weight - other) @ x.t()).norm() for other in (found, by_magnitude)]
    assert error[0] < 0.8 * error[1]


def test_a_short_last_group_keeps_two():
    for channels in (1, 2, 3, 5, 6, 7):
        weight = torch.randn(4, channels, 2)
        found, mask = sparsegpt(weight, make_hessian(2 * channels), "2:4")
        NM24.from_dense(found, prune=None)
        short = channels % 4
        assert mask[:, channels - short :].sum(1).eq(min(short, 2)).all()
        assert mask[:, : channels - short].unflatten(1, (-1, 4)).sum(2).eq(2).all()


# Errors

W, H = torch.ones(4, 8), torch.eye(8)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((W.int(), H, "2:4"), TypeError, "weight must be a floating-point tensor, got torch.int32"),
        ((W.tolist(), H, "2:4"), TypeError, "weight must be a floating-point tensor, got list"),
        ((W, H.int(), "2:4"), TypeError, "hessian must be a floating-point tensor, got torch.int32"),
        ((W[0], H, "2:4"), ValueError, r"weight must have at least two dimensions .* got shape \(8,\)"),
        ((W[:, :0], H, "2:4"), ValueError, r"weight must have .* one element, got shape \(4, 0\)"),
        (
            (W, H[:4, :4], "2:4"),
            ValueError,
            r"hessian must have shape \(8, 8\) or \(groups, 8, 8\), got \(4, 4\)",
        ),
        ((W, H.expand(1, 1, 8, 8), "2:4"), ValueError, r"hessian must have shape .*, got \(1, 1, 8, 8\)"),
        (
            (W, H.expand(3, 8, 8), "2:4"),
            ValueError,
            "hessian must have groups that divide the 4 outputs, got 3",
        ),
        ((W, H.expand(0, 8, 8), "2:4"), ValueError, "hessian must have groups that divide .*, got 0"),
        ((W, H * math.nan, "2:4"), ValueError, "hessian must be finite, got NaN or infinite elements"),
        (
            (W, H, "4:8"),
            ValueError,
            r"rule must be \"2:4\", or a ratio in \[0, 1\), where no mask is given, got '4:8'",
        ),
        ((W, H, None), ValueError, "rule must be .* got None"),
        ((W, H, True), ValueError, "rule must be .* got True"),
        ((W, H, 1.0), ValueError, r"rule must be .* got 1\.0"),
        ((W, H, -0.1), ValueError, r"rule must be .* got -0\.1"),
        ((W, H, math.nan), ValueError, "rule must be .* got nan"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=f"^sparsegpt: {message}$"):
        sparsegpt(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mask": W}, TypeError, "mask must be a bool tensor, got torch.float32"),
        ({"mask": [[True]]}, TypeError, "mask must be a bool tensor, got list"),
        (
            {"mask": W[:2].bool()},
            ValueError,
            r"mask must have the weight's shape \(4, 8\), got \(2, 8\)",
        ),
        ({"mask": W.bool(), "rule": "2:4"}, ValueError, "rule must be None where a mask is given, got '2:4'"),
        ({"rule": "2:4", "damp": -1}, ValueError, "damp must be at least 0 and finite, got -1"),
        ({"rule": "2:4", "damp": math.inf}, ValueError, "damp must be at least 0 and finite, got inf"),
        ({"rule": "2:4", "block": 6}, ValueError, "block must be a multiple of 4, got 6"),
        ({"rule": "2:4", "block": 0}, ValueError, "block must be a multiple of 4, got 0"),
    ],
)
def test_errors_of_options(arguments, error, message):
    with pytest.raises(error, match=f"^sparsegpt: {message}$"):
        sparsegpt(W, H, **arguments)


def test_a_hessian_of_too_few_inputs_needs_damping():
    hessian = make_hessian(16, samples=5)
    with pytest.raises(
        ValueError, match=r"^sparsegpt: hessian must be positive definite with damp 0\.0 of .* \(raise damp"
    ):
        sparsegpt(torch.randn(4, 16), hessian, "2:4", damp=0.0)
    assert sparsegpt(torch.randn(4, 16), hessian, "2:4")[0].isfinite().all()
