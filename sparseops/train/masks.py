"""From scores to masks: which elements of all weights of a plan are kept, at some level of its strength."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from sparseops._select import Choice, Stand, choose, then_24
from sparseops.nn.recurrent_weights import gate_rows
from sparseops.prune import Channels, Criterion, Layers, Selection, Unstructured
from sparseops.prune.criteria import score_weights
from sparseops.prune.patterns import keep_24, keep_24_transposable, keep_layers, keep_unstructured
from sparseops.prune.sparsegpt import sparsegpt
from sparseops.train.targets import Target

Masks: TypeAlias = dict[str, Tensor]
"""By a parameter's name in the model, bool of its shape: what is kept."""

_PATTERNS = {"2:4": keep_24, "2:4t": keep_24_transposable}


@dataclass(frozen=True, eq=False)
class Judgement:
    """What the weights are judged by.

    weights: by name, whole and of the parameter's shape. evidence: of each what criteria need beside it.
    criterion: where a rule has none of its own. masks: the ones so far, whose zeros stay; {} if any may come
    back. last, meets: as those of ``choose``.
    """

    weights: Mapping[str, Tensor]
    evidence: Mapping[str, Mapping[str, Any]]
    criterion: str | Criterion
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    last: Collection[int] = ()
    meets: Mapping[int, int] = field(default_factory=dict)


def choose_masks(targets: Iterable[Target], judgement: Judgement, level: float) -> tuple[Masks, Masks]:
    """Masks of all targets, and the new weights of those whose criterion changes what it keeps (SparseGPT).

    level: of the way from dense (0) to what the rules ask for (1).

    Raises:
        ValueError: a criterion cannot score what a rule prunes.
    """
    pools: dict[Any, list[Target]] = {}
    for target in targets:
        pools.setdefault(target.layer.treatment, []).append(target)
    masks: Masks = {}
    updated: Masks = {}
    for rule, pool in pools.items():
        if isinstance(rule, Channels):
            masks |= _channel_masks(pool, judgement, level)
            continue
        if pool[0].criterion(judgement.criterion) == "sparsegpt":
            for target in pool:
                updated[target.name], masks[target.name] = _sparsegpt(target, judgement)
            continue
        scores = [_scores(target, judgement) for target in pool]
        if isinstance(rule, Unstructured):
            found = keep_unstructured(scores, rule, level)
        elif isinstance(rule, Layers):
            kept = keep_layers(scores, rule, level)
            found = [torch.full_like(s, keep, dtype=torch.bool) for s, keep in zip(scores, kept, strict=True)]
        else:
            found = [_PATTERNS[rule](s, level) for s in scores]
        masks |= {t.name: t.physical(mask) for t, mask in zip(pool, found, strict=True)}
    return {name: mask.contiguous() for name, mask in masks.items()}, updated


def _scores(target: Target, judgement: Judgement) -> Tensor:
    """Of each weight, [O, C, *taps]; of what is dropped already less than any other."""
    scores = score_weights(
        target.logical(judgement.weights[target.name]),
        target.criterion(judgement.criterion),
        {
            key: target.logical(t) if isinstance(t, Tensor) else t
            for key, t in _seen(target, judgement).items()
        },
    )
    before = judgement.masks.get(target.name)
    return scores if before is None else scores.masked_fill(~target.logical(before), -torch.inf)


def _seen(target: Target, judgement: Judgement) -> dict[str, Any]:
    """The evidence for scores, and the seed of those at random."""
    known = judgement.evidence.get(target.name, {})
    return {**{key: t for key, t in known.items() if key != "hessian"}, "seed": target.seed}


def _sparsegpt(target: Target, judgement: Judgement) -> tuple[Tensor, Tensor]:
    rule: Any = target.layer.treatment
    if isinstance(rule, Unstructured):
        rule = rule.ratio
    weight = target.logical(judgement.weights[target.name])
    found, mask = sparsegpt(weight, judgement.evidence[target.name]["hessian"], rule)
    return target.physical(found), target.physical(mask)


# Channels


def _channel_masks(targets: list[Target], judgement: Judgement, level: float) -> Masks:
    by_layer: dict[int, list[Target]] = {}
    for target in targets:
        by_layer.setdefault(id(target.layer.module), []).append(target)
    rules: dict[int, Any] = {}
    layers, stands = {}, {}
    for key, its in by_layer.items():
        asked: Any = its[0].layer.treatment
        rules[key] = replace(asked, criterion=its[0].criterion(judgement.criterion))
        layers[key] = replace(its[0].layer, treatment=rules[key])
        stands[key] = Stand(
            {t.parameter: judgement.weights[t.name] for t in its},
            {t.parameter: _seen(t, judgement) for t in its},
        )
    choices = choose(layers, judgement.last, judgement.meets, stands, level)
    masks: Masks = {}
    for key, its in by_layer.items():
        choice = choices.get(key, {})
        counts = {part: selection.count for part, selection in choice.items()}
        halved = level == 1.0 and then_24(layers[key], rules[key], counts)[1]
        for target in its:
            mask = _mask_of(target, choice)
            masks[target.name] = _then_24(target, mask, judgement) if halved else mask
    return masks


def _mask_of(target: Target, choice: Choice) -> Tensor:
    """The mask that is left of a weight when channels go."""
    weight, module = target.weight, target.layer.module
    if isinstance(module, nn.RNNBase):
        _, matrix, suffix = target.parameter.split("_", 2)
        units = choice.get((suffix, "outputs"))
        rows = None
        if units is not None and units.kept is not None:
            gates = weight.shape[0] // units.total
            rows = _has(gate_rows(units.kept, gates, units.total), weight.shape[0])
        columns = _kept(units if matrix == "hh" else choice.get((suffix, "inputs")))
        return _rows_and_columns(target, rows, columns)
    return _rows_and_columns(target, _kept(choice.get(("", "outputs"))), _kept(choice.get(("", "inputs"))))


def _rows_and_columns(target: Target, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """True where both are: rows [O], columns [C of all groups], None for all."""
    weight = target.weight
    mask = torch.ones(target.logical(weight).shape, dtype=torch.bool, device=weight.device)
    by_group = mask.view(target.groups, -1, mask.shape[1], mask.shape[2:].numel())
    if rows is not None:
        by_group &= rows.to(mask.device).view(target.groups, -1, 1, 1)
    if columns is not None:  # a group's filters read that group's channels
        by_group &= columns.to(mask.device).view(target.groups, 1, -1, 1)
    return target.physical(mask)


def _kept(selection: Selection | None) -> Tensor | None:
    if selection is None or selection.kept is None:
        return None
    return _has(selection.kept, selection.total)


def _has(kept: Tensor, total: int) -> Tensor:
    return torch.zeros(total, dtype=torch.bool, device=kept.device).index_fill_(0, kept, True)


def _then_24(target: Target, mask: Tensor, judgement: Judgement) -> Tensor:
    """The mask with 2:4 in what is left: the groups of four are of kept inputs."""
    left = target.logical(mask)
    scores = _scores(target, judgement)
    found = left.clone()
    for rows in torch.arange(left.shape[0]).chunk(target.groups):
        group = slice(int(rows[0]), int(rows[-1]) + 1)
        columns = left[group].flatten(2).any(2).any(0) if left.dim() > 2 else left[group].any(0)
        found[group, columns] &= keep_24(scores[group][:, columns])
    return target.physical(found)
