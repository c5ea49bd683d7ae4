"""``Unstructured`` and ``Layers``: single weights, or whole layers, become zero."""

from __future__ import annotations

from dataclasses import dataclass

from sparseops.prune.criteria import Criterion, check_criterion
from sparseops.prune.fields import (
    check_amount,
    check_integer,
    check_number,
    check_word,
    say_rule,
)

SCOPES = ("local", "global", "row")


@dataclass(frozen=True, repr=False)
class Unstructured:
    """Single weights of a layer become zero, wherever they lie. No kernel gains from it; it is what others
    are compared with, and what a checkpoint shrinks by.

    Attributes:
        ratio: share of the weights that is dropped, in [0, 1), rounded down to whole weights.
        criterion: how much a weight matters: a name of ``CRITERIA``, or a function (weight [O, C, ...], None)
            -> scores of the weight's shape. NaN and infinite scores count as the largest; of equal ones the
            weight that comes first is kept. None for the pruner's.
        scope: "local" drops the share of each layer, "row" that of each of its outputs; with "global" the
            weights of all layers compete.
        threshold: what scores at most this goes, and ratio is not used; while a schedule runs, what scores at
            most its level times this. None for ratio.
        min_kept: share of each layer, with scope "row" of each output, that is kept whatever it scores, in
            [0, 1], rounded up to whole weights.

    Raises:
        TypeError: a field is of the wrong type.
        ValueError: a field has a value that it must not have.
    """

    ratio: float = 0.5
    criterion: str | Criterion | None = None
    scope: str = "local"
    threshold: float | None = None
    min_kept: float = 0.0

    def __post_init__(self) -> None:
        check_amount(self)
        if self.criterion is not None:
            check_criterion(self.criterion, "Unstructured", (None,))
        check_word(self, "scope", SCOPES)
        check_number(self, "min_kept")
        if not 0 <= self.min_kept <= 1:
            raise ValueError(f"Unstructured: min_kept must be in [0, 1], got {self.min_kept}")

    def __repr__(self) -> str:
        """The ratio or the threshold, and what differs from the defaults."""
        return say_rule(self)


@dataclass(frozen=True, repr=False)
class Layers:
    """Whole layers become zero: those whose weights matter least in the mean. A layer of zeros passes on
    nothing but its bias, so that something has to lead around it, as in a residual block.

    Attributes:
        ratio: share of the layers that is dropped, in [0, 1), rounded down to whole layers.
        criterion: how much a weight matters, as in ``Unstructured``. None for the pruner's.
        threshold: layers whose mean score is at most this go, and ratio is not used; while a schedule runs,
            those whose mean is at most its level times this. None for ratio.
        min_kept: layers that are kept whatever they score.

    Raises:
        TypeError: a field is of the wrong type.
        ValueError: a field has a value that it must not have.
    """

    ratio: float = 0.5
    criterion: str | Criterion | None = None
    threshold: float | None = None
    min_kept: int = 1

    def __post_init__(self) -> None:
        check_amount(self)
        if self.criterion is not None:
            check_criterion(self.criterion, "Layers", (None,))
        check_integer(self, "min_kept", least=0)

    def __repr__(self) -> str:
        """The ratio or the threshold, and what differs from the defaults."""
        return say_rule(self)
