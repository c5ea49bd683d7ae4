"""Structured sparsity for PyTorch: formats, kernels, modules, and ``convert(model)``."""

from importlib import metadata as _metadata

from sparseops import formats, nn, ops, prune
from sparseops.compact import CompactReport, compact, explain_compact
from sparseops.convert import convert, explain, to_dense
from sparseops.doctor import doctor
from sparseops.nn import (
    SparseConv1d,
    SparseConv2d,
    SparseEmbedding,
    SparseGRU,
    SparseLinear,
    SparseLSTM,
)
from sparseops.prune import Channels, Plan
from sparseops.report import Report

try:
    __version__ = _metadata.version("sparseops")
except _metadata.PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+source"

__all__ = [
    "Channels",
    "CompactReport",
    "Plan",
    "Report",
    "SparseConv1d",
    "SparseConv2d",
    "SparseEmbedding",
    "SparseGRU",
    "SparseLSTM",
    "SparseLinear",
    "__version__",
    "compact",
    "convert",
    "doctor",
    "explain",
    "explain_compact",
    "formats",
    "nn",
    "ops",
    "prune",
    "to_dense",
]
