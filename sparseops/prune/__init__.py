"""What to prune: which channels and weights of which layers, and by what measure. Knows nothing of sparse
layers."""

from sparseops.prune.channels import Channels, ChannelSet, Selection, select
from sparseops.prune.criteria import CRITERIA, Criterion, l1, l2
from sparseops.prune.patterns import (
    is_24_transposable,
    keep_24,
    keep_24_transposable,
    keep_layers,
    keep_unstructured,
)
from sparseops.prune.plan import Plan, Treatment
from sparseops.prune.unstructured import Layers, Unstructured

__all__ = [
    "CRITERIA",
    "ChannelSet",
    "Channels",
    "Criterion",
    "Layers",
    "Plan",
    "Selection",
    "Treatment",
    "Unstructured",
    "is_24_transposable",
    "keep_24",
    "keep_24_transposable",
    "keep_layers",
    "keep_unstructured",
    "l1",
    "l2",
    "select",
]
