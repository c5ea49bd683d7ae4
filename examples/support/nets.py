"""Small nets that an example trains itself, in minutes on two cores: wide enough that pruning pays."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.data import lengths


def conv_norm(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    """A convolution that keeps the size (but for the stride), and a batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def vgg_trunk() -> OrderedDict[str, nn.Module]:
    """Pictures [N, 1, 28, 28] -> [N, 256]. The first layer sees squares of 2x2 pixels as channels, which
    takes a quarter of the time."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(squares=nn.PixelUnshuffle(2))
    inputs = 4
    for i, outputs in enumerate((64, 128, 128), 1):
        if i > 1:
            layers[f"pool{i}"] = nn.MaxPool2d(2)
        layers[f"conv{i}"], layers[f"norm{i}"] = conv_norm(inputs, outputs)
        layers[f"relu{i}"] = nn.ReLU()
        inputs = outputs
    layers |= {"flatten": nn.Flatten(), "hidden": nn.Linear(1152, 256), "relu4": nn.ReLU()}
    return layers


def vgg() -> nn.Sequential:
    """After VGG (Simonyan and Zisserman 2015): [N, 1, 28, 28] -> logits [N, 10]; 0.5 million parameters."""
    return nn.Sequential(vgg_trunk() | {"classes": nn.Linear(256, 10)})


class TwoTasks(nn.Module):
    """What is it, and how many quarters is it turned by (Gidaris et al. 2018, arXiv:1803.07728)? One trunk
    for both: [N, 1, 28, 28] -> logits [N, 10] and logits [N, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(vgg_trunk())
        self.kind = nn.Linear(256, 10)
        self.turn = nn.Linear(256, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.trunk(x)
        return self.kind(y), self.turn(y)


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016): a 1x1 convolution where sizes differ."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            *conv_norm(inputs, outputs, 3, stride), nn.ReLU(), *conv_norm(outputs, outputs)
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Sequential(*([] if same else conv_norm(inputs, outputs, 1, stride)))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.path(x) + self.shortcut(x))


def resnet() -> nn.Sequential:
    """[N, 1, 28, 28] -> logits [N, 10]; 0.3 million parameters."""
    return nn.Sequential(
        *(nn.PixelUnshuffle(2), *conv_norm(4, 64), nn.ReLU(), nn.MaxPool2d(2)),
        *(Block(64, 64, 1), Block(64, 128, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)),
    )


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015, arXiv:1505.04597): [N, 1, H, W] -> logits [N, classes, H, W]; H and W
    are multiples of 4."""

    def __init__(self, classes: int = 3, widths: Sequence[int] = (32, 64, 128)) -> None:
        super().__init__()
        self.down, self.up, self.join = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        inputs = 1
        for width in widths:
            self.down.append(self.stage(inputs, width))
            inputs = width
        for width in reversed(widths[:-1]):
            self.up.append(nn.ConvTranspose2d(inputs, width, 2, 2))
            self.join.append(self.stage(2 * width, width))
            inputs = width
        self.output = nn.Conv2d(inputs, classes, 1)

    @staticmethod
    def stage(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(*conv_norm(inputs, outputs), nn.ReLU(), *conv_norm(outputs, outputs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        skipped: list[Tensor] = []
        for stage in self.down:
            if skipped:
                x = F.max_pool2d(x, 2)
            x = stage(x)
            skipped.append(x)
        skipped.pop()
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([skipped.pop(), up(x)], 1))
        return self.output(x)


class Recommender(nn.Module):
    """Users and films [N, 2] -> stars [N]: the product of two embeddings beside an MLP of both, after neural
    matrix factorisation (He et al. 2017, arXiv:1708.05031)."""

    def __init__(self, users: int = 943, films: int = 1682, width: int = 128) -> None:
        super().__init__()
        self.users, self.films = nn.Embedding(users, width), nn.Embedding(films, width)
        self.mlp = mlp(2 * width, (512, 256, 128), 1)
        self.mean = nn.Parameter(torch.tensor(3.5))
        for table in (self.users, self.films):
            nn.init.normal_(table.weight, std=0.05)

    def forward(self, pairs: Tensor) -> Tensor:
        user, film = self.users(pairs[:, 0]), self.films(pairs[:, 1])
        return self.mean + (user * film).sum(1) + self.mlp(torch.cat([user, film], 1)).squeeze(1)


class SeriesClassifier(nn.Module):
    """Series [N, T, inputs], zeros behind the end of each -> logits [N, classes], from the state of an LSTM
    of two layers at the end of each."""

    def __init__(self, inputs: int = 12, width: int = 256, classes: int = 9) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, width, 2, batch_first=True, dropout=0.3)
        self.output = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        last = lengths(x) - 1
        return self.output(self.lstm(x)[0][torch.arange(len(x), device=x.device), last])


def mlp(inputs: int, widths: Sequence[int], outputs: int, dropout: float = 0.2) -> nn.Sequential:
    """[N, inputs] -> [N, outputs]."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(dropout)]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))
