"""``SparseConv1d`` and ``SparseConv2d``: torch's convolutions on a sparse weight."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseops.nn.base import SparseModule


class _SparseConv(SparseModule):
    """Constructor and attributes are those of the dense class; groups of four lie along the input channels of
    each kernel tap."""

    op_kind = "conv"
    hyperparameters = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "transposed",
        "output_padding",
        "groups",
        "padding_mode",
    )

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int
    padding_mode: str

    def __init__(  # noqa: PLR0913
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        format: str = "nm24",
    ) -> None:
        self._start(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
            format=format,
        )

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...] | str]:
        """``x`` with what a zero-padding op cannot add, and the padding that is left for the op.

        Raises:
            ValueError: x does not have the channels or the number of dimensions of an input.
        """
        dims = len(self.kernel_size)
        # The op cannot tell: it only sees the channels of a group rounded up.
        if x.ndim not in (dims + 1, dims + 2) or x.shape[-dims - 1] != self.in_channels:
            raise ValueError(
                f"{type(self).__name__}: input must have {dims + 1} or {dims + 2} dimensions and "
                f"{self.in_channels} channels, got shape {tuple(x.shape)}"
            )
        if self.padding_mode == "zeros":
            return x, self.padding
        widths: list[int] = []
        for dim in reversed(range(len(self.kernel_size))):
            if isinstance(self.padding, str):
                both = self.dilation[dim] * (self.kernel_size[dim] - 1) if self.padding == "same" else 0
                widths += [both // 2, both - both // 2]
            else:
                widths += [self.padding[dim]] * 2
        return F.pad(x, widths, mode=self.padding_mode), (0,) * len(self.kernel_size)

    def _options(self) -> dict[str, Any]:
        return {"groups": self.groups, "channels": self.in_channels}

    def _empty_dense(self, **factory: Any) -> nn.Module:
        return self.dense_class(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias is not None,
            padding_mode=self.padding_mode,
            **factory,
        )


class SparseConv2d(_SparseConv):
    """``nn.Conv2d`` on a sparse weight: x [N, C, H, W] or [C, H, W], whose memory format the output keeps.

    The arguments are those of ``nn.Conv2d``. A new layer starts as that does, pruned by magnitude;
    ``from_dense`` takes an existing one.
    """

    dense_class = nn.Conv2d

    def forward(self, input: Tensor) -> Tensor:
        x, padding = self._padded(input)
        return self.op.fn(
            x,
            *self._tensors(),
            self.bias,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            **self._keywords(),
        )


class SparseConv1d(_SparseConv):
    """``nn.Conv1d`` on a sparse weight: x [N, C, L] or [C, L].

    The arguments are those of ``nn.Conv1d``. A new layer starts as that does, pruned by magnitude;
    ``from_dense`` takes an existing one.
    """

    dense_class = nn.Conv1d

    def forward(self, input: Tensor) -> Tensor:
        x, padding = self._padded(input)
        y = self.op.fn(
            x.unsqueeze(-2),
            *self._tensors(),
            self.bias,
            kernel_size=(1, *self.kernel_size),
            stride=(1, *self.stride),
            padding=padding if isinstance(padding, str) else (0, *padding),
            dilation=(1, *self.dilation),
            groups=self.groups,
            **self._keywords(),
        )
        return y.squeeze(-2)
