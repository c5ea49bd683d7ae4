"""``convert`` makes layers sparse, ``explain`` says what became of each, ``to_dense`` goes back."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparseops import _measure
from sparseops._eligible import Choice, Layer, check_choices, find_layers
from sparseops._pack import dense_row, pack_layer, pack_layers
from sparseops._replace import PLAN, REPORT, replace_modules, report_of, share_hooks
from sparseops._select import last_layers, meeting
from sparseops.nn import SparseModule
from sparseops.prune import Channels, Layers, Plan, Unstructured
from sparseops.prune.plan import NAMED, RULES
from sparseops.report import Code, Report, Row

AS_PRUNED = "as pruned"
"""The pattern that a report names where the model told it."""

# Codes of layers that stay dense because of what was asked for: another pattern might take them.
_OF_THE_PATTERN = {Code.TOO_SMALL, Code.GROUPED, Code.DEPTHWISE, Code.KIND}


def convert(  # noqa: PLR0913
    model: nn.Module,
    pattern: str | Channels | Unstructured | Layers | Plan | None = None,
    *,
    prune: str | None = "magnitude",
    example_inputs: Tensor | tuple[Any, ...] | dict[str, Any] | None = None,
    include: Choice | list[Choice] | None = None,
    exclude: Choice | list[Choice] | None = None,
    inplace: bool = False,
    measure: bool = True,
) -> nn.Module:
    """The model with its linear and convolution layers made sparse; ``explain`` says what became of each.

    A weight that has the pattern already is taken as it is. Layers that cannot or should not be sparse stay
    as they are, with a reason in the report. Dtype, device, training mode, ``requires_grad``, and forward and
    backward hooks are carried over. An optimizer has to be made after the conversion, since the parameters
    are new ones.

    Args:
        model: any module; a lone layer too. Not changed unless ``inplace``; on an error never changed.
        pattern: "2:4" (of four neighbouring weights two are zero), "2:4t" (of the transposed weight too), a
            ``Channels`` (whole channels are zero), or a ``Plan`` that says which layers get which. Layers
            with equal ``Channels`` of scope "global" compete with one another. No kernel gains from an
            ``Unstructured`` or a ``Layers``, so that their layers stay as they are. None for the zeros of
            ``Pruner``, where the model has been finalized by one: they are taken as they are, whatever
            ``prune`` is; for "2:4" in another model.
        prune: "magnitude" drops the two smallest of each four weights, or the channels that matter least by
            the criterion of ``Channels``, where the pattern is not there already; None refuses such a weight,
            and drops the channels that are zero. Only ``Pruner`` makes a weight "2:4t".
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments of ``model``. A copy of
            the model is run on them in eval mode: each layer is timed and stays dense, with its own weights,
            unless it gets faster, and the result is checked against the dense model with the same zeros. The
            layers whose outputs are the model's, which ``Channels`` keeps, are found by it too; without it
            the last one counts. So are those that meet in additions, for ``Channels(together=True)``.
        include: name patterns (fnmatch, of a layer or of a module it lies in), module types and predicates
            ``(name, module) -> bool``, one or a list; only these layers are made sparse. With
            ``lambda name, _: f"{name}.values" in checkpoint`` they are the ones that a state dict holds.
        exclude: the same; these layers are left out.
        inplace: replace the layers in ``model`` itself.
        measure: time the layers on example_inputs. A layer that is slower by itself may be faster once
            ``compact`` has taken its gather and scatter away: with False no layer stays dense for its time.

    Returns:
        A new model, or with ``inplace`` the given one (a lone layer comes back as another object). When there
        is nothing to replace, the given model itself, and a warning says so.

    Raises:
        TypeError: an argument is of the wrong type; model is TorchScript or wrapped for distributed training.
        ValueError: pattern or prune is unknown, a name pattern matches nothing, a weight does not have the
            pattern and prune is None, a criterion does not give a number per channel, or layers are to be
            chosen together without example_inputs or in a model whose graph cannot be drawn.
        RuntimeError: the model cannot be copied, or the check on example_inputs fails.
    """
    _check_model(model)
    if pattern is not None and not isinstance(pattern, (*RULES, Plan)) and pattern not in NAMED:
        words = ", ".join([*NAMED, *(f"a {rule.__name__}" for rule in RULES)])
        raise ValueError(f"convert: pattern must be {words}, a Plan or None, got {pattern!r}")
    if prune not in ("magnitude", None):
        raise ValueError(f'convert: prune must be "magnitude" or None, got {prune!r}')
    inputs = None if example_inputs is None else _measure.Inputs.of(example_inputs)
    included = None if include is None else check_choices(model, "include", include)
    excluded = [] if exclude is None else check_choices(model, "exclude", exclude)
    plan = _recorded_plan(model) if pattern is None else None
    wanted = plan or pattern or "2:4"
    if isinstance(wanted, Plan):
        check_choices(model, "pattern", [name for name, _ in wanted.rules])

    recorded = _recorded(model)
    with _quiet_autograd():
        layers = find_layers(model, included, excluded, wanted)
        eligible = {id(layer.module): layer for layer in layers if layer.code is None}
        last, meets = last_layers(model, layers, inputs), meeting(model, eligible, inputs, "convert")
        try:
            made, rows = pack_layers(eligible, prune if plan is None else None, last, meets)
        except ValueError as exc:
            if plan is None:
                raise
            cure = "the model has lost zeros since it was pruned (a pattern prunes it anew)"
            raise ValueError(f"{exc}; {cure}") from exc
        if inputs is not None and made:
            _try_out(model, eligible, made, inputs, rows, measure)
        swaps = {key: (eligible[key].module, sparse) for key, sparse in made.items()}
        result = replace_modules(model, swaps, inplace) if swaps else model
    # Times of an earlier call are not mixed with new ones: threads and machine may have changed.
    measured = inputs is not None and measure
    earlier = None if measured else recorded
    report = _report(
        model,
        [rows.get(id(layer.module)) or _kept_row(layer, recorded, earlier) for layer in layers],
        str(wanted) if plan is None else AS_PRUNED,
        earlier,
        measured_now=measured,
    )
    if not swaps:
        warnings.warn(_nothing_done(report), stacklevel=2)
    setattr(result, REPORT, report)
    return result


def explain(model: nn.Module) -> Report:
    """The report of a converted model, or what ``convert(model)`` would do to another; changes nothing.

    Rows are as the model is now: a layer replaced since the conversion is described afresh.

    Raises:
        TypeError: model is no module.
        ValueError: a ``Pruner`` has finalized the model, and its zeros are gone.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain: model must be a torch.nn.Module, got {type(model).__name__}")
    recorded = _recorded(model)
    plan = None if recorded else _recorded_plan(model)
    prune = "magnitude" if plan is None else None
    with _quiet_autograd():
        rows = [_row_now(layer, recorded, prune) for layer in find_layers(model, pattern=plan or "2:4")]
    pattern = recorded.pattern if recorded else "2:4" if plan is None else AS_PRUNED
    return _report(model, rows, pattern, recorded)


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
        result = replace_modules(model, swaps, inplace)
    vars(result).pop(REPORT, None)
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


def _try_out(
    model: nn.Module,
    eligible: dict[int, Layer],
    made: dict[int, SparseModule],
    inputs: _measure.Inputs,
    rows: dict[int, Row],
    measure: bool,
) -> None:
    """Run the model; takes those layers out of ``made`` that should stay dense, and fills in the rows.
    measure: judge them by their time too."""

    def keep_dense(key: int, code: Code, reason: str) -> None:
        size = rows[key].bytes_before
        rows[key] = replace(
            rows[key], code=code, reason=reason, format="", kernel="", energy_kept=None, bytes_after=size
        )
        del made[key]

    for key, reader in _measure.weight_readers(model, eligible.keys(), inputs).items():
        keep_dense(key, Code.WEIGHT_READ, f"{reader}() is called on its weight outside its own forward")
    if measure:
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
                share_hooks(eligible[key].module, layer)
        sparse, _ = _measure.trial(model, made)
        masked, _ = _measure.trial(model, with_zeros)
        _measure.check_model(sparse, masked, inputs)


def _recorded_plan(model: nn.Module) -> Plan | None:
    """What a pruner wrote down about the model."""
    plan = getattr(model, PLAN, None)  # a compiled model hands on what it holds
    return plan if isinstance(plan, Plan) else None


def _recorded(model: nn.Module) -> Report | None:
    """What earlier conversions of the model, or of parts of it, wrote down; the outermost report counts."""
    found = {f"{name}." if name else "": report_of(module) for name, module in model.named_modules()}
    whole = found[""]
    reports = {
        prefix: report
        for prefix, report in found.items()
        if report is not None and (not prefix or report is not whole)
    }
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
    row = dense_row(layer, layer.code, layer.reason)
    if isinstance(module, SparseModule):
        dense_bytes = getattr(module.packed, "dense_nbytes", None)
        if dense_bytes is None:
            dense_bytes = math.prod(layer.shape) * module.values.element_size()
        row = replace(row, format=module.format, kernel=module.kernel, bytes_before=dense_bytes)
        if old is not None and old.sparse:
            row = replace(row, energy_kept=old.energy_kept)
            if timed is not None:
                row = replace(row, ms_before=old.ms_before, ms_after=old.ms_after)
    return row


def _row_now(layer: Layer, recorded: Report | None, prune: str | None) -> Row:
    """The row of a layer for explain: what convert recorded if it still holds."""
    old = _recorded_row(layer, recorded)
    if isinstance(layer.module, SparseModule):
        row = _kept_row(layer, recorded, recorded)
        return replace(row, code=old.code, reason=old.reason) if old is not None and old.sparse else row
    is_same = old is not None and not old.sparse and old.kind == layer.kind
    if old is not None and is_same and layer.code in {None, old.code, *_OF_THE_PATTERN}:
        return old
    if layer.code is None:
        return pack_layer(layer, prune, {})[1]
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
