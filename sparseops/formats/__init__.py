"""Sparse weight formats: how a weight is stored, and nothing about what is computed with it."""

from sparseops.formats.base import SparseFormat
from sparseops.formats.channel_pruned import ChannelPruned, Keep
from sparseops.formats.nm24 import NM24

FORMATS: dict[str, type[SparseFormat]] = {NM24.key: NM24, ChannelPruned.key: ChannelPruned}
"""Every format by its key."""

__all__ = ["FORMATS", "NM24", "ChannelPruned", "Keep", "SparseFormat"]
