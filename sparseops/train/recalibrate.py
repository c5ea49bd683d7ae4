"""``recalibrate``: the statistics of batch norms anew, after weights in front of them have changed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sized
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparseops import _measure
from sparseops.train.batches import batches_for


def recalibrate(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """The model itself, its batch norms' running mean and variance measured afresh on ``batches``.

    A pruned layer hands other numbers to the batch norm behind it, whose statistics are those of the old
    ones. As in Ioffe and Szegedy 2015, "Batch normalization", section 3.1, they become the averages over the
    batches of each batch's mean and unbiased variance, here weighted by the number of values per channel, so
    that a short last batch counts as what it is. The mean of the first batch norm is that of all the data.
    ``num_batches_tracked`` is the number of batches. Everything but the batch norms is in evaluation mode
    (dropout is off), no weight and no training mode changes, and batch norms that were not called keep what
    they have, with a warning. On an error the model is as it was.

    Args:
        model: any module. Distributed: call it on every rank; a SyncBatchNorm has the statistics of all.
        batches: an iterable of x, (x, y) or mappings of keyword arguments, as many as describe the data (a
            few hundred samples mostly do). y is not used. They are moved to the model's device.

    Raises:
        TypeError: model is no module, or ``batches`` is no iterable of batches.
        ValueError: there is no batch, or statistics are not finite.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"recalibrate: model must be a torch.nn.Module, got {type(model).__name__}")
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not norms:
        warnings.warn(
            f"recalibrate: nothing was changed, {type(model).__name__} has no batch norm with statistics",
            stacklevel=2,
        )
        return model
    seen: dict[_BatchNorm, int] = {}
    training = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms.values()}
    old = {buffer: buffer.clone() for norm in norms.values() for buffer in norm.buffers(recurse=False)}
    hooks = [norm.register_forward_pre_hook(_weigh(seen), with_kwargs=True) for norm in norms.values()]
    try:
        model.eval()
        for norm in norms.values():
            norm.training = True
        total = len(batches) if isinstance(batches, Sized) else None
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            _measure.progress("recalibrating", total) as advance,
        ):
            for batch in batches_for(model, batches, caller="recalibrate", argument="batches"):
                _measure.run(model, batch.inputs)
                advance()
        _check_finite({name: norm for name, norm in norms.items() if norm in seen})
    except BaseException:
        for buffer, value in old.items():
            buffer.copy_(value)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, mode in training.items():
            module.training = mode
    idle = [name for name, norm in norms.items() if norm not in seen]
    if idle:
        warnings.warn(
            f"recalibrate: {', '.join(idle)} kept the old statistics, the batches do not reach them",
            stacklevel=2,
        )
    return model


def _weigh(seen: dict[_BatchNorm, int]) -> Callable[..., None]:
    """A hook by which each call of a batch norm counts in proportion to its values. seen: those so far."""

    def before_forward(norm: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        count = x.numel() // x.shape[1]
        if isinstance(norm, nn.SyncBatchNorm) and distributed.is_available() and distributed.is_initialized():
            summed = torch.tensor(count, device=x.device)
            distributed.all_reduce(summed, group=norm.process_group)
            count = int(summed)
        if norm not in seen:
            # Here and not before, so that one that no batch reaches keeps its own.
            norm.reset_running_stats()
        seen[norm] = seen.get(norm, 0) + count
        norm.momentum = count / max(1, seen[norm])

    return before_forward


def _check_finite(norms: dict[str, _BatchNorm]) -> None:
    for name, norm in norms.items():
        for key in ("running_mean", "running_var"):
            if not getattr(norm, key).isfinite().all():
                raise ValueError(
                    f"recalibrate: batches must give finite statistics, got NaN or infinity in {name}.{key}"
                )
