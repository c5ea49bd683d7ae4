"""Structured sparsity for PyTorch: formats, kernels, modules, and ``convert(model)``."""

from importlib import metadata as _metadata

from sparseops import formats, interop, nn, ops, prune, train
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
from sparseops.prune import Channels, Layers, Plan, Unstructured
from sparseops.report import Report
from sparseops.train import (
    AutoPlan,
    Distiller,
    FitResult,
    Pruner,
    PruneReport,
    auto_plan,
    explain_permutation,
    fit_sparse,
    permute_channels,
    recalibrate,
    sensitivity,
)

try:
    __version__ = _metadata.version("sparseops")
except _metadata.PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+source"

__all__ = [
    "AutoPlan",
    "Channels",
    "CompactReport",
    "Distiller",
    "FitResult",
    "Layers",
    "Plan",
    "PruneReport",
    "Pruner",
    "Report",
    "SparseConv1d",
    "SparseConv2d",
    "SparseEmbedding",
    "SparseGRU",
    "SparseLSTM",
    "SparseLinear",
    "Unstructured",
    "__version__",
    "auto_plan",
    "compact",
    "convert",
    "doctor",
    "explain",
    "explain_compact",
    "explain_permutation",
    "fit_sparse",
    "formats",
    "interop",
    "nn",
    "ops",
    "permute_channels",
    "prune",
    "recalibrate",
    "sensitivity",
    "to_dense",
    "train",
]
