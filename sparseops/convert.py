"""``convert`` makes layers sparse, ``explain`` says what became of each, ``to_dense`` goes back."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparseops import _measure
from sparseops._eligible import Choice, Layer, check_choices, find_layers
from sparseops.formats import FORMATS
from sparseops.nn import SparseModule
from sparseops.report import Code, Report, Row

PATTERNS = {"2:4": "nm24"}
"""The patterns that can be asked for, with the format that holds each."""

_REPORT = "_sparseops_report"


def convert(  # noqa: PLR0913
    model: nn.Module,
    pattern: str = "2:4",
    *,
    prune: str | None = "magnitude",
    example_inputs: Tensor | tuple[Any, ...] | dict[str, Any] | None = None,
    include: Choice | list[Choice] | None = None,
    exclude: Choice | list[Choice] | None = None,
    inplace: bool = False,
) -> nn.Module:
    """The model with its linear and convolution layers made sparse; ``explain`` says what became of each.

    A weight that has the pattern already is taken as it is. Layers that cannot or should not be sparse stay
    as they are, with a reason in the report. Dtype, device, training mode, ``requires_grad``, and forward and
    backward hooks are carried over. An optimizer has to be made after the conversion, since the parameters
    are new ones.

    Args:
        model: any module; a lone layer too. Not changed unless ``inplace``; on an error never changed.
        pattern: "2:4".
        prune: "magnitude" drops the two smallest of each four weights where the pattern is not there already;
            None refuses such a weight.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments of ``model``. A copy of
            the model is run on them in eval mode: each layer is timed and stays dense, with its own weights,
            unless it gets faster, and the result is checked against the dense model with the same zeros.
        include: name patterns (fnmatch, of a layer or of a module it lies in), module types and predicates
            ``(name, module) -> bool``, one or a list; only these layers are made sparse. With
            ``lambda name, _: f"{name}.values" in checkpoint`` they are the ones that a state dict holds.
        exclude: the same; these layers are left out.
        inplace: replace the layers in ``model`` itself.

    Returns:
        A new model, or with ``inplace`` the given one (a lone layer comes back as another object). When there
        is nothing to replace, the given model itself, and a warning says so.

    Raises:
        TypeError: an argument is of the wrong type; model is TorchScript or wrapped for distributed training.
        ValueError: pattern or prune is unknown, a name pattern matches nothing, or a weight does not have the
            pattern and prune is None.
        RuntimeError: the model cannot be copied, or the check on example_inputs fails.
    """
    _check_model(model)
    if pattern not in PATTERNS:
        raise ValueError(f"convert: pattern must be one of {', '.join(PATTERNS)}, got {pattern!r}")
    if prune not in ("magnitude", None):
        raise ValueError(f'convert: prune must be "magnitude" or None, got {prune!r}')
    inputs = None if example_inputs is None else _measure.Inputs.of(example_inputs)
    included = None if include is None else check_choices(model, "include", include)
    excluded = [] if exclude is None else check_choices(model, "exclude", exclude)

    recorded = _recorded(model)
    with _quiet_autograd():
        layers = find_layers(model, included, excluded)
        eligible = {id(layer.module): layer for layer in layers if layer.code is None}
        made, rows = _pack(eligible, prune, PATTERNS[pattern])
        if inputs is not None and made:
            _try_out(model, eligible, made, inputs, rows)
        swaps = {key: (eligible[key].module, sparse) for key, sparse in made.items()}
        result = _replace(model, swaps, inplace) if swaps else model
    # Times of an earlier call are not mixed with new ones: threads and machine may have changed.
    earlier = recorded if inputs is None else None
    report = _report(
        model,
        [rows.get(id(layer.module)) or _kept_row(layer, recorded, earlier) for layer in layers],
        pattern,
        earlier,
        measured_now=inputs is not None,
    )
    if not swaps:
        warnings.warn(_nothing_done(report), stacklevel=2)
    setattr(result, _REPORT, report)
    return result


def explain(model: nn.Module) -> Report:
    """The report of a converted model, or what ``convert(model)`` would do to another; changes nothing.

    Rows are as the model is now: a layer replaced since the conversion is described afresh.

    Raises:
        TypeError: model is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: model must be a torch.nn.Module, got {type(model).__name__}")
    recorded = _recorded(model)
    with _quiet_autograd():
        rows = [_row_now(layer, recorded) for layer in find_layers(model)]
    return _report(model, rows, recorded.pattern if recorded else "2:4", recorded)


def to_dense(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The model with ordinary layers again, zeros filled in; the model itself when it has no sparse layer.

    Raises:
        TypeError: model is no module.
        RuntimeError: the model cannot be copied (which ``inplace`` does not do).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"to_dense: model must be a torch.nn.Module, got {type(model).__name__}")
    with _quiet_autograd():
        swaps = {id(m): (m, m.to_dense()) for m in model.modules() if isinstance(m, SparseModule)}
        if not swaps:
            return model
        result = _replace(model, swaps, inplace)
    vars(result).pop(_REPORT, None)
    return result


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "convert: model must not be TorchScript (convert it before scripting or tracing), "
            f"got {type(model).__name__}"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError("convert: model must be unwrapped (pass model.module), got DistributedDataParallel")


@contextmanager
def _quiet_autograd() -> Iterator[None]:
    """No gradients, and no inference tensors either: they could never be trained."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def _pack(
    eligible: dict[int, Layer], prune: str | None, format: str
) -> tuple[dict[int, SparseModule], dict[int, Row]]:
    """The sparse layers and their rows, by the id of the dense ones."""
    made, rows = {}, {}
    with _measure.progress("packing", len(eligible)) as advance:
        for key, layer in eligible.items():
            made[key], row = _make(layer, prune, format)
            rows[key] = replace(row, code=Code.CONVERTED)
            advance()
    return made, rows


def _make(layer: Layer, prune: str | None, format: str) -> tuple[SparseModule, Row]:
    """The sparse form of a layer, and its row (as an eligible one)."""
    cls = layer.sparse_class
    assert cls is not None
    try:
        sparse, packed = cls.pack(layer.module, prune=prune, format=format)
    except ValueError as exc:
        hint = _flat_hint(layer.module.weight, format)
        raise ValueError(f"convert: weight of layer {layer.name!r} must be 2:4: {exc}{hint}") from exc
    pruned = packed.energy_kept < 1.0
    words = [f"pruned by {prune}" if pruned else "already 2:4, taken as it is"]
    if nonfinite := getattr(packed, "nonfinite", 0):
        words.append(f"{nonfinite} NaN or infinite weights count as the largest")
    hooks = sum(len(getattr(layer.module, name, None) or ()) for name in _HOOKS)
    if hooks:
        words.append(f"{hooks} hook{'s' if hooks > 1 else ''} carried over")
    words += layer.notes
    if sparse.kernel_note is not None:
        words.append(sparse.kernel_note)
    hint = _flat_hint(layer.module.weight, format) if pruned else ""
    return sparse, Row(
        name=layer.name,
        kind=layer.kind,
        shape=layer.shape,
        format=format,
        kernel=sparse.kernel,
        code=Code.ELIGIBLE,
        reason="; ".join(words) + hint,
        energy_kept=packed.energy_kept,
        bytes_before=layer.nbytes,
        bytes_after=packed.nbytes,
    )


def _flat_hint(weight: Tensor, format: str) -> str:
    """Says that a convolution weight has its groups along the wrong axis, as some pruning tools leave it."""
    if weight.dim() < 3 or weight.shape[2:].numel() == 1:
        return ""
    try:
        FORMATS[format].from_dense(weight.flatten(1))
    except ValueError:
        return ""
    return (
        "; the weight is 2:4 along its flattened input channels and kernel taps, but the pattern runs along "
        "the input channels of each tap: mask it again along dimension 1"
    )


def _try_out(
    model: nn.Module,
    eligible: dict[int, Layer],
    made: dict[int, SparseModule],
    inputs: _measure.Inputs,
    rows: dict[int, Row],
) -> None:
    """Run the model; takes those layers out of ``made`` that should stay dense, and fills in the rows."""

    def keep_dense(key: int, code: Code, reason: str) -> None:
        size = rows[key].bytes_before
        rows[key] = replace(
            rows[key], code=code, reason=reason, format="", kernel="", energy_kept=None, bytes_after=size
        )
        del made[key]

    for key, reader in _measure.weight_readers(model, eligible.keys(), inputs).items():
        keep_dense(key, Code.WEIGHT_READ, f"{reader}() is called on its weight outside its own forward")
    with _measure.progress("measuring", len(made)) as advance:
        timings = _measure.measure(model, made, inputs, advance)
    for key in list(made):
        timing = timings.get(key)
        if timing is None:
            words = f"{rows[key].reason}; not called on example_inputs, so not measured"
            rows[key] = replace(rows[key], reason=words)
            continue
        rows[key] = replace(rows[key], ms_before=timing.ms_before, ms_after=timing.ms_after)
        if timing.ms_after >= timing.ms_before:
            ratio = timing.ms_before / timing.ms_after
            where = f"{ratio:.2f}x at input {list(timing.input_shape)}"
            keep_dense(key, Code.SLOWER, f"{where}, so it stays dense with its own weights")
    if made:
        with_zeros = {key: layer.to_dense() for key, layer in made.items()}
        for layers in (made, with_zeros):
            for key, layer in layers.items():
                hooks = _hooks_of(eligible[key].module)
                vars(layer).update({name: copy(held) for name, held in hooks.items()})
        sparse, _ = _measure.trial(model, made)
        masked, _ = _measure.trial(model, with_zeros)
        _measure.check_model(sparse, masked, inputs)


def _recorded(model: nn.Module) -> Report | None:
    """What earlier conversions of the model, or of parts of it, wrote down; the outermost report counts."""
    found = {"": getattr(model, _REPORT, None)}
    for name, module in model.named_modules():
        report = vars(module).get(_REPORT)
        if name and report is not found[""]:
            found[f"{name}."] = report
    reports = {prefix: report for prefix, report in found.items() if isinstance(report, Report)}
    if not reports:
        return None
    rows: dict[str, Row] = {}
    for prefix, report in reports.items():
        for row in report:
            name = (prefix + row.name).removesuffix("." if not row.name else "")
            rows.setdefault(name, replace(row, name=name))
    first = next(iter(reports.values()))
    return _report(model, list(rows.values()), first.pattern, first)


def _report(
    model: nn.Module, rows: list[Row], pattern: str, earlier: Report | None, *, measured_now: bool = False
) -> Report:
    """A report whose times, if it has any, are from this call or from ``earlier``."""
    threads, version = (earlier.threads, earlier.torch) if earlier is not None else (None, None)
    if measured_now:
        threads, version = torch.get_num_threads(), torch.__version__
    return Report(rows, model=type(model).__name__, pattern=pattern, threads=threads, torch=version)


def _kept_row(layer: Layer, recorded: Report | None, timed: Report | None) -> Row:
    """The row of a layer that convert leaves as it is. What an earlier convert knew of a sparse layer is
    kept, its times only if ``timed`` is that earlier report."""
    module, old = layer.module, _recorded_row(layer, recorded)
    assert layer.code is not None
    row = Row(
        name=layer.name,
        kind=layer.kind,
        shape=layer.shape,
        format="",
        kernel="",
        code=layer.code,
        reason="; ".join([layer.reason, *layer.notes]),
        bytes_before=layer.nbytes,
        bytes_after=layer.nbytes,
    )
    if isinstance(module, SparseModule):
        dense_bytes = math.prod(layer.shape) * module.values.element_size()
        row = replace(row, format=module.format, kernel=module.kernel, bytes_before=dense_bytes)
        if old is not None and old.sparse:
            row = replace(row, energy_kept=old.energy_kept)
            if timed is not None:
                row = replace(row, ms_before=old.ms_before, ms_after=old.ms_after)
    return row


def _row_now(layer: Layer, recorded: Report | None) -> Row:
    """The row of a layer for explain: what convert recorded if it still holds."""
    old = _recorded_row(layer, recorded)
    if isinstance(layer.module, SparseModule):
        row = _kept_row(layer, recorded, recorded)
        return replace(row, code=old.code, reason=old.reason) if old is not None and old.sparse else row
    if old is not None and not old.sparse and layer.code in (None, old.code):
        return old
    if layer.code is None:
        return _make(layer, "magnitude", PATTERNS["2:4"])[1]
    return _kept_row(layer, recorded, recorded)


def _recorded_row(layer: Layer, recorded: Report | None) -> Row | None:
    rows = () if recorded is None else recorded.rows
    same = (row for row in rows if (row.name, row.shape) == (layer.name, layer.shape))
    return next(same, None)


def _nothing_done(report: Report) -> str:
    if not len(report):
        return f"convert: nothing was made sparse, {report.model} has no layer with a weight matrix"
    counts = Counter(row.code.value for row in report)
    words = ", ".join(f"{count} {code}" for code, count in counts.items())
    return f"convert: nothing was made sparse in {report.model} ({words}); sparseops.explain(model) says why"


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_HOOK_OPTIONS = (
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_is_full_backward_hook",
)
# What a layer has for itself alone; its counterpart does without.
_OF_ONE_KIND = {
    "_compiled_call_impl",
    "_reversed_padding_repeated_twice",
    "format",
    "weight_shape",
    "_op_name",
    "_buffer_names",
    _REPORT,
}


def _hooks_of(module: nn.Module) -> dict[str, Any]:
    return {name: vars(module)[name] for name in (*_HOOKS, *_HOOK_OPTIONS) if name in vars(module)}


def _replace(model: nn.Module, swaps: Mapping[int, tuple[nn.Module, nn.Module]], inplace: bool) -> nn.Module:
    """``model``, or a copy of it, with layers replaced: by the id of the old one, the old and the new one."""
    # With the new layers in the memo, deepcopy puts them wherever the model refers to the old ones.
    memo: dict[int, Any] = {key: new for key, (_, new) in swaps.items()}
    for old, new in swaps.values():
        new.train(old.training)
        kept = _hooks_of(old)
        kept |= {
            name: value for name, value in vars(old).items() if name not in vars(new).keys() | _OF_ONE_KIND
        }
        bias = old._parameters["bias"]
        # In place, hooks stay in the same dict, so that their handles can still remove them.
        kept, bias = (kept, bias) if inplace else _measure.copy_model((kept, bias), memo)
        vars(new).update(kept)
        new._parameters["bias"] = bias
    if not inplace:
        return _measure.copy_model(model, memo)
    seen: set[int] = set()
    for step in [step for module in model.modules() for step in _find_steps(vars(module), memo, seen)]:
        step()
    return memo.get(id(model), model)


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
