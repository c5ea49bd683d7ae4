"""Networks to prune: the usual families in plain torch, seeded, in evaluation mode, as narrow as one likes.

Each follows its paper in the order of the layers, and takes ``width`` (channels of its first stage, from
which the others follow) and a depth. No weight is trained. ``NETWORKS`` lists them all, each with sizes small
enough for a test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.mobilenets import mobilenet_v2, mobilenet_v3
from benchmarks.network_parts import Module, conv_norm, seeded


@torch.no_grad()
def randomise_batch_norm(model: Module, seed: int = 0) -> Module:
    """``model`` itself, its batch norms now with random statistics, scales of both signs and shifts, and its
    convolutions' and linear layers' biases random: nothing that pruning has to fold is 0 or 1 any more.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(t: Tensor, low: float, high: float) -> None:
        t.copy_(torch.rand(t.shape, generator=generator) * (high - low) + low)

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            uniform(module.running_mean, -0.5, 0.5)
            uniform(module.running_var, 0.5, 1.5)
            uniform(module.weight, 0.5, 1.0)
            module.weight.mul_(torch.where(torch.rand(module.weight.shape, generator=generator) < 0.2, -1, 1))
            uniform(module.bias, -0.5, 0.5)
        elif isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            uniform(module.bias, -0.5, 0.5)
    return model


# VGG16: Simonyan and Zisserman, arXiv:1409.1556


class VGG(nn.Module):
    """3x3 convolutions in stages that end in a max-pooling, and three linear layers over a flattened grid."""

    def __init__(
        self, width: int, stages: Sequence[int], norm: bool, classes: int, hidden: int, grid: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage, convs in enumerate(stages):
            outputs = width * min(2**stage, 8)
            for _ in range(convs):
                layers.append(nn.Conv2d(channels, outputs, 3, padding=1))
                layers += [nn.BatchNorm2d(outputs)] if norm else []
                layers.append(nn.ReLU(inplace=True))
                channels = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(grid)
        self.classifier = nn.Sequential(
            nn.Linear(channels * grid**2, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(hidden, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


@seeded
def vgg16(
    width: int = 64,
    stages: Sequence[int] = (2, 2, 3, 3, 3),
    classes: int = 1000,
    hidden: int = 4096,
    grid: int = 7,
) -> VGG:
    """VGG16. ``grid``: the side that the flattened channels have."""
    return VGG(width, stages, False, classes, hidden, grid)


@seeded
def vgg16_bn(
    width: int = 64,
    stages: Sequence[int] = (2, 2, 3, 3, 3),
    classes: int = 1000,
    hidden: int = 4096,
    grid: int = 7,
) -> VGG:
    """VGG16 with a batch norm after each convolution."""
    return VGG(width, stages, True, classes, hidden, grid)


# ResNet: He, Zhang, Ren and Sun, arXiv:1512.03385


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class Bottleneck(nn.Module):
    """1x1, 3x3 (which has the stride) and 1x1 convolutions, and a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return conv_norm(inputs, outputs, 1, stride=stride, activation=None)


class ResNet(nn.Module):
    """A 7x7 stem, four stages of residual blocks, an average and one linear layer."""

    def __init__(
        self, block: type[BasicBlock] | type[Bottleneck], width: int, blocks: Sequence[int], classes: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = width
        for stage, count in enumerate(blocks):
            layers = []
            for number in range(count):
                stride = 2 if stage and not number else 1
                layers.append(block(channels, width * 2**stage, stride))
                channels = width * 2**stage * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.stages = len(blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


@seeded
def resnet18(width: int = 64, blocks: Sequence[int] = (2, 2, 2, 2), classes: int = 1000) -> ResNet:
    """ResNet-18."""
    return ResNet(BasicBlock, width, blocks, classes)


@seeded
def resnet50(width: int = 64, blocks: Sequence[int] = (3, 4, 6, 3), classes: int = 1000) -> ResNet:
    """ResNet-50, the stride in the 3x3 convolution."""
    return ResNet(Bottleneck, width, blocks, classes)


# DenseNet: Huang, Liu, van der Maaten and Weinberger, arXiv:1608.06993


class DenseLayer(nn.Module):
    """Batch norm before a 1x1 and before a 3x3 convolution; the result stands behind the input's channels."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(y)))], 1)


class DenseNet(nn.Module):
    """A 7x7 stem, blocks of densely connected layers with halving transitions between, one linear layer."""

    def __init__(self, growth: int, blocks: Sequence[int], classes: int) -> None:
        super().__init__()
        channels = 2 * growth
        layers: list[nn.Module] = [
            nn.Conv2d(3, channels, 7, 2, 3, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        ]
        for number, count in enumerate(blocks):
            if number:
                layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
                layers += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
                channels //= 2
            for _ in range(count):
                layers.append(DenseLayer(channels, growth))
                channels += growth
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.features(x), inplace=True)
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1))


@seeded
def densenet(width: int = 32, blocks: Sequence[int] = (6, 12, 24, 16), classes: int = 1000) -> DenseNet:
    """DenseNet-121. ``width``: its growth rate."""
    return DenseNet(width, blocks, classes)


# U-Net: Ronneberger, Fischer and Brox, arXiv:1505.04597, padded and with batch norm as it is used today


class UNet(nn.Module):
    """Contracting stages, and expanding ones that are given what their contracting stage had."""

    def __init__(self, width: int, depth: int, classes: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(map(self._double, [3, *widths[:-1]], widths))
        self.pool = nn.MaxPool2d(2)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.up = nn.ModuleList(self._double(w + 2 * w, w) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def _double(inputs: int, outputs: int) -> nn.Sequential:
        first = conv_norm(inputs, outputs, 3, activation=nn.ReLU(inplace=True))
        return nn.Sequential(*first, *conv_norm(outputs, outputs, 3, activation=nn.ReLU(inplace=True)))

    def forward(self, x: Tensor) -> Tensor:
        levels: list[Tensor] = []
        for stage in self.down:
            x = stage(self.pool(x) if levels else x)
            levels.append(x)
        levels.pop()
        for stage in self.up:
            x = stage(torch.cat([levels.pop(), self.upsample(x)], 1))
        return self.head(x)


@seeded
def unet(width: int = 64, depth: int = 4, classes: int = 2) -> UNet:
    """U-Net with nearest-neighbour upsampling. Sides are multiples of 2**depth."""
    return UNet(width, depth, classes)


# Inception: Szegedy et al., arXiv:1512.00567, module A


class Inception(nn.Module):
    """Four branches over one input, side by side in the result: 1x1, 3x3, two 3x3, and pooled."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()

        def unit(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
            return conv_norm(inputs, outputs, kernel, activation=nn.ReLU(inplace=True))

        self.branch1 = unit(inputs, width, 1)
        self.branch2 = nn.Sequential(unit(inputs, width, 1), unit(width, 2 * width, 3))
        self.branch3 = nn.Sequential(
            unit(inputs, width, 1), unit(width, 2 * width, 3), unit(2 * width, 2 * width, 3)
        )
        self.pool = nn.AvgPool2d(3, 1, 1)
        self.branch4 = unit(inputs, width, 1)
        self.outputs = 6 * width

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(self.pool(x))]
        return torch.cat(branches, 1)


class InceptionNet(nn.Module):
    """A stem, Inception modules, an average and one linear layer."""

    def __init__(self, width: int, blocks: int, classes: int) -> None:
        super().__init__()
        self.stem = conv_norm(3, width, 3, stride=2, activation=nn.ReLU(inplace=True))
        channels, layers = width, []
        for _ in range(blocks):
            layers.append(Inception(channels, width))
            channels = layers[-1].outputs
        self.blocks = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


@seeded
def inception(width: int = 64, blocks: int = 3, classes: int = 1000) -> InceptionNet:
    """A net of Inception modules, the average written as a mean over both sides."""
    return InceptionNet(width, blocks, classes)


# The MLP block of a transformer: Vaswani et al., arXiv:1706.03762, normalised before as in GPT-2


class MLPBlock(nn.Module):
    """x + down(gelu(up(norm(x)))) over [..., width]."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, expansion * width)
        self.activation = nn.GELU()
        self.down = nn.Linear(expansion * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.activation(self.up(self.norm(x))))


@seeded
def transformer_mlp(width: int = 768, blocks: int = 12, expansion: int = 4) -> nn.Sequential:
    """The MLP blocks of a transformer, one after the other, without the attention between."""
    return nn.Sequential(*(MLPBlock(width, expansion) for _ in range(blocks)))


@dataclass(frozen=True)
class Network:
    """A family: how it is built, the shape of one example of full size, and sizes for tests."""

    build: Callable[..., nn.Module]
    example_shape: tuple[int, ...]
    small_shape: tuple[int, ...]
    small_sizes: Mapping[str, Any] = field(default_factory=dict)

    def small(self, seed: int = 0) -> nn.Module:
        """One of a few channels and layers, with random batch norms and biases."""
        return randomise_batch_norm(self.build(**self.small_sizes, seed=seed), seed)

    def small_example(self, batch: int = 2, seed: int = 0) -> Tensor:
        """An input of :meth:`small`: [batch, *small_shape]."""
        return torch.randn((batch, *self.small_shape), generator=torch.Generator().manual_seed(seed))


_PHOTO, _THUMBNAIL = (3, 224, 224), (3, 32, 32)

NETWORKS: Mapping[str, Network] = {
    "vgg16": Network(
        vgg16, _PHOTO, _THUMBNAIL, {"width": 16, "stages": (1, 1, 2), "classes": 10, "hidden": 64, "grid": 2}
    ),
    "vgg16_bn": Network(
        vgg16_bn,
        _PHOTO,
        _THUMBNAIL,
        {"width": 16, "stages": (1, 1, 2), "classes": 10, "hidden": 64, "grid": 2},
    ),
    "resnet18": Network(resnet18, _PHOTO, _THUMBNAIL, {"width": 16, "blocks": (2, 2), "classes": 10}),
    "resnet50": Network(resnet50, _PHOTO, _THUMBNAIL, {"width": 16, "blocks": (2, 2), "classes": 10}),
    "mobilenet_v2": Network(
        mobilenet_v2, _PHOTO, _THUMBNAIL, {"width": 16, "stages": 3, "last": 64, "classes": 10}
    ),
    "mobilenet_v3": Network(
        mobilenet_v3, _PHOTO, _THUMBNAIL, {"width": 16, "blocks": 5, "last": 64, "classes": 10}
    ),
    "densenet": Network(densenet, _PHOTO, _THUMBNAIL, {"width": 16, "blocks": (2, 2), "classes": 10}),
    "unet": Network(unet, (3, 256, 256), _THUMBNAIL, {"width": 16, "depth": 2}),
    "inception": Network(inception, _PHOTO, _THUMBNAIL, {"width": 16, "blocks": 2, "classes": 10}),
    "transformer_mlp": Network(transformer_mlp, (128, 768), (6, 64), {"width": 64, "blocks": 2}),
}
"""Every family by the name of its function."""
