"""``PrunerCallback`` for the Trainer of Lightning, by either of its names: lightning, pytorch_lightning."""

from __future__ import annotations

import copy
import importlib
from typing import Any

from sparseops.train.pruner import Pruner


def _callback_classes() -> tuple[type, ...]:
    """Of both packages, since a Trainer takes a lone callback of its own package only."""
    found, missing = [], None
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            found.append(importlib.import_module(name).Callback)
        except ImportError as exc:
            missing = exc
    if not found:
        raise ImportError(
            f"sparseops.train.lightning: lightning must be installed (pip install lightning), got {missing}"
        ) from missing
    return tuple(found)


class PrunerCallback(*_callback_classes()):  # type: ignore[misc]
    """Prunes a LightningModule while a Trainer trains it::

        callback = PrunerCallback("2:4", schedule="cubic", steps=1000)
        Trainer(callbacks=[callback], max_steps=2000).fit(module, loader)
        sparse = convert(module, prune=None)

    The pruner is made when training starts (with a oneshot schedule the module is pruned then), takes a step
    after each batch in which an optimizer took one (one step also where several did, as those of a GAN do),
    and is finalized when training ends. Its state is part of the Trainer's checkpoints, and comes back with
    ``fit(ckpt_path=...)``.

    Args:
        plan: as of ``Pruner``; layers have the names that they have in the LightningModule.
        options: of ``Pruner``; its errors are raised when training starts.

    Attributes:
        pruner: the ``Pruner``, None before training; it stays for its report.
    """

    def __init__(self, plan: Any, **options: Any) -> None:
        super().__init__()
        self.plan, self.options = plan, options
        self.pruner: Pruner | None = None
        self._loaded: dict[str, Any] | None = None
        self._last: dict[str, Any] = {}
        self._is_over = True
        self._seen = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self.pruner = None  # that of a training that was broken off, which would still hold the weights
        self.pruner = Pruner(pl_module, self.plan, **self.options)
        self._is_over = False
        self._load()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._seen = trainer.global_step

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Gradients may be gathered over several batches.
        if trainer.global_step != self._seen:
            self._seen = trainer.global_step
            assert self.pruner is not None
            self.pruner.step()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        assert self.pruner is not None
        # For checkpoints that are written after this, from which training may go on.
        self._last = copy.deepcopy(self.pruner.state_dict())
        self._is_over = True
        self.pruner.finalize()

    def state_dict(self) -> dict[str, Any]:
        return self._last if self._is_over or self.pruner is None else self.pruner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict
        if not self._is_over:
            # Strategies that shard the module restore it after on_fit_start.
            self._load()

    def _load(self) -> None:
        if self._loaded and self.pruner is not None:
            self.pruner.load_state_dict(self._loaded)
        self._loaded = None
