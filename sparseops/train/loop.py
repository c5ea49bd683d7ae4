"""One round of training: batches through a model, with mixed precision, a teacher and a pruner."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sparseops.train.distill import Distiller
from sparseops.train.pruner import Pruner

PRECISIONS: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}

Values: TypeAlias = dict[str, Tensor]
"""Scalars by name, without gradients."""


@dataclass(frozen=True)
class Step:
    """What an optimizer step gave. losses: "loss", which was minimised, and what it is made of. others: the
    learning rate, and the norm of the gradients where it is limited."""

    losses: Values
    others: Mapping[str, Tensor | float]


@dataclass(frozen=True)
class Loop:
    """What a round consists of; the arguments of ``fit_sparse``.

    train: (model, batch) -> a scalar loss, or several by name. steps: optimizer steps of a round.
    """

    train: Callable[[nn.Module, Any], Tensor | Mapping[str, Tensor]]
    batches: Iterable[Any]
    steps: int
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None
    lr_schedule: Callable[[torch.optim.Optimizer, int], Any] | None = None
    loss_weights: Mapping[str, float] | None = None
    distill: Distiller | None = None
    precision: str | None = None
    clip: float | None = None

    def run(self, model: nn.Module, pruner: Pruner) -> Iterator[Step]:
        """Train the model, step by step.

        Raises:
            TypeError: ``train`` gives something else than scalars.
            ValueError: batches run out; no loss has the name of a weight; or nothing is trained.
        """
        model.train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        if not parameters:
            raise ValueError("fit_sparse: model must have parameters that require gradients, got none")
        device = parameters[0].device
        optimizer = (self.optimizer or _adamw)(parameters)
        schedule = self.lr_schedule(optimizer, self.steps) if self.lr_schedule is not None else None
        scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        seen: set[str] = set()
        for batch in self._endless_batches():
            optimizer.zero_grad(set_to_none=True)
            loss, losses = self._loss(model, batch, device)
            seen.update(losses)
            scaler.scale(loss).backward()
            if all(p.grad is None for p in parameters):
                raise ValueError(
                    "fit_sparse: train must compute the loss with the model that it is given (a copy), "
                    "got one that depends on none of its parameters"
                )
            scaler.unscale_(optimizer)
            others: dict[str, Tensor | float] = {"learning_rate": optimizer.param_groups[0]["lr"]}
            if self.clip is not None:
                others["gradient_norm"] = nn.utils.clip_grad_norm_(parameters, self.clip)
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            pruner.step()
            # The first steps of fp16 may be left out, until the scale is found; a schedule counts the others.
            if schedule is not None and scaler.get_scale() >= scale:
                schedule.step()
            yield Step(losses, others)
        # Not before, since a step may give the losses of some of the tasks alone.
        if unknown := {f"loss/{name}" for name in self.loss_weights or ()} - seen:
            raise ValueError(
                f"fit_sparse: loss_weights must name losses that train gives, {sorted(seen)}, "
                f"got {sorted(unknown)}"
            )

    def _loss(self, model: nn.Module, batch: Any, device: torch.device) -> tuple[Tensor, Values]:
        dtype = None if self.precision is None else PRECISIONS[self.precision]
        watch = self.distill.watch(model) if self.distill is not None else nullcontext()
        with watch as distilled, torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            found = self.train(model, batch)
            named = found if isinstance(found, Mapping) else {"": found}
            losses = {name: _scalar(loss, name) for name, loss in named.items()}
            total = self._sum(losses)
            values = {f"loss/{name}": loss.detach() for name, loss in losses.items() if name}
            if self.distill is not None and distilled is not None:
                distillation = distilled()
                values["distillation"] = distillation.detach()
                total = self.distill.mix(total, distillation)
        return total, {"loss": total.detach(), **values}

    def _sum(self, losses: Mapping[str, Tensor]) -> Tensor:
        weights = self.loss_weights or {}
        return torch.stack([weights.get(name, 1.0) * loss for name, loss in losses.items()]).sum()

    def _endless_batches(self) -> Iterator[Any]:
        iterator = iter(self.batches)
        for _ in range(self.steps):
            try:
                batch = next(iterator)
            except StopIteration:
                iterator = iter(self.batches)
                try:
                    batch = next(iterator)
                except StopIteration:
                    raise ValueError(
                        "fit_sparse: batches must begin again when they end (a list, a DataLoader), "
                        f"got a {type(self.batches).__name__} that is used up"
                    ) from None
            yield batch


def _adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def _scalar(loss: Any, name: str) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"one of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(
            "fit_sparse: train must give a tensor with one element"
            + (f" for {name!r}" if name else "")
            + f", got {found}"
        )
    return loss.reshape(())
