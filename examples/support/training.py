"""Batches, a plain training loop, and the numbers that examples judge a network by."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn


class Batches:
    """Pairs (x, y) of random examples, another order in each epoch, the same ones in each run.

    tensors: of the inputs, and of the targets as the last, all of one length. With several inputs x is the
    tuple of them. A smaller last batch is left out. change: does something random to x, such as
    :func:`mirrored`.
    """

    def __init__(
        self,
        *tensors: Tensor,
        size: int,
        seed: int = 0,
        change: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    ) -> None:
        if len(tensors) < 2 or len({len(t) for t in tensors}) > 1:
            got = [tuple(t.shape) for t in tensors]
            raise ValueError(f"Batches: tensors must be at least two of one length, got shapes {got}")
        if not 1 <= size <= len(tensors[0]):
            raise ValueError(f"Batches: size must be from 1 to {len(tensors[0])}, got {size}")
        self.tensors, self.size, self.change = tensors, size, change
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.tensors[0]) // self.size

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        order = torch.randperm(len(self.tensors[0]), generator=self.generator)
        for chosen in order[: len(self) * self.size].split(self.size):
            *inputs, y = (t[chosen] for t in self.tensors)
            if self.change is not None:
                inputs[0] = self.change(inputs[0], self.generator)
            yield inputs[0] if len(inputs) == 1 else tuple(inputs), y


def mirrored(x: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the pictures [N, C, H, W], left and right exchanged."""
    chosen = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
    return torch.where(chosen, x.flip(3), x)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    loss: Callable[[nn.Module, Any], Tensor],
    epochs: int,
    after_step: Callable[[], object] = lambda: None,
) -> None:
    """``epochs`` times through the batches, with the optimizer's rate in one cycle.

    loss: of a model and a batch, as ``fit_sparse`` has it. after_step: called after each step of the
    optimizer. Leaves the model in evaluation mode.
    """
    steps = epochs * len(batches)
    schedule = one_cycle(optimizer, steps)
    model.train()
    for batch in _shown((batch for _ in range(epochs) for batch in batches), steps):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
        schedule.step()
        after_step()
    model.eval()


def sgd(parameters: list[nn.Parameter], rate: float = 0.02) -> torch.optim.SGD:
    """For networks of convolutions and batch norms: with a rate of 0.1 from nothing, and this one after
    pruning."""
    return torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=5e-4, nesterov=True)


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of a classifier on a batch of inputs and classes, as ``fit_sparse`` has it."""
    x, y = batch
    return F.cross_entropy(model(x), y)


def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
    """The rate rises to the optimizer's and falls to nothing (Smith and Topin 2017, arXiv:1708.07120)."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps)


def _shown(batches: Iterable[Any], steps: int) -> Iterable[Any]:
    """With a progress bar on a terminal."""
    console = Console(stderr=True)
    return track(batches, "training", steps, console=console, disable=not sys.stderr.isatty())


@torch.no_grad()
def outputs(model: nn.Module, *inputs: Tensor, size: int = 500) -> Any:
    """The outputs for all of the inputs, ``size`` at a time; a tuple where the model gives one. Puts the
    model into evaluation mode."""
    model.eval()
    parts = [model(*some) for some in zip(*(t.split(size) for t in inputs), strict=True)]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def accuracy(logits: Tensor, y: Tensor) -> float:
    """Share of ``y`` [N] that the logits [N, classes] have right."""
    return (logits.argmax(1) == y).double().mean().item()


def rmse(predicted: Tensor, y: Tensor) -> float:
    """Root of the mean squared error."""
    return (predicted - y).double().square().mean().sqrt().item()


def dice(logits: Tensor, y: Tensor) -> float:
    """Overlap of the classes from 1 on, 2 |A and B| / (|A| + |B|), averaged over them. logits [N, classes, H,
    W], y [N, H, W]."""
    found = logits.argmax(1)
    shares = []
    for kind in range(1, logits.shape[1]):
        a, b = found == kind, y == kind
        shares.append(2 * (a & b).sum() / (a.sum() + b.sum()))
    return torch.stack(shares).mean().item()


def psnr(found: Tensor, wanted: Tensor, peak: float) -> float:
    """Peak signal to noise, in dB, of pictures whose values lie ``peak`` apart; infinite for equal ones."""
    return (10 * (peak**2 / (found - wanted).double().square().mean()).log10()).item()


def linear_probe(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, penalty: float = 0.1) -> float:
    """Accuracy on the second pair of a logistic regression that was fitted to the first: what a linear layer
    can read in the embeddings [N, D]. penalty: of the squared weights, against the sum of the losses."""
    head = nn.Linear(x.shape[1], int(y.max()) + 1)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x), y, reduction="sum") + penalty / 2 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return accuracy(outputs(head, test_x), test_y)
