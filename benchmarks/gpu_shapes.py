"""What is measured on a GPU: layers in the order of their worth, so that a run that is cut short has the
best.

Sizes are those of the networks' own configurations: Llama-3-8B (hidden 4096, MLP 14336, 8 of 32 heads for
keys and values), Qwen2.5-7B (hidden 3584, MLP 18944), ResNet-50 (stride in its 3x3 layers) and VGG16 at 224
pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.shapes import DTYPE_TAGS, Conv, Linear, Pruned


@dataclass(frozen=True)
class StridedConv(Conv):
    """A convolution of ``side`` pixels squared that keeps the side, or halves it with a stride of 2."""

    stride: int = 1

    @property
    def out_side(self) -> int:
        return (self.side + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def name(self) -> str:
        return super().name + (f" /{self.stride}" if self.stride > 1 else "")

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.out_side**2 * self.channels * self.kernel**2 * self.outputs


BYTE_TAGS = {torch.int8: "i8", torch.float8_e4m3fn: "f8"}


@dataclass(frozen=True)
class GpuWork:
    """A layer in a dtype, and where it is from."""

    layer: Linear | StridedConv | Pruned
    source: str
    dtype: torch.dtype

    @property
    def op(self) -> str:
        return f"nm24_linear_{self.tag}" if self.dtype in BYTE_TAGS else self.layer.op

    @property
    def name(self) -> str:
        return self.layer.name

    @property
    def tag(self) -> str:
        return BYTE_TAGS.get(self.dtype) or DTYPE_TAGS[self.dtype]


SQUARES = (4096, 8192, 2048, 1024, 16384)
LAYERS = (
    (4096, 4096, "Llama-3-8B attention output"),
    (4096, 14336, "Llama-3-8B MLP gate"),
    (14336, 4096, "Llama-3-8B MLP down"),
    (3584, 18944, "Qwen2.5-7B MLP gate"),
    (18944, 3584, "Qwen2.5-7B MLP down"),
    (4096, 6144, "Llama-3-8B attention input"),
    (3584, 3584, "Qwen2.5-7B attention output"),
    (3584, 37888, "Qwen2.5-7B MLP gate and up"),
    (4096, 28672, "Llama-3-8B MLP gate and up"),
)
TOKENS = (1, 4096, 16, 256, 1024, 64, 4)
HALF_TOKENS = (1, 16, 256, 4096)
"""Those at which f16 is measured too."""
SWEEP_SQUARES, SWEEP_TOKENS = (8192, 4096), (4096, 256, 1024, 64)
"""Where every tile of sm90 is tried with all its splits and clusters."""
BYTE_TOKENS = (4096, 256, 32)
"""Those at which 8-bit numbers are measured: torch's own product of int8 needs more than 16."""
F8_SQUARES = (8192, 4096, 2048)

CONVS = (  # channels, side, outputs, kernel, stride
    (256, 14, 256, 3, 1, "ResNet-50 conv4_x 3x3"),
    (512, 28, 512, 3, 1, "VGG16 conv4_2"),
    (128, 28, 128, 3, 1, "ResNet-50 conv3_x 3x3"),
    (512, 7, 512, 3, 1, "ResNet-50 conv5_x 3x3"),
    (256, 56, 256, 3, 1, "VGG16 conv3_2"),
    (512, 14, 512, 3, 1, "VGG16 conv5"),
    (1024, 14, 256, 1, 1, "ResNet-50 conv4_x reduction"),
    (256, 14, 1024, 1, 1, "ResNet-50 conv4_x expansion"),
    (64, 56, 64, 3, 1, "ResNet-50 conv2_x 3x3"),
    (128, 56, 128, 3, 2, "ResNet-50 conv3_1 3x3"),
    (256, 28, 256, 3, 2, "ResNet-50 conv4_1 3x3"),
    (512, 14, 512, 3, 2, "ResNet-50 conv5_1 3x3"),
    (128, 28, 512, 1, 1, "ResNet-50 conv3_x expansion"),
    (512, 28, 128, 1, 1, "ResNet-50 conv3_x reduction"),
    (2048, 7, 512, 1, 1, "ResNet-50 conv5_x reduction"),
    (512, 7, 2048, 1, 1, "ResNet-50 conv5_x expansion"),
    (64, 56, 256, 1, 1, "ResNet-50 conv2_x expansion"),
    (256, 56, 64, 1, 1, "ResNet-50 conv2_x reduction"),
    (256, 56, 512, 1, 2, "ResNet-50 conv3_1 shortcut"),
    (512, 28, 1024, 1, 2, "ResNet-50 conv4_1 shortcut"),
    (1024, 14, 2048, 1, 2, "ResNet-50 conv5_1 shortcut"),
    (256, 28, 512, 3, 1, "VGG16 conv4_1"),
    (128, 56, 256, 3, 1, "VGG16 conv3_1"),
    (128, 112, 128, 3, 1, "VGG16 conv2_2"),
    (64, 112, 128, 3, 1, "VGG16 conv2_1"),
    (64, 224, 64, 3, 1, "VGG16 conv1_2"),
)
BATCHES = (32, 1, 64)
CHANNEL_CONVS, CHANNEL_LAYERS, CHANNEL_TOKENS = 15, 4, (4096, 256)
"""How many of them are measured with pruned channels, and at how many tokens."""


def _linear(dtype: torch.dtype, squares: tuple[int, ...], tokens: tuple[int, ...]) -> list[GpuWork]:
    works = [GpuWork(Linear(size, size, size), "square", dtype) for size in squares]
    works += [
        GpuWork(Linear(count, inputs, outputs), source, dtype)
        for count in tokens
        for inputs, outputs, source in LAYERS
        if not (count == inputs == outputs and count in squares)
    ]
    return works


def linear_works() -> list[GpuWork]:
    """bf16 at every size, then f16 at some."""
    return _linear(torch.bfloat16, SQUARES, TOKENS) + _linear(torch.float16, SQUARES, HALF_TOKENS)


def sweep_works() -> list[GpuWork]:
    """Some of ``linear_works``, in bf16."""
    return _linear(torch.bfloat16, SWEEP_SQUARES, SWEEP_TOKENS)


def byte_works() -> list[GpuWork]:
    return _linear(torch.int8, SQUARES, BYTE_TOKENS)


def f8_works() -> list[GpuWork]:
    return _linear(torch.float8_e4m3fn, F8_SQUARES, BYTE_TOKENS)


def conv_works() -> list[GpuWork]:
    """In f16, cuDNN's best known dtype, batch by batch."""
    return [
        GpuWork(StridedConv(batch, channels, side, outputs, kernel, stride), source, torch.float16)
        for batch in BATCHES
        for channels, side, outputs, kernel, stride, source in CONVS
    ]


def _pruned(layer: Linear | StridedConv, source: str, dtype: torch.dtype) -> list[GpuWork]:
    """A half of the outputs, of the inputs, and of both."""
    whole = Pruned(layer, 0, 0).inputs, layer.outputs
    halves = ((whole[0], whole[1] // 2), (whole[0] // 2, whole[1]), (whole[0] // 2, whole[1] // 2))
    return [GpuWork(Pruned(layer, *kept), source, dtype) for kept in halves]


def channel_conv_works() -> list[GpuWork]:
    """In f16, as ``conv_works``."""
    return [
        work
        for channels, side, outputs, kernel, stride, source in CONVS[:CHANNEL_CONVS]
        for work in _pruned(
            StridedConv(BATCHES[0], channels, side, outputs, kernel, stride), source, torch.float16
        )
    ]


def channel_linear_works() -> list[GpuWork]:
    """In bf16, as ``linear_works``."""
    return [
        work
        for tokens in CHANNEL_TOKENS
        for inputs, outputs, source in LAYERS[:CHANNEL_LAYERS]
        for work in _pruned(Linear(tokens, inputs, outputs), source, torch.bfloat16)
    ]


def tiny_works(op: str) -> list[GpuWork]:
    """Stand-ins with which every step is gone through in seconds, also without a GPU."""
    dtypes = {
        "nm24_linear": (torch.bfloat16, torch.float16),
        "nm24_linear_i8": (torch.int8,),
        "nm24_linear_f8": (torch.float8_e4m3fn,),
    }
    if op in dtypes:
        return [GpuWork(Linear(t, 128, 64), "tiny", d) for d in dtypes[op] for t in (64, 3)]
    if op == "channel_linear":
        return _pruned(Linear(64, 128, 64), "tiny", torch.bfloat16)
    if op == "channel_conv":
        return _pruned(StridedConv(2, 32, 5, 64, 3, 2), "tiny", torch.float16)
    convs = (StridedConv(1, 32, 6, 64), StridedConv(2, 32, 5, 64, 3, 2), StridedConv(1, 64, 4, 32, 1))
    return [GpuWork(conv, "tiny", torch.float16) for conv in convs]


WORKS = {
    "nm24_linear": linear_works,
    "nm24_linear_i8": byte_works,
    "nm24_linear_f8": f8_works,
    "nm24_conv": conv_works,
    "channel_conv": channel_conv_works,
    "channel_linear": channel_linear_works,
}
"""By op, what is measured."""
