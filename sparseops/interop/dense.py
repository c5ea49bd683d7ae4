"""Checkpoints with dense weights, zeros filled in: what any other tool reads."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sparseops.nn import SparseModule

SAFETENSORS = ".safetensors"


def save_dense(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the tensors of ``model`` to a file, under the names and in the shapes that they have in the model
    without sparse layers: dense weights, with zeros where they are pruned. Masks of other tools have to be
    taken out before (``take_masks``).

    A weight that has two names is written once by ``torch.save``, and under each of them in safetensors.

    Args:
        model: any module. Not changed.
        path: a name that ends in ``.safetensors`` for that format; any other is written by ``torch.save``.

    Raises:
        TypeError: model is no module; or its state dict holds something else than tensors and the file is
            safetensors.
        ValueError: a tensor is on the meta device.
        ImportError: the package safetensors is needed and not there.
    """
    check_model(model, "save_dense")
    state = dense_state(model, "save_dense")
    if Path(path).suffix == SAFETENSORS:
        write_safetensors(state, path, "save_dense")
    else:
        torch.save(state, path)


def load_dense(model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> Any:
    """Load a file of ``save_dense``, or any other that holds a state dict, into a model of ordinary or sparse
    layers. A sparse layer packs its weight, which must have the layer's pattern already.

    Meanwhile a copy of the model's tensors is kept on the CPU, from which they are put back on an error.

    Args:
        model: the model that gets the tensors.
        path: of a safetensors file if it ends in ``.safetensors``, otherwise of one that ``torch.save``
            wrote. It is read with ``weights_only``, so that it cannot run code.
        strict: whether the names must be those of the model.

    Returns:
        What ``load_state_dict`` does: the names that are missing and those that are unexpected.

    Raises:
        TypeError: model is no module, or the file holds no state dict.
        ValueError: a tensor of the model is on the meta device.
        RuntimeError: names or shapes do not fit, or a weight does not have the pattern of its sparse layer;
            the model is as before.
        ImportError: the package safetensors is needed and not there.
    """
    check_model(model, "load_dense")
    if Path(path).suffix == SAFETENSORS:
        state = safetensors("load_dense").load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise TypeError(f"load_dense: {path} must hold a state dict, got {type(state).__name__}")
    return load_all(model, state, strict, "load_dense")


def dense_state(model: nn.Module, caller: str, leave_out: Collection[str] = ()) -> dict[str, Any]:
    """The state dict of the model without sparse layers, and without the weights of the layers named."""
    with torch.inference_mode(False), torch.no_grad():
        state = dict(model.state_dict())
        dense: dict[int, nn.Module] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            prefix = f"{name}." if name else ""
            if name in leave_out:
                for key in [key for key in state if key.startswith(prefix) and key != f"{prefix}bias"]:
                    del state[key]
            elif isinstance(module, SparseModule):
                for key in module.state_dict(prefix=prefix):
                    state.pop(key, None)
                if id(module) not in dense:
                    dense[id(module)] = module.to_dense()
                state |= dense[id(module)].state_dict(prefix=prefix)
    for key, tensor in state.items():
        _check_data(key, tensor, caller)
    return state


def load_all(model: nn.Module, state: dict[str, Any], strict: bool, caller: str) -> Any:
    """``load_state_dict``, or nothing where that fails."""
    before = {}
    for key, held in model.state_dict().items():
        _check_data(key, held, caller)
        is_tensor = isinstance(held, Tensor)
        before[key] = held.detach().to("cpu", copy=True) if is_tensor else copy.deepcopy(held)
    try:
        return model.load_state_dict(state, strict=strict)
    except Exception:
        model.load_state_dict(before)
        raise


def write_safetensors(state: dict[str, Any], path: str | os.PathLike[str], caller: str) -> None:
    """A file of tensors each with memory of its own, since the format knows no other."""
    package = safetensors(caller)
    written: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{caller}: {key} must be a tensor for safetensors, got {type(tensor).__name__}")
        memory = tensor.untyped_storage().data_ptr()
        own = tensor.detach().contiguous()
        written[key] = own.clone() if memory in seen else own
        seen.add(memory)
    package.save_file(written, path, metadata={"format": "pt"})


def safetensors(caller: str) -> ModuleType:
    """The package's functions for torch."""
    try:
        import safetensors.torch
    except ImportError as exc:
        raise ImportError(f"{caller}: safetensors must be installed (pip install safetensors)") from exc
    return safetensors.torch


def check_model(model: Any, caller: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")


def _check_data(key: str, held: Any, caller: str) -> None:
    if isinstance(held, Tensor) and held.is_meta:
        raise ValueError(f"{caller}: {key} must hold data, got a tensor on the meta device")
