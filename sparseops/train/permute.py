"""``permute_channels``: the order of channels in which 2:4 pruning keeps most of a model's weights."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparseops import _measure
from sparseops._eligible import Layer, check_choices, find_layers
from sparseops.compact.trace import Untraceable, trace
from sparseops.nn import SparseModule
from sparseops.prune import Plan
from sparseops.prune.patterns import keep_24
from sparseops.train.permutation import best_order
from sparseops.train.permute_report import Code, PermuteReport, PermuteRow
from sparseops.train.spaces import Spaces, reordered, tensors_of

__all__ = ["PermuteReport", "explain_permutation", "permute_channels"]

_REPORT = "_sparseops_permutation"


def permute_channels(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | dict[str, Any],
    plan: str | Plan = "2:4",
    *,
    seconds: float | None = None,
) -> nn.Module:
    """A copy of the model that computes the same, with its channels in an order that suits 2:4 pruning.

    2:4 drops two of each four neighbouring weights, so it loses most where large ones stand together. As in
    Pool and Yu 2021, "Channel permutations for N:M sparsity", the input channels of the layers that the plan
    makes 2:4 are put into an order in which pruning by magnitude keeps more of the squared weight, and with
    them all that have these channels: the outputs of the layers that write them, batch norms, depthwise
    convolutions, layer norms, numbers per channel that are multiplied or added, and other layers that read
    them, through flattening, concatenation and residual connections. Channels that the model gets or returns
    stay, and those of an op that is not known to treat them alike. Call it before pruning;
    ``explain_permutation`` on the result tells of each layer.

    The result is an ordinary module of the same classes and names. Its parameters are new ones, so an
    optimizer has to be made after it. Hooks on layers keep these as they are; hooks elsewhere see the new
    order. The same model gives the same order each time, unless ``seconds`` cuts the search short.

    Args:
        model: any module; not changed.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments of ``model``, which is
            traced with them and checked on them.
        plan: "2:4", or a ``Plan``, of which the layers with "2:4" count, if ``convert`` takes them.
        seconds: no search is begun or goes on after so many; None: each ends by itself.

    Raises:
        TypeError: an argument is of the wrong type; model is TorchScript.
        ValueError: plan or seconds is none that is known, or a name pattern matches nothing.
        RuntimeError: the model cannot be copied, it fails on the example, or it gives another result in the
            new order.
    """
    _check(model, plan, seconds)
    inputs = _measure.Inputs.of(example_inputs, caller="permute_channels")
    deadline = None if seconds is None else time.monotonic() + seconds
    with torch.inference_mode(False), torch.no_grad():
        result, report = _permute(model, inputs, plan, deadline)
    if not any(row.code is Code.PERMUTED for row in report.layers):
        warnings.warn(
            f"permute_channels: nothing was permuted in {report.model}"
            + (f" ({report.reason})" if report.reason else "; explain_permutation(model) says why"),
            stacklevel=2,
        )
    vars(result)[_REPORT] = report
    return result


def explain_permutation(model: nn.Module) -> PermuteReport:
    """The report of a model that ``permute_channels`` has returned.

    Raises:
        TypeError: model is no module.
        ValueError: it comes from elsewhere.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"explain_permutation: model must be a torch.nn.Module, got {type(model).__name__}")
    report = vars(model).get(_REPORT)
    if not isinstance(report, PermuteReport):
        raise ValueError(
            "explain_permutation: model must come from permute_channels, "
            f"got a {type(model).__name__} without its report"
        )
    return report


def _check(model: nn.Module, plan: str | Plan, seconds: float | None) -> None:
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "permute_channels: model must be a torch.nn.Module that is no TorchScript, "
            f"got {type(model).__name__}"
        )
    if isinstance(plan, Plan):
        check_choices(model, "plan", [name for name, _ in plan.rules], caller="permute_channels")
    elif plan != "2:4":
        raise ValueError(f'permute_channels: plan must be "2:4" or a Plan, got {plan!r}')
    if seconds is not None and not seconds > 0:
        raise ValueError(f"permute_channels: seconds must be positive or None, got {seconds!r}")


@dataclass
class _Reader:
    """A layer that will be 2:4. roots: the classes of its input channels, None if nothing is known of them.
    kept: the squared weight that 2:4 keeps, before and in the order so far. total: all of it."""

    layer: Layer
    roots: Tensor | None
    before: float
    kept: float
    total: float

    @classmethod
    def of(cls, layer: Layer, roots: Tensor | None) -> _Reader:
        weights = [p for p in layer.module._parameters.values() if p is not None and p.dim() >= 2]
        kept = sum(_energy(weight) for weight in weights)
        return cls(layer, roots, kept, kept, sum(float(w.double().square().sum()) for w in weights))

    def kept_in(self, moved: Tensor) -> float:
        """What it would keep in this order."""
        assert self.roots is not None
        weight = self.layer.module.weight
        return _energy(weight.index_select(1, reordered(self.roots, moved).to(weight.device)))

    def columns(self, group: Tensor) -> Tensor | None:
        """Its weights [C, R] for a group of classes, None where the fours of that are not fours in it."""
        assert self.roots is not None
        places = torch.isin(self.roots, group).nonzero().flatten()
        start, count = int(places[0]), len(group)
        whole = torch.equal(self.roots[start : start + count], group) and len(places) == count
        if not whole or start % 4 or (count % 4 and start + count < len(self.roots)):
            return None
        weight: Tensor = self.layer.module.weight
        return weight.narrow(1, start, count).transpose(0, 1).flatten(1)


def _permute(
    model: nn.Module, inputs: _measure.Inputs, plan: str | Plan, deadline: float | None
) -> tuple[nn.Module, PermuteReport]:
    caller, name = "permute_channels", type(model).__name__
    asked = [layer for layer in find_layers(model, None, (), plan) if layer.treatment == "2:4"]
    dense = {id(module): module.to_dense() for module in model.modules() if isinstance(module, SparseModule)}
    twin, _ = _measure.trial(model, dense, caller)
    try:
        _measure.run(twin, inputs)
    except Exception as exc:
        raise RuntimeError(
            f"{caller}: model must run on example_inputs, got {type(exc).__name__}: {exc}"
        ) from exc
    try:
        drawn = trace(twin, inputs.args, inputs.kwargs)
    except Untraceable as exc:
        readers = {layer.name: _Reader.of(layer, None) for layer in asked if layer.code is None}
        reason = f"its graph cannot be drawn ({exc})"
        rows = [_row(layer, readers, None, None) for layer in asked]
        report = PermuteReport(rows, model=name, energy=_total(readers), reason=reason)
        return _measure.copy_model(model, {}, caller), report
    spaces = Spaces(model, twin, drawn)
    readers = {
        layer.name: _Reader.of(layer, spaces.source(layer.name)) for layer in asked if layer.code is None
    }
    moved = _search(spaces, readers, deadline)
    result = _measure.copy_model(model, {}, caller)
    _apply(result, spaces, moved)
    try:
        before, after = (_measure.trial(m, {}, caller)[0] for m in (model, result))
        _measure.check_model(after, before, inputs, caller)
    except Exception as exc:
        raise RuntimeError(
            f"{caller}: model must compute the same with its channels in another order, got {exc} "
            "(leave the layers that depend on it out of the plan)"
        ) from exc
    rows = [_row(layer, readers, spaces, moved) for layer in asked]
    return result, PermuteReport(rows, model=name, energy=_total(readers), by=drawn.by)


def _search(spaces: Spaces, readers: dict[str, _Reader], deadline: float | None) -> Tensor:
    """The best order that is found of all classes; the readers' energies are those in it."""
    moved = spaces.identity()
    known = [
        (reader, reader.roots)
        for reader in readers.values()
        if reader.roots is not None and math.isfinite(reader.total)
    ]
    with _measure.progress("permuting", len(spaces.groups)) as advance:
        for group in spaces.groups:
            its = [reader for reader, roots in known if torch.isin(roots, group).any()]
            columns = [found for reader in its if (found := reader.columns(group)) is not None]
            if columns:
                moved[group] = group[best_order(torch.cat(columns, 1), deadline=deadline)]
                kept = [reader.kept_in(moved) for reader in its]
                # Layers that the search did not look at count as well.
                if sum(kept) > sum(reader.kept for reader in its):
                    for reader, energy in zip(its, kept, strict=True):
                        reader.kept = energy
                else:
                    moved[group] = group
            advance()
    return moved


def _apply(model: nn.Module, spaces: Spaces, moved: Tensor) -> None:
    tensors = tensors_of(model)
    for place in spaces.places:
        if not torch.equal(moved[place.roots], place.roots):
            tensor = tensors[place.tensor]
            index = reordered(place.roots, moved).to(tensor.device)
            # In memory of its own, laid out as it was.
            tensor.data = torch.empty_like(tensor).copy_(tensor.index_select(place.dim, index))


def _energy(weight: Tensor) -> float:
    """The squared weight that 2:4 by magnitude keeps."""
    magnitudes = weight.detach().abs()
    return float((magnitudes.double().square() * keep_24(magnitudes)).sum())


def _total(readers: dict[str, _Reader]) -> tuple[float, float]:
    finite = [reader for reader in readers.values() if math.isfinite(reader.total)]
    total = sum(reader.total for reader in finite)
    before, after = (sum(getattr(reader, key) for reader in finite) for key in ("before", "kept"))
    return (before / total, after / total) if total else (1.0, 1.0)


def _row(
    layer: Layer, readers: dict[str, _Reader], spaces: Spaces | None, moved: Tensor | None
) -> PermuteRow:
    channels = layer.shape[1] if len(layer.shape) > 1 else 0
    reader = readers.get(layer.name)
    if reader is None:
        return PermuteRow(layer.name, layer.kind, Code.DENSE, channels, None, layer.reason)
    energy = _total({layer.name: reader}) if math.isfinite(reader.total) else None
    code, reason = Code.KEPT, ""
    if spaces is not None and moved is not None:
        code, reason = _verdict(layer.name, reader, spaces, moved)
    return PermuteRow(layer.name, layer.kind, code, channels, energy, reason)


def _verdict(name: str, reader: _Reader, spaces: Spaces, moved: Tensor) -> tuple[Code, str]:
    fixed = spaces.why_fixed(name)
    if reader.roots is None:
        return Code.KEPT, fixed
    finite = math.isfinite(reader.total)
    its = [group for group in spaces.groups if torch.isin(reader.roots, group).any()]
    seen = finite and any(reader.columns(group) is not None for group in its)
    words = [f"some stay: {fixed}"] if fixed and its else [fixed] if fixed else []
    if not finite:
        words.append("its weight holds NaN or infinity")
    elif its and not seen:
        words.append("its groups of four are not whole channels of one tensor, so other layers decide")
    changed = int((moved[reader.roots] != reader.roots).sum())
    if changed:
        return Code.PERMUTED, "; ".join([f"{changed} of {len(reader.roots)} moved", *words])
    if seen:
        return Code.BEST, "; ".join(["no order was found that keeps more", *words])
    return Code.KEPT, "; ".join(words or ["its channels have no others to change places with"])
