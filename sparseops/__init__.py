"""Structured sparsity for PyTorch: formats, kernels, modules, and ``convert(model)``."""

from importlib import metadata as _metadata

from sparseops import formats, nn, ops
from sparseops.convert import convert, explain, to_dense
from sparseops.doctor import doctor
from sparseops.nn import SparseConv1d, SparseConv2d, SparseLinear
from sparseops.report import Report

try:
    __version__ = _metadata.version("sparseops")
except _metadata.PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+source"

__all__ = [
    "Report",
    "SparseConv1d",
    "SparseConv2d",
    "SparseLinear",
    "__version__",
    "convert",
    "doctor",
    "explain",
    "formats",
    "nn",
    "ops",
    "to_dense",
]
