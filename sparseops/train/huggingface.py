"""``PrunerCallback`` for the Trainer of Hugging Face's transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from sparseops.train.pruner import Pruner

try:
    from transformers import TrainerCallback
except ImportError as exc:
    raise ImportError(
        "sparseops.train.huggingface: transformers must be installed (pip install transformers accelerate), "
        f"got {exc}"
    ) from exc
if not hasattr(TrainerCallback, "on_optimizer_step"):
    raise ImportError(
        "sparseops.train.huggingface: transformers must be 4.46 or later, whose callbacks hear of optimizer "
        "steps (pip install -U transformers), got an older one"
    )

FILE = "pruner.pt"
"""The pruner's state in the folder of a checkpoint."""


class PrunerCallback(TrainerCallback):
    """Prunes a model while a Trainer trains it::

        callback = PrunerCallback("2:4", schedule="cubic", steps=1000)
        Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
        sparse = convert(model, prune=None)

    The pruner is made when training begins (with a oneshot schedule the model is pruned then), takes a step
    after each optimizer step, and is finalized when training ends. Its state is written as ``pruner.pt`` into
    the folder of each checkpoint, and read from there when training goes on. With ``load_best_model_at_end``
    the last masks are put onto the best checkpoint, which suits a oneshot schedule.

    Args:
        plan: as of ``Pruner``.
        resume: the folder of the checkpoint that training goes on from. Default: where the Trainer would have
            written it, ``output_dir/checkpoint-N``.
        options: of ``Pruner``; its errors are raised when training begins.

    Attributes:
        pruner: the ``Pruner``, None before training; it stays for its report.

    Raises:
        FileNotFoundError: when training goes on: there is no ``pruner.pt``.
    """

    def __init__(self, plan: Any, *, resume: str | os.PathLike[str] | None = None, **options: Any) -> None:
        self.plan, self.resume, self.options = plan, resume, options
        self.pruner: Pruner | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        path = None
        if state.global_step:
            path = (_folder(args, state) if self.resume is None else Path(self.resume)) / FILE
            if not path.exists():
                raise FileNotFoundError(
                    "PrunerCallback: resume must be the folder of the checkpoint that training goes on from, "
                    f"got no {path}"
                )
        self.pruner = None  # that of a training that was broken off, which would still hold the weights
        self.pruner = Pruner(kwargs["model"], self.plan, **self.options)
        if path is not None:
            self.pruner.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    # Not on_step_end, by which the gradients are gone that some criteria learn from.
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.pruner is not None
        self.pruner.step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.pruner is not None
        if state.is_world_process_zero:
            torch.save(self.pruner.state_dict(), _folder(args, state) / FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.pruner is not None
        self.pruner.finalize()


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
