"""How much a weight or a channel matters: one score for each, the larger the more.

A criterion is a function of a weight [O, C, *taps] and of the dimension that the channels lie along, None for
a score of every weight. It may be any such function; those with a name here can also use *evidence*: what
calibration batches or training have shown, a dict of tensors of the weight's shape:

    "gradient"  root mean square over the batches of dloss/dw
    "inputs"    Euclidean norm, over all tokens, pixels and batches, of the input that the weight multiplies
    "scale"     magnitude of the scale of the batch norm behind the layer, equal within an output channel
    "movement"  -sum over the training steps of w dloss/dw

and "seed", a whole number for "random". A new criterion is a function here, under ``_named``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Criterion: TypeAlias = Callable[[Tensor, "int | None"], Tensor]
"""(weight [O, C, *taps], dim) -> scores [weight.shape[dim]]; of the weight's shape where dim is None"""

Evidence: TypeAlias = Mapping[str, Any]
"""What is known of a weight, by the keys above."""

NO_EVIDENCE: Evidence = {}

SOURCES = {
    "gradient": "from calibration batches and a loss",
    "inputs": "from calibration batches",
    "scale": "where a batch norm reads the layer's output",
    "movement": "from steps of training, or calibration batches and a loss",
    "hessian": "from calibration batches",
}
"""Where evidence comes from."""

SCORED = {None: "single weights", 0: "output channels", 1: "input channels"}
"""What is scored along a dimension."""

TINY = torch.finfo(torch.float64).tiny
"""Next to nothing, but not zero."""

CHUNK = 2**24
"""Distances between channels that are computed at once."""


class Named:
    """A criterion that has a name: ``named(weight, dim=None, **evidence) -> scores``.

    A weight that is NaN or infinite, or of which the evidence is, scores infinite, as does a channel that
    holds one; in the scores of the others it counts as zero.

    Attributes:
        needs: the evidence without which it gives no scores.
        dims: what it can score: None for single weights, 0 for output channels, 1 for input channels.
        order: p, where the score of some channels as one is the p-mean of theirs.
    """

    __name__: str

    def __init__(
        self,
        fn: Callable[..., Tensor],
        needs: tuple[str, ...] = (),
        dims: tuple[int | None, ...] = (None, 0, 1),
        order: int = 1,
    ) -> None:
        functools.update_wrapper(self, fn)
        self.fn = fn
        self.needs = needs
        self.dims = dims
        self.order = order

    def __repr__(self) -> str:
        return self.__name__

    def __reduce__(self) -> str:
        return self.__name__

    def __call__(self, weight: Tensor, dim: int | None = None, **evidence: Any) -> Tensor:
        """Scores of the weight's shape, or [weight.shape[dim]] in float64, on the weight's device.

        Raises:
            ValueError: it does not score weights, or not these channels; or evidence is missing or is not of
                the weight's shape.
        """
        caller = _caller(dim)
        check_criterion(self, caller, (dim,))
        used = {key: self._evidence(caller, key, weight, evidence) for key in self.needs}
        bad = ~weight.isfinite()
        for value in used.values():
            bad |= ~value.isfinite()
        if not bad.any():
            return self.fn(weight, dim, **{**evidence, **used})
        zeroed = {key: value.masked_fill(bad, 0) for key, value in used.items()}
        scores = self.fn(weight.masked_fill(bad, 0), dim, **{**evidence, **zeroed})
        return scores.masked_fill(bad if dim is None else bad.movedim(dim, 0).flatten(1).any(1), torch.inf)

    def _evidence(self, caller: str, key: str, weight: Tensor, evidence: Evidence) -> Tensor:
        if key not in evidence:
            raise ValueError(
                f'{caller}: criterion "{self.__name__}" must have evidence "{key}", got none; '
                f"sparseops.Pruner gathers it {SOURCES[key]}, and sparseops.convert takes what it has pruned"
            )
        value: Tensor = evidence[key]
        if value.shape != weight.shape:
            raise ValueError(
                f'{caller}: evidence "{key}" must have the shape of the weight, {tuple(weight.shape)}, '
                f"got {tuple(value.shape)}"
            )
        return value


CRITERIA: dict[str, Named] = {}
"""The criteria that have a name."""


def _named(**options: Any) -> Callable[[Callable[..., Tensor]], Named]:
    def enter(fn: Callable[..., Tensor]) -> Named:
        return CRITERIA.setdefault(fn.__name__, Named(fn, **options))

    return enter


@_named()
def l1(weight: Tensor, dim: int | None = None, **evidence: Any) -> Tensor:
    """Magnitudes: ``|w|`` of a weight, ``s[c] = sum |w[c]|`` of a channel; Li et al. 2017, "Pruning filters
    for efficient ConvNets"."""
    return _magnitudes(weight, dim, 1)


@_named(order=2)
def l2(weight: Tensor, dim: int | None = None, **evidence: Any) -> Tensor:
    """Euclidean lengths: ``|w|`` of a weight, ``s[c] = sqrt(sum w[c]^2)`` of a channel. Of all choices of as
    many channels, those with the largest scores keep most of the squared weight."""
    return _magnitudes(weight, dim, 2)


@_named(needs=("gradient",), order=2)
def gradient(weight: Tensor, dim: int | None = None, **evidence: Any) -> Tensor:
    """Length of the gradient, with g its root mean square over batches: ``g`` of a weight, ``s[c] =
    sqrt(sum g[c]^2)`` of a channel; the diagonal of the empirical Fisher information, under the
    root (Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning")."""
    return _magnitudes(evidence["gradient"], dim, 2)


@_named(needs=("gradient",))
def taylor(weight: Tensor, dim: int | None = None, **evidence: Any) -> Tensor:
    """How the squared loss changes without it, to first order: ``(g w)^2`` of a weight, with g the root mean
    square of its gradient, and the sum of these of a channel; Molchanov et al. 2019, "Importance estimation
    for neural network pruning", equation 8."""
    change = _wide(weight) * _wide(evidence["gradient"])
    return change.square() if dim is None else _norm(change, dim, 2).square()


@_named(needs=("scale",), dims=(0,))
def bn(weight: Tensor, dim: int | None = None, **evidence: Any) -> Tensor:
    """Magnitude of the scale that the batch norm behind the layer gives an output channel, ``s[c] =
    |gamma[c]|``; Liu et al. 2017, "Learning efficient convolutional networks through network slimming"."""
    scale: Tensor = evidence["scale"]
    return scale.flatten(1)[:, 0].abs().double()


@_named(dims=(0, 1))
def fpgm(weight: Tensor, dim: int = 0, **evidence: Any) -> Tensor:
    """How far a channel is from all others, ``s[c] = sum over d of ||w[c] - w[d]||``: one near the geometric
    median of all can be replaced by the others; He et al. 2019, "Filter pruning via geometric median".

    Takes memory for [channels, taps] and some rows of [channels, channels], in float64.
    """
    rows = weight.double().movedim(dim, 0).flatten(1)
    # What all have in common would cost digits of the distances.
    rows = rows - rows[:1]
    parts = rows.split(max(1, CHUNK // len(rows)))
    distances = torch.cat([torch.cdist(part, rows).sum(1) for part in parts])
    # Equal channels get equal scores, whatever the order in which a product was summed.
    return distances.float().double()


@_named()
def lamp(weight: Tensor, dim: int | None = None, **evidence: Any) -> Tensor:
    """Squared magnitude over that of all that are at least as large, ``w[i]^2 / sum over j of w[j]^2`` with
    ``|w[j]| >= |w[i]|``, so that scores of layers compare; Lee et al. 2021, "Layer-adaptive sparsity for the
    magnitude-based pruning". Of equal magnitudes the lower index counts as the larger. Zero scores 0.

    Channels are scored alike by their Euclidean lengths.
    """
    sizes = _wide(weight).abs() if dim is None else _norm(weight, dim, 2)
    ordered, order = sizes.flatten().sort(descending=True, stable=True)
    squares = ordered.double().square()
    # Summed as whole numbers: a GPU rounds a cumulative sum of floats differently from run to run.
    unit = (squares.sum() / 2**61).clamp(min=TINY)
    sums = (squares / unit).long().cumsum(0) * unit
    scores = (squares / sums.clamp(min=unit)).to(sizes.dtype)
    return torch.empty_like(scores).scatter_(0, order, scores).view(sizes.shape)


@_named()
def random(weight: Tensor, dim: int | None = None, **evidence: Any) -> Tensor:
    """Uniform in [0, 1), whatever the weight is: what any other criterion should beat.

    evidence["seed"] (0 where there is none) settles the scores, on every device. Other dimensions get others;
    each group of a grouped convolution gets the same.
    """
    seed = evidence.get("seed", 0) ^ (0 if dim is None else dim + 1)
    by = torch.Generator("cpu").manual_seed(seed)
    shape, dtype = (weight.shape, torch.float32) if dim is None else (weight.shape[dim], torch.float64)
    return torch.rand(shape, generator=by, dtype=dtype, device="cpu").to(weight.device)


@_named(needs=("inputs",))
def wanda(weight: Tensor, dim: int | None = None, **evidence: Any) -> Tensor:
    """Magnitude times the norm of the input, ``|w| ||x||`` of a weight, the sum ``s[c] = sum |w[c]| ||x||``
    of a channel; Sun et al. 2024, "A simple and effective pruning approach for large language models", which
    compares the weights of one output with each other (scope "row")."""
    return _magnitudes(_wide(weight) * _wide(evidence["inputs"]), dim, 1)


@_named(needs=("movement",))
def movement(weight: Tensor, dim: int | None = None, **evidence: Any) -> Tensor:
    """How much training has moved it away from zero, ``-sum over steps of w dloss/dw``, and the sum of these
    of a channel; negative where it moved towards zero. Sanh et al. 2020, "Movement pruning: adaptive sparsity
    by fine-tuning"."""
    moved: Tensor = evidence["movement"]
    return moved if dim is None else moved.sum(_others(moved, dim), dtype=torch.float64)


@_named(needs=("hessian",), dims=(None,))
def sparsegpt(weight: Tensor, dim: int | None = None, **evidence: Any) -> Tensor:
    """What the outputs lose without a weight while the others make up for it; Frantar & Alistarh 2023,
    "SparseGPT: massive language models can be accurately pruned in one-shot". The weights change as they are
    chosen, so that there are no scores to give.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        'Pruner: criterion "sparsegpt" must be used through sparseops.Pruner, which corrects the weights '
        "while it chooses, got a call for scores"
    )


def check_criterion(criterion: object, caller: str, dims: Sequence[int | None]) -> None:
    """Checks that a criterion can score the channels along ``dims``, or single weights where that is None.

    Raises:
        ValueError: it is no function and no name of one, or it does not score them.
    """
    named = CRITERIA.get(criterion) if isinstance(criterion, str) else criterion
    able = ", ".join(name for name, one in CRITERIA.items() if set(dims) <= set(one.dims))
    if not callable(named):
        raise ValueError(
            f"{caller}: criterion must be one of {able} or a function (weight, dim) -> scores, "
            f"got {criterion!r}"
        )
    for dim in dims:
        if isinstance(named, Named) and dim not in named.dims:
            raise ValueError(
                f'{caller}: criterion "{named.__name__}" scores '
                f"{' and '.join(SCORED[one] for one in named.dims)} only, got "
                f"{SCORED.get(dim, f'dim {dim}')}, which are scored by {able or 'none'}"
            )


def score(weight: Tensor, dim: int, criterion: str | Criterion, evidence: Evidence = NO_EVIDENCE) -> Tensor:
    """Scores [weight.shape[dim]] by a criterion or its name, float64 on the CPU; NaN counts as infinite.

    A channel of zeros matters least by every criterion, so that what was dropped earlier goes first.

    Raises:
        ValueError: the criterion does not give one number per channel, or not without more evidence.
    """
    scores = _score(weight, dim, criterion, evidence).to("cpu", torch.float64)
    scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf)
    empty = (weight == 0).movedim(dim, 0).flatten(1).all(1).to("cpu")
    if not empty.any() or empty.all():
        return scores
    lowest = float(scores[~empty].min())
    return scores.masked_fill(empty, 0.0 if lowest > 0 else 2 * lowest - TINY)


def score_weights(weight: Tensor, criterion: str | Criterion, evidence: Evidence = NO_EVIDENCE) -> Tensor:
    """Scores of the weight's shape by a criterion or its name, float32 on the weight's device; NaN counts as
    infinite.

    Raises:
        ValueError: the criterion does not give one number per weight, or not without more evidence.
    """
    scores = _score(weight, None, criterion, evidence).to(weight.device, torch.float32)
    return scores.nan_to_num(nan=torch.inf, posinf=torch.inf)


def score_blocks(scores: Tensor, block: int, criterion: str | Criterion) -> Tensor:
    """Scores of blocks of neighbouring channels: [groups, channels] gives [groups, blocks].

    A block's score is the mean of its channels', for "l2" and "gradient" the root of the mean square. With
    whole blocks that is the order of the l1 or l2 norms of the blocks; a short last block is judged by its
    mean too, and so neither kept nor dropped for being short.
    """
    order = getattr(_of(criterion), "order", 1)
    means = [part.pow(order).mean(1).pow(1 / order) for part in scores.split(block, dim=1)]
    return torch.stack(means, dim=1)


def _score(weight: Tensor, dim: int | None, criterion: str | Criterion, evidence: Evidence) -> Tensor:
    by = _of(criterion)
    weight = weight.detach()
    scores = by(weight, dim, **evidence) if isinstance(by, Named) else by(weight, dim)
    expected = tuple(weight.shape) if dim is None else (weight.shape[dim],)
    shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    if shape != expected:
        raise ValueError(f"{_caller(dim)}: criterion must give scores of shape {expected}, got {shape}")
    return scores.detach()


def _of(criterion: str | Criterion) -> Criterion:
    return CRITERIA[criterion] if isinstance(criterion, str) else criterion


def _caller(dim: int | None) -> str:
    """Who is asked for the criterion: single weights are scored for the Pruner alone."""
    return "Pruner" if dim is None else "Channels"


def _magnitudes(values: Tensor, dim: int | None, order: int) -> Tensor:
    """Of each value, or the norms of channels."""
    return _wide(values).abs() if dim is None else _norm(values, dim, order)


def _norm(values: Tensor, dim: int, order: int) -> Tensor:
    return torch.linalg.vector_norm(values, order, dim=_others(values, dim), dtype=torch.float64)


def _others(values: Tensor, dim: int) -> list[int]:
    return [other for other in range(values.ndim) if other != dim]


def _wide(values: Tensor) -> Tensor:
    """In at least float32: products of half floats overflow."""
    return values if values.dtype == torch.float64 else values.float()
