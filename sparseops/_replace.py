"""Putting layers in the place of others: what they take over, and wherever a model refers to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from functools import partial
from typing import Any

from torch import nn

from sparseops import _measure
from sparseops.report import Report

REPORT = "_sparseops_report"
"""The attribute of a model that holds what convert wrote down."""

PLAN = "_sparseops_plan"
"""The attribute of a model that holds the plan by which it was pruned, for convert to go by."""

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_HOOK_OPTIONS = (
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_is_full_backward_hook",
)
# What a layer has for itself alone; its counterpart does without.
_OF_ONE_KIND = {
    "_all_weights",
    "_buffer_names",
    "_compiled_call_impl",
    "_flat_weight_refs",
    "_flat_weights",
    "_flat_weights_names",
    "_op_name",
    "_reversed_padding_repeated_twice",
    "format",
    "weight_shape",
    REPORT,
}


def report_of(module: nn.Module) -> Report | None:
    """What convert wrote down about the module, if it did."""
    report = vars(module).get(REPORT)
    return report if isinstance(report, Report) else None


def share_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` the hooks of ``old``."""
    vars(new).update({name: copy(held) for name, held in _hooks_of(old).items()})


def replace_modules(
    model: nn.Module, swaps: Mapping[int, tuple[nn.Module, nn.Module]], inplace: bool
) -> nn.Module:
    """``model``, or a copy of it, with layers replaced: by the id of the old one, the old and the new one."""
    # With the new layers in the memo, deepcopy puts them wherever the model refers to the old ones.
    memo: dict[int, Any] = {key: new for key, (_, new) in swaps.items()}
    for old, new in swaps.values():
        new.train(old.training)
        kept = _hooks_of(old)
        kept |= {
            name: value for name, value in vars(old).items() if name not in vars(new).keys() | _OF_ONE_KIND
        }
        biases = {name: p for name, p in old._parameters.items() if p is not None and name in new._parameters}
        # In place, hooks stay in the same dict, so that their handles can still remove them.
        kept, biases = (kept, biases) if inplace else _measure.copy_model((kept, biases), memo)
        vars(new).update(kept)
        for name, bias in biases.items():
            setattr(new, name, bias)  # which a recurrent layer's own list of them hears of
    if not inplace:
        return _measure.copy_model(model, memo)
    seen: set[int] = set()
    for step in [step for module in model.modules() for step in _find_steps(vars(module), memo, seen)]:
        step()
    return memo.get(id(model), model)


def _hooks_of(module: nn.Module) -> dict[str, Any]:
    return {name: vars(module)[name] for name in (*HOOKS, *_HOOK_OPTIONS) if name in vars(module)}


def _find_steps(
    held: dict[Any, Any] | list[Any], memo: dict[int, Any], seen: set[int]
) -> Iterator[Callable[[], None]]:
    """How to replace the modules that a dict or a list holds, or a dict, list or tuple in it: registered
    children, and those that a module keeps in plain attributes."""
    if id(held) in seen:
        return
    seen.add(id(held))
    for key, value in list(held.items() if isinstance(held, dict) else enumerate(held)):
        if isinstance(value, nn.Module) and id(value) in memo:
            yield partial(held.__setitem__, key, memo[id(value)])
        elif isinstance(value, tuple) and any(id(item) in memo for item in value):
            yield partial(held.__setitem__, key, tuple(memo.get(id(item), item) for item in value))
        elif isinstance(value, (dict, list)):
            yield from _find_steps(value, memo, seen)
