"""Masks that other tools left in a model: read, and the model made an ordinary one again."""

from __future__ import annotations

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

from sparseops._eligible import _computed_weight
from sparseops._measure import copy_model

PRUNE = "torch.nn.utils.prune"
FAKE_SPARSITY = "FakeSparsity"
ASP = "ASP"
ZEROS = "zeros"

UNDERSTOOD = (
    f"{PRUNE} (a parameter weight_orig and a buffer weight_mask), {FAKE_SPARSITY} parametrizations "
    f"(torch.ao.pruning, torchao), {ASP} (a buffer __weight_mma_mask)"
)

_ASP_BUFFER = re.compile(r"(?:__)?(?P<parameter>.+)_mma_mask")
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.Embedding)
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_ORDER = ("weight", *_PROJECTIONS, "bias", "in_proj_bias", "bias_k", "bias_v")
# A lone zero is chance, such as a small number that became zero in 16 bits.
_MIN_ZEROS = 0.01


@dataclass(frozen=True, eq=False)
class TakenMasks:
    """What ``take_masks`` found.

    Attributes:
        model: the model without the tools; weights are plain parameters with zeros.
        masks: by the parameter's name in ``model`` (of a tied weight the first), a bool tensor of its
            shape, True where it is kept.
        sources: by the same name, the tool: "torch.nn.utils.prune", "FakeSparsity", "ASP" or "zeros".
        notes: what was left as it is, and why.
    """

    model: nn.Module
    masks: dict[str, Tensor]
    sources: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """A line for each mask: parameter, share that is kept, tool; then the notes."""
        width = max(map(len, self.masks))
        rows = [
            f"{name:<{width}}  {_share(mask):6.1%} kept  {self.sources[name]}"
            for name, mask in self.masks.items()
        ]
        return "\n".join([*rows, *self.notes])


@dataclass(frozen=True, eq=False)
class _Found:
    """A mask. holder, key: the module whose parameter it is, and the parameter's name there, both once the
    tool is gone. original: the parameter. shared: whether the tool's zeros are in ``original`` itself, so
    that all who hold it see them."""

    name: str
    holder: nn.Module
    key: str
    original: nn.Parameter
    mask: Tensor
    source: str
    shared: bool = False


def take_masks(model: nn.Module, *, zeros: bool = False, inplace: bool = False) -> TakenMasks:
    """Find the masks that another pruning tool put into a model, and make the model an ordinary one with
    zeros in its weights::

        taken = take_masks(model)
        pruner = sparseops.Pruner(taken.model, taken.masks)    # to train on with these masks
        sparse = sparseops.convert(taken.model, prune=None)    # or to pack

    The tool's parameters, buffers, hooks and parametrizations are removed; other hooks stay. The model
    computes what it did before. Understood are ``torch.nn.utils.prune``, also iterative and of biases;
    parametrizations ``FakeSparsity``, which the sparsifiers of ``torch.ao.pruning`` add; and buffers
    ``__weight_mma_mask`` beside a weight, which ASP (NVIDIA apex) adds. ASP's change of the optimizer's
    ``step`` is not undone, so make a new optimizer.

    Args:
        model: any module. Not changed unless ``inplace``; on an error never changed.
        zeros: take the zeros of every other weight of a linear, convolution, recurrent or embedding layer as
            its mask too, if they are at least a hundredth of it or a whole channel. A weight that is all
            zero is left out: it is one that has not been trained yet.
        inplace: change ``model`` itself; its parameters stay the same objects, but one that a tool masks in
            one layer and that another layer uses without a mask: there the masked layer gets its own.

    Raises:
        TypeError: model is no module.
        ValueError: there is no mask; a mask holds other values than 0 and 1 or does not fit its weight; or a
            weight is on the meta device.
        RuntimeError: the model cannot be copied (which ``inplace`` does not do).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"take_masks: model must be a torch.nn.Module, got {type(model).__name__}")
    with torch.inference_mode(False), torch.no_grad():
        if not inplace:
            model = copy_model(model, _computed(model), "take_masks")
        found = [*_of_tools(model)]
        known = {id(one.original) for one in found}
        if zeros:
            found += _of_zeros(model, known)
        if not found:
            cure = "" if zeros else "; zeros=True takes the zeros of plain weights"
            raise ValueError(
                "take_masks: model must hold the masks of a tool that is understood "
                f"({UNDERSTOOD}{cure}), got none"
            )
        kept = [_check(one) for one in found]
        notes = _bake(model, found, kept)
        notes += _left_alone(model)
        names = {id(p): name for name, p in model.named_parameters()}
        masks: dict[str, Tensor] = {}
        sources: dict[str, str] = {}
        for one, mask in zip(found, kept, strict=True):
            name = names[id(one.holder.get_parameter(one.key))]
            masks[name] = masks[name] & mask if name in masks else mask
            sources.setdefault(name, one.source)
    if notes:
        warnings.warn(f"take_masks: {'; '.join(notes)}", stacklevel=2)
    return TakenMasks(model, masks, sources, notes)


def _share(mask: Tensor) -> float:
    return int(mask.sum()) / max(mask.numel(), 1)


def _computed(model: nn.Module) -> dict[int, Tensor]:
    """A memo for deepcopy, which refuses the weights that a hook computed and left in the module."""
    values = [value for module in model.modules() for value in vars(module).values()]
    held = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return {id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and not t.is_leaf}


def _of_tools(model: nn.Module) -> Iterator[_Found]:
    for prefix, module in model.named_modules():
        start = f"{prefix}." if prefix else ""
        for key, original in module._parameters.items():
            name = key.removesuffix("_orig")
            mask = module._buffers.get(f"{name}_mask")
            if name != key and original is not None and mask is not None:
                yield _Found(start + name, module, name, original, mask, PRUNE)
        if parametrize.is_parametrized(module):
            for key, steps in _parametrizations(module):
                if all(map(_is_fake_sparsity, steps)):
                    mask = torch.stack([step.mask for step in steps]).prod(0)
                    yield _Found(start + key, module, key, steps.original, mask, FAKE_SPARSITY)
        for key, mask in module._buffers.items():
            matched = _ASP_BUFFER.fullmatch(key)
            if matched is None or mask is None:
                continue
            name, original = _parameter_of_asp(module, matched["parameter"], start + key)
            yield _Found(start + name, module, name, original, mask, ASP, shared=True)


def _parametrizations(module: Any) -> list[tuple[str, Any]]:
    return list(module.parametrizations.items())


def _is_fake_sparsity(step: nn.Module) -> bool:
    # By name: torch.ao.pruning is moving to torchao, and either may be absent.
    return type(step).__name__ == FAKE_SPARSITY and isinstance(step._buffers.get("mask"), Tensor)


def _parameter_of_asp(module: nn.Module, last: str, buffer: str) -> tuple[str, nn.Parameter]:
    """The parameter that ASP's buffer belongs to: the buffer's name has the last part of its name alone."""
    named = dict(module.named_parameters())
    candidates = [last] if last in named else [name for name in named if name.split(".")[-1] == last]
    if len(candidates) != 1:
        raise ValueError(
            f"take_masks: {buffer} must belong to one parameter {last!r} of its module, "
            f"got {', '.join(candidates) or 'none'}"
        )
    return candidates[0], named[candidates[0]]


def _of_zeros(model: nn.Module, known: set[int]) -> Iterator[_Found]:
    for prefix, module in model.named_modules():
        if not isinstance(module, _LAYERS) or _computed_weight(module) is not None:
            continue
        for key, weight in module._parameters.items():
            if weight is None or id(weight) in known or weight.dim() < 2:
                continue
            known.add(id(weight))
            if not weight.is_meta and _is_pattern(weight == 0):
                name = f"{prefix}.{key}" if prefix else key
                yield _Found(name, module, key, weight, weight != 0, ZEROS, shared=True)


def _is_pattern(is_zero: Tensor) -> bool:
    if is_zero.all():
        return False
    rows = (is_zero.flatten(1), is_zero.transpose(0, 1).flatten(1))
    return _share(is_zero) >= _MIN_ZEROS or any(bool(row.all(1).any()) for row in rows)


def _check(found: _Found) -> Tensor:
    """The mask as a bool tensor of its own, on the weight's device."""
    weight, mask = found.original, found.mask
    if weight.is_meta or mask.is_meta:
        raise ValueError(f"take_masks: {found.name} must hold data, got a tensor on the meta device")
    if mask.shape != weight.shape:
        raise ValueError(
            f"take_masks: the mask of {found.name} must have shape {tuple(weight.shape)}, "
            f"got {tuple(mask.shape)}"
        )
    other = (mask != 0) & (mask != 1)
    if other.any():
        raise ValueError(
            f"take_masks: the mask of {found.name} must hold only 0 and 1, got {mask[other][0].item()}"
        )
    return (mask != 0).to(weight.device, copy=True)


def _bake(model: nn.Module, found: list[_Found], masks: list[Tensor]) -> list[str]:
    """Take the tools out and put the zeros in; returns notes."""
    notes: list[str] = []
    holders = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    by_original: dict[int, list[tuple[_Found, Tensor]]] = defaultdict(list)
    for one, mask in zip(found, masks, strict=True):
        by_original[id(one.original)].append((one, mask))
    for key, group in by_original.items():
        is_alike = len(group) == holders[key] and all(torch.equal(mask, group[0][1]) for _, mask in group)
        for one, mask in group:
            weight = one.original
            if not (one.shared or is_alike):
                weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
                notes.append(
                    f"{one.name} is no longer one weight with another layer's, which has other zeros"
                )
            weight.masked_fill_(~mask, 0)
            _take_out(one, weight)
    return notes


def _take_out(found: _Found, weight: nn.Parameter) -> None:
    module, key = found.holder, found.key
    if found.source == PRUNE:
        for number, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, BasePruningMethod):
                del module._forward_pre_hooks[number]
        del module._parameters[f"{key}_orig"]
        _drop_buffer(module, f"{key}_mask")
    elif found.source == FAKE_SPARSITY:
        # A copied module shares the class that torch made for it, and torch changes that class.
        made = type(module)
        module.__class__ = type(made.__name__, made.__bases__, dict(vars(made)))
        parametrize.remove_parametrizations(module, key, leave_parametrized=False)
    elif found.source == ASP:
        last = key.split(".")[-1]
        for buffer in [f"{start}{last}_mma_{end}" for start in ("__", "") for end in ("mask", "pruned_p")]:
            _drop_buffer(module, buffer)
    if not found.shared:
        setattr(module, key, weight)
        _order(module)


def _drop_buffer(module: nn.Module, name: str) -> None:
    module._buffers.pop(name, None)
    module._non_persistent_buffers_set.discard(name)


def _order(module: nn.Module) -> None:
    """Parameters in the order of an ordinary layer: an optimizer's state dict goes by it."""
    if not isinstance(module, (*_LAYERS, nn.MultiheadAttention)):
        return
    recurrent = module if isinstance(module, nn.RNNBase) else None
    for name in recurrent._flat_weights_names if recurrent else _ORDER:
        if name in module._parameters:
            module._parameters[name] = module._parameters.pop(name)
    if recurrent:
        recurrent.flatten_parameters()


def _left_alone(model: nn.Module) -> list[str]:
    """Weights that something else computes."""
    notes = []
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for key, steps in _parametrizations(module):
                kinds = ", ".join(type(step).__name__ for step in steps)
                notes.append(
                    f"{name + '.' if name else ''}{key} is parametrized by {kinds} and left as it is"
                )
        elif isinstance(module, _LAYERS) and (cure := _computed_weight(module)) is not None:
            notes.append(f"the weight of {name or 'the model'} is computed and left as it is: {cure}")
    return notes
