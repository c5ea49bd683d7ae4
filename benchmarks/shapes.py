"""What is measured: named layers, the network each comes from, and the speed-up that is asked of it.

``at_least`` and ``aim`` are ratios of dense to sparse time. The dense peer is what torch offers for the same
layer: ``F.linear``, and ``F.conv2d`` in its faster memory format.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Linear:
    """y[tokens, outputs] = x[tokens, inputs] w[outputs, inputs]^T"""

    tokens: int
    inputs: int
    outputs: int
    op = "nm24_linear"

    @property
    def name(self) -> str:
        return f"{self.tokens}x{self.inputs}->{self.outputs}"

    @property
    def flops(self) -> int:
        """Of the dense layer: a multiplication and an addition count one each."""
        return 2 * self.tokens * self.inputs * self.outputs


@dataclass(frozen=True)
class Conv:
    """A convolution of batch x channels x side x side, stride 1, that keeps the side."""

    batch: int
    channels: int
    side: int
    outputs: int
    kernel: int = 3
    op = "nm24_conv"

    @property
    def name(self) -> str:
        return f"{self.kernel}x{self.kernel} {self.batch}x{self.channels}@{self.side}->{self.outputs}"

    @property
    def flops(self) -> int:
        """Of the dense layer: a multiplication and an addition count one each, those on padding included."""
        return 2 * self.batch * self.side**2 * self.channels * self.kernel**2 * self.outputs


@dataclass(frozen=True)
class Pruned:
    """A layer that keeps some of its input and output channels, in blocks of ``block`` that lie anywhere."""

    layer: Linear | Conv
    kept_inputs: int
    kept_outputs: int
    block: int = 8

    @property
    def op(self) -> str:
        return self.layer.op.replace("nm24", "channel")

    @property
    def inputs(self) -> int:
        """Input channels of the dense layer."""
        return self.layer.inputs if isinstance(self.layer, Linear) else self.layer.channels

    @property
    def name(self) -> str:
        return f"{self.layer.name}, kept {self.kept_inputs}->{self.kept_outputs}"

    @property
    def flops(self) -> int:
        """Of the dense layer."""
        return self.layer.flops

    @property
    def kept_macs(self) -> float:
        """The share of the dense layer's products that is left."""
        return self.kept_inputs / self.inputs * self.kept_outputs / self.layer.outputs


@dataclass(frozen=True)
class Work:
    """A layer in a dtype, and the speed-ups asked of it. ``isa``: the instruction set it needs, or ""."""

    layer: Linear | Conv | Pruned
    source: str
    dtype: torch.dtype
    at_least: float
    aim: float
    isa: str = ""

    @property
    def op(self) -> str:
        return self.layer.op

    @property
    def name(self) -> str:
        return self.layer.name

    @property
    def tag(self) -> str:
        return DTYPE_TAGS[self.dtype]


DTYPE_TAGS = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}

_MANY_TOKENS = (
    (Linear(512, 1024, 1024), "BERT-large attention projection, 512 tokens"),
    (Linear(1024, 1024, 1024), "BERT-large attention projection, 1024 tokens"),
    (Linear(128, 768, 3072), "BERT-base MLP, 128 tokens"),
    (Linear(256, 4096, 4096), "Llama-2-7B attention projection, 256 tokens"),
)
_FEW_TOKENS = (
    (Linear(1, 4096, 4096), "Llama-2-7B attention projection, decoding"),
    (Linear(8, 4096, 4096), "Llama-2-7B attention projection, decoding 8 sequences"),
)
_CONVS = (
    (128, 28, 128, 3, "ResNet-50 conv3_x"),
    (256, 14, 256, 3, "ResNet-50 conv4_x"),
    (512, 14, 512, 3, "VGG16 conv5 at 224 pixels"),
    (256, 56, 256, 3, "VGG16 conv3 at 224 pixels"),
    (512, 28, 512, 3, "VGG16 conv4 at 224 pixels"),
)

WORKS: tuple[Work, ...] = (
    *(Work(layer, source, torch.float32, 1.5, 1.7) for layer, source in _MANY_TOKENS),
    *(Work(layer, source, torch.float32, 1.5, 1.8) for layer, source in _FEW_TOKENS),
    *(
        Work(Conv(batch, channels, side, outputs, kernel), source, torch.float32, 1.25, 1.5)
        for batch in (1, 8)
        for channels, side, outputs, kernel, source in _CONVS
    ),
    Work(Conv(1, 256, 14, 1024, kernel=1), "ResNet-50 conv4_x, expansion", torch.float32, 1.25, 1.5),
    *(Work(layer, source, torch.bfloat16, 1.2, 1.5, "avx512_bf16") for layer, source in _MANY_TOKENS),
)
"""Every named work, in the order of the tables."""

# Share of inputs and of outputs that is kept -> what is asked. Most of what the products allow, half of it
# where so few are left that other costs show.
_KEPT = {
    (0.75, 0.75): (1.42, 1.6),
    (0.5, 0.5): (3.2, 3.6),
    (0.25, 0.25): (8.0, 12.8),
    (1.0, 0.5): (1.8, 1.9),
    (0.5, 1.0): (1.8, 1.9),
}
_PRUNED_CONVS = (
    (64, 56, 64, 3, "ResNet-50 conv2_x"),
    *_CONVS,
    (512, 7, 512, 3, "ResNet-50 conv5_x"),
    (256, 14, 1024, 1, "ResNet-50 conv4_x, expansion"),
    (1024, 14, 256, 1, "ResNet-50 conv4_x, reduction"),
    (128, 112, 128, 3, "VGG16 conv2 at 224 pixels"),
)
_PRUNED_LINEARS = (
    (Linear(8, 4096, 4096), "VGG16 classifier, batch 8"),
    (Linear(512, 1024, 1024), "BERT-large attention projection, 512 tokens"),
)


def _pruned(layer: Linear | Conv, source: str) -> tuple[Work, ...]:
    return tuple(
        Work(
            Pruned(layer, int(Pruned(layer, 0, 0).inputs * inputs), int(layer.outputs * outputs)),
            source,
            torch.float32,
            *asked,
        )
        for (inputs, outputs), asked in _KEPT.items()
    )


CHANNEL_WORKS: tuple[Work, ...] = (
    *(
        work
        for channels, side, outputs, kernel, source in _PRUNED_CONVS
        for work in _pruned(Conv(1, channels, side, outputs, kernel), source)
    ),
    *(work for layer, source in _PRUNED_LINEARS for work in _pruned(layer, source)),
)
"""The same of layers with pruned channels, each kept in several shares."""
