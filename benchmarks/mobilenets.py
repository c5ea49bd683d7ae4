"""MobileNetV2 (Sandler et al., arXiv:1801.04381) and MobileNetV3 (Howard et al., arXiv:1905.02244)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.network_parts import conv_norm, seeded


class SqueezeExcite(nn.Module):
    """Scales each channel by a hard sigmoid of two 1x1 convolutions of the channels' means."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.activation = nn.ReLU()
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.scale_activation = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x)))))


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, squeeze and excite or not, 1x1 projection, shortcut or not."""

    def __init__(
        self,
        inputs: int,
        expanded: int,
        outputs: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        squeeze: bool = False,
        activation: type[nn.Module] = nn.ReLU6,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if expanded != inputs:
            layers.append(conv_norm(inputs, expanded, 1, activation=activation()))
        layers.append(
            conv_norm(expanded, expanded, kernel, stride=stride, groups=expanded, activation=activation())
        )
        if squeeze:
            layers.append(SqueezeExcite(expanded, max(8, (expanded // 4 + 4) // 8 * 8)))
        layers.append(conv_norm(expanded, outputs, 1, activation=None))
        self.block = nn.Sequential(*layers)
        self.use_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.use_shortcut else self.block(x)


class MobileNet(nn.Module):
    """Convolutions, an average, and a head of linear layers."""

    def __init__(self, features: nn.Sequential, classifier: nn.Sequential) -> None:
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


@seeded
def mobilenet_v2(width: int = 32, stages: int = 7, last: int = 1280, classes: int = 1000) -> MobileNet:
    """MobileNetV2, ReLU6. ``stages``: how many of the seven rows of the paper's table 2."""
    table = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    layers: list[nn.Module] = [conv_norm(3, width, 3, stride=2, activation=nn.ReLU6(inplace=True))]
    channels = width
    for expand, base, count, stride in table[:stages]:
        outputs = max(8, base * width // 32 // 8 * 8)
        for number in range(count):
            step = 1 if number else stride
            layers.append(InvertedResidual(channels, channels * expand, outputs, stride=step))
            channels = outputs
    layers.append(conv_norm(channels, last, 1, activation=nn.ReLU6(inplace=True)))
    return MobileNet(nn.Sequential(*layers), nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes)))


@seeded
def mobilenet_v3(width: int = 16, blocks: int = 11, last: int = 1024, classes: int = 1000) -> MobileNet:
    """MobileNetV3-Small, hard swish. ``blocks``: how many of the eleven in the paper's table 2."""
    table = (
        (3, 16, 16, True, nn.ReLU, 2),
        (3, 72, 24, False, nn.ReLU, 2),
        (3, 88, 24, False, nn.ReLU, 1),
        (5, 96, 40, True, nn.Hardswish, 2),
        (5, 240, 40, True, nn.Hardswish, 1),
        (5, 240, 40, True, nn.Hardswish, 1),
        (5, 120, 48, True, nn.Hardswish, 1),
        (5, 144, 48, True, nn.Hardswish, 1),
        (5, 288, 96, True, nn.Hardswish, 2),
        (5, 576, 96, True, nn.Hardswish, 1),
        (5, 576, 96, True, nn.Hardswish, 1),
    )
    layers: list[nn.Module] = [conv_norm(3, width, 3, stride=2, activation=nn.Hardswish(inplace=True))]
    channels = width
    for kernel, *sizes, squeeze, activation, stride in table[:blocks]:
        expanded, outputs = (max(8, size * width // 16 // 8 * 8) for size in sizes)
        layers.append(
            InvertedResidual(
                channels,
                expanded,
                outputs,
                kernel=kernel,
                stride=stride,
                squeeze=squeeze,
                activation=activation,
            )
        )
        channels = outputs
    layers.append(conv_norm(channels, 6 * channels, 1, activation=nn.Hardswish(inplace=True)))
    head = (nn.Linear(6 * channels, last), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(last, classes))
    return MobileNet(nn.Sequential(*layers), nn.Sequential(*head))
