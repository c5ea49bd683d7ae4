"""Weights that several processes hold: whole ones, and each process's part of them.

Under ``fully_shard`` (FSDP2) a parameter is a DTensor of which a process holds some rows; under
DistributedDataParallel every process holds all of it. A plain tensor passes through these functions as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_shared() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_sharded(parameters: Iterable[Tensor | None]) -> bool:
    """Whether one of them is spread over processes."""
    return any(hasattr(p, "placements") for p in parameters)


def local(t: Tensor) -> Tensor:
    """This process's part of a parameter, in the same memory."""
    part: Tensor = t.to_local() if hasattr(t, "to_local") else t
    return part


def whole(t: Tensor) -> Tensor:
    """All of it, without gradient; every process of the mesh has to ask."""
    full: Tensor = t.detach()
    if hasattr(full, "full_tensor"):
        full = full.full_tensor()
    return full


def whole_like(parameter: Any, part: Tensor) -> Tensor:
    """All of a tensor that is spread as ``parameter`` is, from each process's part."""
    if not hasattr(parameter, "placements"):
        return part
    from torch.distributed.tensor import DTensor

    spread = DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return spread.full_tensor()


def local_like(parameter: Any, full: Tensor) -> Tensor:
    """This process's part of a whole tensor, spread as ``parameter`` is."""
    if not hasattr(parameter, "placements"):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, parameter.device_mesh, parameter.placements).to_local()


def assign(parameter: Tensor, full: Tensor) -> None:
    """Give a parameter these values, or this process's part of it."""
    with torch.no_grad():
        local(parameter).copy_(local_like(parameter, full.to(parameter.dtype)))


def agreed(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of the first process, on all of them."""
    if is_shared():
        for mask in masks.values():
            dist.broadcast(mask, 0)
    return dict(masks)
