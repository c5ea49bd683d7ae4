"""Sparse layers: one class per kind of layer, any format."""

from sparseops.nn.base import SparseModule
from sparseops.nn.conv import SparseConv1d, SparseConv2d
from sparseops.nn.embedding import SparseEmbedding
from sparseops.nn.linear import SparseLinear
from sparseops.nn.recurrent import SparseGRU, SparseLSTM
from sparseops.nn.recurrent_base import SparseRecurrent

__all__ = [
    "SparseConv1d",
    "SparseConv2d",
    "SparseEmbedding",
    "SparseGRU",
    "SparseLSTM",
    "SparseLinear",
    "SparseModule",
    "SparseRecurrent",
]
