"""``compact`` takes the channels out of a model that nobody needs; ``explain_compact`` says which, and why
the others stay.

The parts: ``trace`` draws the model's graph, ``layers`` knows what can be cut, ``channels`` finds which
channels have to exist, by the ``rules`` of each op, ``rewrite`` makes the smaller layers as ``cost`` prefers,
and ``rows`` and ``report`` tell of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparseops import _measure
from sparseops._replace import PLAN
from sparseops.compact import cost
from sparseops.compact.channels import Flow, Rule
from sparseops.compact.layers import CONVS, find_layers
from sparseops.compact.report import CompactReport
from sparseops.compact.rewrite import Cut, Uneven, cut_layers
from sparseops.compact.rows import edge_rows, layer_rows, unchanged_rows
from sparseops.compact.rules import RESHAPES, RULES
from sparseops.compact.trace import Trace, Untraceable, trace
from sparseops.nn import SparseModule
from sparseops.prune import Channels, Plan

__all__ = ["CompactReport", "compact", "explain_compact"]

_REPORT = "_sparseops_compact"


def compact(model: nn.Module, example_inputs: Tensor | tuple[Any, ...] | dict[str, Any]) -> nn.Module:
    """A copy of the model without the channels that are constant or that nothing reads.

    Where a layer and all that read it agree on its channels, through batch norm, activations, pooling,
    concatenation, flattening and depthwise convolutions, they hand on those alone: neither gathers nor
    scatters, and the activations are smaller in memory too. A channel that is dropped is a constant, and what
    it adds is folded into the layers that read it. Where tensors meet, each brings the channels of all, and a
    cost model says whether its layer scatters into them or computes with zeros. ``explain_compact`` on the
    result tells of each layer and each edge.

    The result computes what the model computes in evaluation mode, whatever the example's batch and size are,
    and is an ordinary module of the same classes and names. Its batch norms have the statistics of the old
    ones and their constants are folded: if it is trained further, statistics of the batch no longer move what
    was folded. Hooks on layers keep these as they are; hooks elsewhere see the smaller activations. A model
    whose graph cannot be drawn, or that gives another result when it is cut, comes back as a copy, and the
    report says why.

    Args:
        model: any module; not changed. Sparse layers with dropped channels are what there is to gain, and
            dense ones with weights that are zero for whole channels.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments of ``model``, which is
            traced with them and checked on them.

    Raises:
        TypeError: an argument is of the wrong type; model is TorchScript.
        RuntimeError: the model cannot be copied, or it fails on the example.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"compact: model must be a torch.nn.Module that is no TorchScript, got {type(model).__name__}"
        )
    inputs = _measure.Inputs.of(example_inputs, caller="compact")
    with torch.inference_mode(False), torch.no_grad(), _measure.progress("compacting", 4) as advance:
        result, report = _compact(model, inputs, advance)
    vars(result)[_REPORT] = report
    if isinstance(plan := vars(result).get(PLAN), Plan):
        # The zero channels that a pruner left are taken by now.
        rules = {name: None if isinstance(rule, Channels) else rule for name, rule in plan.rules}
        vars(result)[PLAN] = Plan(rules)
    return result


def explain_compact(model: nn.Module) -> CompactReport:
    """The report of a model that ``compact`` has returned.

    Raises:
        TypeError: model is no module.
        ValueError: it comes from elsewhere.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain_compact: model must be a torch.nn.Module, got {type(model).__name__}")
    report = vars(model).get(_REPORT)
    if not isinstance(report, CompactReport):
        raise ValueError(
            f"explain_compact: model must come from compact, got a {type(model).__name__} without its report"
        )
    return report


def meeting_layers(model: nn.Module, inputs: _measure.Inputs, caller: str) -> list[list[str]]:
    """The names of layers whose outputs meet, channel by channel, in additions and the like, where these
    channels could be left out if none of the layers had them.

    Raises:
        ValueError: the model's graph cannot be drawn.
    """
    masked = _twin(model, dense=True)
    try:
        drawn = trace(masked, inputs.args, inputs.kwargs)
    except Untraceable as exc:
        raise ValueError(
            f"{caller}: pattern must be without together for a model whose graph cannot be drawn, "
            f"got one ({exc})"
        ) from exc
    flow = Flow(drawn, RULES, *find_layers(model, _by_name(masked), drawn))
    found: dict[tuple[int, ...], list[str]] = {}
    for name, use in flow.uses.items():
        mixes = isinstance(use.layer.dense, (*CONVS, nn.Linear))
        classes = flow.classes(use.target) if mixes else None
        if classes is not None:
            found.setdefault(classes, []).append(name)
    return [names for names in found.values() if len(names) > 1]


def _compact(
    model: nn.Module, inputs: _measure.Inputs, advance: Callable[[], None]
) -> tuple[nn.Module, CompactReport]:
    masked = _twin(model, dense=True)
    try:
        _measure.run(masked, inputs)
    except Exception as exc:
        raise RuntimeError(
            f"compact: model must run on example_inputs, got {type(exc).__name__}: {exc}"
        ) from exc
    try:
        drawn = trace(masked, inputs.args, inputs.kwargs)
    except Untraceable as exc:
        return _unchanged(model, f"its graph cannot be drawn ({exc})")
    advance()
    reasons = []
    for rules in (RULES, {op: rule for op, rule in RULES.items() if op not in RESHAPES}):
        flow, cuts = _cut(model, masked, drawn, rules)
        result = _with_new_layers(model, cuts)
        advance()
        try:
            _measure.check_model(_twin(result, dense=False), masked, inputs, caller="compact")
            advance()
            after = trace(_twin(result, dense=True), inputs.args, inputs.kwargs)
        except Exception as exc:  # whatever the model's code raises when sizes are not those it expects
            reasons.append(f"{type(exc).__name__}: {str(exc).strip().splitlines()[0]}")
            continue
        advance()
        macs = cost.macs_of(drawn, _by_name(model)), cost.macs_of(after, _by_name(result))
        report = CompactReport(
            layer_rows(model, flow, cuts, macs),
            edge_rows(flow, cuts),
            model=type(model).__name__,
            by=drawn.by,
            before=cost.totals(model, drawn),
            after=cost.totals(result, after),
        )
        return result, report
    return _unchanged(model, f"the smaller model does not give the same result ({reasons[-1]})")


def _cut(
    model: nn.Module, masked: nn.Module, drawn: Trace, rules: Mapping[str, Rule]
) -> tuple[Flow, dict[str, Cut]]:
    """What has to exist, and the new layers."""
    layers, fixed = find_layers(model, _by_name(masked), drawn)
    while True:
        flow = Flow(drawn, rules, layers, fixed)
        try:
            return flow, cut_layers(flow)
        except Uneven as exc:
            fixed[exc.layer] = "its groups would keep different numbers of channels"


def _with_new_layers(model: nn.Module, cuts: Mapping[str, Cut]) -> nn.Module:
    modules = _by_name(model)
    memo = {id(modules[name]): cut.module for name, cut in cuts.items() if cut.module is not None}
    return _measure.copy_model(model, dict(memo), caller="compact")


def _unchanged(model: nn.Module, reason: str) -> tuple[nn.Module, CompactReport]:
    report = CompactReport(unchanged_rows(model, reason), model=type(model).__name__, reason=reason)
    return _measure.copy_model(model, {}, caller="compact"), report


def _twin(model: nn.Module, *, dense: bool) -> nn.Module:
    """A copy in evaluation mode that shares its parameters; dense: its sparse layers are dense with zeros."""
    memo: dict[int, Any] = {id(p): p for p in model.parameters()}
    if dense:
        memo |= {id(m): m.to_dense() for m in model.modules() if isinstance(m, SparseModule)}
    return _measure.copy_model(model, memo, caller="compact").eval()


def _by_name(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules(remove_duplicate=False))
