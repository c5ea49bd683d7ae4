"""Sparse layers: one class per kind of layer, any format."""

from sparseops.nn.base import SparseModule
from sparseops.nn.conv import SparseConv1d, SparseConv2d
from sparseops.nn.linear import SparseLinear

__all__ = ["SparseConv1d", "SparseConv2d", "SparseLinear", "SparseModule"]
