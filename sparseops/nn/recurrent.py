"""``SparseLSTM`` and ``SparseGRU``: torch's recurrent layers on sparse weights."""

from __future__ import annotations

import torch
from torch import nn

from sparseops.nn.recurrent_base import SparseRecurrent


class SparseLSTM(SparseRecurrent):
    """``nn.LSTM`` on sparse weights: input [L, N, features], with ``batch_first`` [N, L, features],
    [L, features] or packed; hx, the first (h, c), zeros by default; returns the outputs and the last (h, c).

    The arguments are those of ``nn.LSTM``, of which proj_size must be 0. A new layer starts as that does,
    pruned by magnitude; ``from_dense`` takes an existing one.
    """

    dense_class = nn.LSTM
    _hx_names = ("hx[0]", "hx[1]")

    def __init__(  # noqa: PLR0913
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        format: str = "nm24",
    ) -> None:
        self._start(
            input_size,
            hidden_size,
            num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            proj_size=proj_size,
            device=device,
            dtype=dtype,
            format=format,
        )


class SparseGRU(SparseRecurrent):
    """``nn.GRU`` on sparse weights: input [L, N, features], with ``batch_first`` [N, L, features],
    [L, features] or packed; hx, the first h, zeros by default; returns the outputs and the last h.

    The arguments are those of ``nn.GRU``. A new layer starts as that does, pruned by magnitude;
    ``from_dense`` takes an existing one.
    """

    dense_class = nn.GRU
    _hx_names = ("hx",)

    def __init__(  # noqa: PLR0913
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        format: str = "nm24",
    ) -> None:
        self._start(
            input_size,
            hidden_size,
            num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            device=device,
            dtype=dtype,
            format=format,
        )
