"""``SparseLinear``: ``nn.Linear`` on a sparse weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparseops.nn.base import SparseModule


class SparseLinear(SparseModule):
    """``y = x @ weight.T + bias`` with x [..., in_features] and y [..., out_features].

    A new layer starts as ``nn.Linear`` does, pruned by magnitude; ``from_dense`` takes an existing one.
    """

    dense_class = nn.Linear
    op_kind = "linear"
    hyperparameters = ("in_features", "out_features")

    in_features: int
    out_features: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        format: str = "nm24",
    ) -> None:
        self._start(in_features, out_features, bias, device=device, dtype=dtype, format=format)

    def forward(self, input: Tensor) -> Tensor:
        # The op cannot tell: it only sees in_features rounded up.
        if not input.ndim or input.shape[-1] != self.in_features:
            raise ValueError(
                f"SparseLinear: input must have {self.in_features} features, got shape {tuple(input.shape)}"
            )
        return self.op.fn(input, *self._tensors(), self.bias, **self._keywords())

    def _empty_dense(self, **factory: Any) -> nn.Module:
        return nn.Linear(self.in_features, self.out_features, self.bias is not None, **factory)
