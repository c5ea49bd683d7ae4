"""``SparseEmbedding``: ``nn.Embedding`` without the columns that are zero."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseops.formats import ChannelPruned, Keep, SparseFormat
from sparseops.nn.base import SparseModule

Self = TypeVar("Self", bound="SparseEmbedding")

_BLOCK = 8


class SparseEmbedding(SparseModule):
    """``y[..., d] = weight[input, d]`` with a weight [num_embeddings, embedding_dim] of which whole columns
    are zero: input of integers, y [..., embedding_dim].

    ``values`` [num_embeddings, kept columns] is the table that is read; the buffer ``in_index`` lists the
    columns. Rows are never dropped. The arguments are those of ``nn.Embedding``, all of which work; the only
    format is "channel". A new layer starts as that does, pruned by magnitude; ``from_dense`` takes an
    existing one, and of a ``Keep`` the inputs.
    """

    dense_class = nn.Embedding
    hyperparameters = (
        "num_embeddings",
        "embedding_dim",
        "padding_idx",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "sparse",
    )

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    max_norm: float | None
    norm_type: float
    scale_grad_by_freq: bool
    sparse: bool
    bias = None

    def __init__(  # noqa: PLR0913
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        format: str = "channel",
    ) -> None:
        self._start(
            num_embeddings,
            embedding_dim,
            padding_idx=padding_idx,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
            _weight=_weight,
            _freeze=_freeze,
            device=device,
            dtype=dtype,
            format=format,
        )

    @classmethod
    def from_dense(cls: type[Self], layer: nn.Module, *, prune: Any = None, format: str = "channel") -> Self:
        return cls.pack(layer, prune=prune, format=format)[0]

    @classmethod
    def pack(
        cls: type[Self], layer: nn.Module, *, prune: Any = None, format: str = "channel"
    ) -> tuple[Self, SparseFormat]:
        return super().pack(layer, prune=prune, format=format)

    def _take(self, layer: Any, *, prune: Any, format: str) -> SparseFormat:
        if format != ChannelPruned.key:
            raise ValueError(f"SparseEmbedding: format must be {ChannelPruned.key}, got {format!r}")
        weight: Tensor = layer.weight
        packed = _pack_columns(weight.detach(), prune)
        for name in self.hyperparameters:
            setattr(self, name, getattr(layer, name))
        self.format = format
        self.weight_shape = packed.shape
        self.values = nn.Parameter(packed.values, requires_grad=weight.requires_grad)
        self.register_buffer("in_index", packed.in_index)
        self._buffer_names = ("in_index",)
        self.train(layer.training)
        return packed

    def forward(self, input: Tensor) -> Tensor:
        kept = F.embedding(
            input,
            self.values,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )
        columns: Tensor = self._buffers["in_index"]  # type: ignore[assignment]
        if columns.shape[0] == self.embedding_dim:
            return kept
        return kept.new_zeros((*kept.shape[:-1], self.embedding_dim)).index_copy_(-1, columns.long(), kept)

    @property
    def kernel(self) -> str:
        """What looks up the kept columns."""
        return "torch.embedding on the kept columns"

    @property
    def kernel_note(self) -> str | None:
        """Nothing."""
        return None

    def _packed(self, tensors: dict[str, Tensor]) -> SparseFormat:
        if "out_index" in tensors:
            raise ValueError("an embedding keeps every row, got out_index")
        values = tensors["values"]
        rows = torch.arange(self.num_embeddings, device=values.device, dtype=torch.int32)
        return ChannelPruned(values, tensors["in_index"], rows, self.weight_shape)

    def _prepare(self) -> None:
        """There is nothing to derive."""

    def _pack_checkpoint(self, own: dict[str, Any], prefix: str) -> None:
        weight = own.pop(prefix + "weight")
        shape = tuple(getattr(weight, "shape", ()))
        if shape != self.weight_shape:
            raise ValueError(
                f"load_state_dict: {prefix}weight must have shape {self.weight_shape}, got {shape}"
            )
        try:
            packed = _pack_columns(weight, None)
        except (ValueError, TypeError) as exc:
            raise type(exc)(f"load_state_dict: {prefix}weight must fit format {self.format}: {exc}") from exc
        tensors = {"values": packed.values, "in_index": packed.in_index}
        own |= {prefix + name: tensor for name, tensor in tensors.items()}
        self._make_room(tensors)

    def _empty_dense(self, **factory: Any) -> nn.Module:
        options = {name: getattr(self, name) for name in self.hyperparameters}
        return nn.Embedding(**options, **factory)


def _pack_columns(weight: Tensor, prune: Any) -> ChannelPruned:
    """A weight without some of its columns; every row is kept, also one of zeros (that of padding is one).

    Raises:
        TypeError: the weight is not floating-point.
        ValueError: no column is zero although ``prune`` is None, or ``prune`` does not fit a table.
    """
    if isinstance(prune, Keep):
        if prune.outputs is not None or prune.nm24:
            raise ValueError(
                f"SparseEmbedding: prune must keep every row (outputs=None) and not ask for 2:4, got {prune}"
            )
        columns = prune.inputs
    elif prune is None:
        is_kept = (weight != 0).any(0)
        if is_kept.all():
            raise ValueError(
                "SparseEmbedding: weight must have a column that is all zero "
                f'(prune="magnitude" or a Keep drops some), got none in shape {tuple(weight.shape)}'
            )
        if not is_kept.any():
            is_kept[:_BLOCK] = True
        columns = is_kept.nonzero().flatten()
    else:
        columns = ChannelPruned.from_dense(weight, prune=prune).in_index
    return ChannelPruned.from_dense(weight, prune=Keep(columns))
