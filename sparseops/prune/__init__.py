"""What to prune: which channels of which layers, and by what measure. Knows nothing of sparse layers."""

from sparseops.prune.channels import Channels, ChannelSet, Selection, select
from sparseops.prune.criteria import CRITERIA, Criterion, l1, l2
from sparseops.prune.plan import Plan, Treatment

__all__ = [
    "CRITERIA",
    "ChannelSet",
    "Channels",
    "Criterion",
    "Plan",
    "Selection",
    "Treatment",
    "l1",
    "l2",
    "select",
]
