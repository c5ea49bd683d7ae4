"""What hears of the course of ``fit_sparse``: ``Callback``, and those that write it down."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparseops.train.result import FitResult


class Callback:
    """What is called as a fit goes on; each method does nothing here. What one raises ends the fit.

    every: ``on_step`` is called at each ``every``-th step alone, since to read a loss waits for the GPU.
    """

    every: int = 1

    def on_start(self, options: Mapping[str, Any]) -> None:
        """Before anything is done. options: plan, rounds, steps and so on, as numbers and strings."""

    def on_round(self, step: int, number: int, strength: float) -> None:
        """A round begins, counted from 1, after so many steps. strength: the share of the plan that it
        prunes."""

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        """An optimizer step is done, counted from 1 through all rounds. values: "loss", "loss/task" for named
        ones, "distillation", "sparsity", "learning_rate", "gradient_norm"; those that there are."""

    def on_evaluate(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        """The model was evaluated after so many steps. stage: "dense", "pruned", "recalibrated" or
        "retrained". metrics: by task."""

    def on_end(self, result: FitResult | None) -> None:
        """All is done; result is None where an error ended it."""


class _Logger(Callback):
    """Writes values by name down, with the step."""

    def __init__(self, every: int) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"{type(self).__name__}: every must be an integer of at least 1, got {every!r}")
        self.every = every

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Implemented by each."""
        raise NotImplementedError

    def on_round(self, step: int, number: int, strength: float) -> None:
        self.write(step, {"round": float(number), "strength": strength})

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        self.write(step, {f"train/{name}": value for name, value in values.items()})

    def on_evaluate(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        self.write(step, {f"{stage}/{task}": value for task, value in metrics.items()})


class CSVLogger(_Logger):
    """Writes a table with the columns step, name and value to a file, which is made anew.

    path: of the file. every: steps between two that are written.
    """

    def __init__(self, path: str | os.PathLike[str], *, every: int = 1) -> None:
        super().__init__(every)
        self.path = path
        self._file: IO[str] | None = None

    def on_start(self, options: Mapping[str, Any]) -> None:
        # By line, so that what was written is there after a crash.
        self._file = open(self.path, "w", newline="", buffering=1)
        csv.writer(self._file).writerow(("step", "name", "value"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        assert self._file is not None
        csv.writer(self._file).writerows((step, name, value) for name, value in values.items())

    def on_end(self, result: FitResult | None) -> None:
        if self._file is not None:
            self._file.close()


class TensorBoardLogger(_Logger):
    """Writes scalars for TensorBoard.

    target: a folder, or a ``torch.utils.tensorboard.SummaryWriter`` of yours, which stays open.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, target: str | os.PathLike[str] | Any, *, every: int = 1) -> None:
        super().__init__(every)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as exc:
            raise ImportError(
                f"TensorBoardLogger: tensorboard must be installed (pip install tensorboard), got {exc}"
            ) from exc
        self._make = SummaryWriter
        self.target = target
        self._is_own = isinstance(target, (str, os.PathLike))
        self._writer: Any = None if self._is_own else target

    def on_start(self, options: Mapping[str, Any]) -> None:
        if self._is_own:
            self._writer = self._make(os.fspath(self.target))
        self._writer.add_text("options", "\n".join(f"    {name}: {v}" for name, v in options.items()))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def on_end(self, result: FitResult | None) -> None:
        if self._is_own and self._writer is not None:
            self._writer.close()
        elif self._writer is not None:
            self._writer.flush()


class WandbLogger(_Logger):
    """Logs to Weights & Biases.

    run: a run of yours, which stays open; None for one that ``wandb.init(**init)`` makes. every: steps
    between two that are logged.

    Raises:
        ImportError: there is no run, and wandb is not installed.
        ValueError: both a run and options of ``init`` are given.
    """

    def __init__(self, run: Any = None, *, every: int = 1, **init: Any) -> None:
        super().__init__(every)
        if run is not None and init:
            raise ValueError(
                f"WandbLogger: run must be None with options of wandb.init, got both ({', '.join(init)})"
            )
        if run is None:
            try:
                import wandb
            except ImportError as exc:
                raise ImportError(
                    f"WandbLogger: wandb must be installed (pip install wandb), got {exc}"
                ) from exc
            self._make = wandb.init
        self.run, self._is_own, self._init = run, run is None, init

    def on_start(self, options: Mapping[str, Any]) -> None:
        if self._is_own:
            self.run = self._make(**self._init)
        self.run.config.update(dict(options))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def on_end(self, result: FitResult | None) -> None:
        if self._is_own and self.run is not None:
            self.run.finish(exit_code=0 if result is not None else 1)
