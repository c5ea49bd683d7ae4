"""Making the sparse form of layers, with the row of the report that says how."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from torch import Tensor, nn

from sparseops import _measure
from sparseops._eligible import FORMAT_24, FORMAT_CHANNELS, Layer
from sparseops._replace import HOOKS
from sparseops._select import Choice, Part, choose, then_24
from sparseops.formats import NM24, ChannelPruned, Keep
from sparseops.formats.channel_pruned import granularity
from sparseops.nn import SparseModule
from sparseops.prune import Channels, is_24_transposable
from sparseops.report import Code, Row

_LAST = "it is the model's last layer, which keeps its outputs"


def pack_layers(
    layers: dict[int, Layer], prune: str | None, last: Collection[int], meeting: Mapping[int, int]
) -> tuple[dict[int, SparseModule], dict[int, Row]]:
    """The sparse layers, and the rows of all, by the id of the dense ones.

    last: those of ``layers`` whose outputs are the model's. meeting: a number for each whose outputs meet
    those of others, the same for all that meet.

    Raises:
        ValueError: a weight does not have the pattern, and ``prune`` is None; or a criterion gives no scores.
    """
    made, rows = {}, {}
    choices = choose(layers if prune else _by_magnitude(layers), last, meeting)
    with _measure.progress("packing", len(layers)) as advance:
        for key, layer in layers.items():
            sparse, row = pack_layer(layer, prune, choices.get(key, {}), is_last=key in last)
            if sparse is not None:
                made[key], row = sparse, replace(row, code=Code.CONVERTED)
            rows[key] = row
            advance()
    return made, rows


def pack_layer(
    layer: Layer, prune: str | None, choice: Choice, *, is_last: bool = False
) -> tuple[SparseModule | None, Row]:
    """The sparse form of a layer and its row (as an eligible one), or None and the row that says why."""
    rule = layer.treatment
    if not isinstance(rule, Channels):
        if rule == "2:4t":
            _check_transposable(layer, prune)
        return _pack_24(layer, prune, [])
    is_last = is_last and rule.keep_last and rule.side != "inputs"
    words = [_LAST] if is_last else []
    keeps_all = all(its.kept is None for its in choice.values())
    found = None
    if prune is None:
        may_have_none = is_last or keeps_all or rule.threshold is not None
        found = _pack_zeros(layer, rule, may_have_none)
    elif not keeps_all:
        found = _pack_chosen(layer, rule, choice)
    if found is not None:
        sparse, packed, said = found
        return sparse, _row(layer, sparse, packed, said + words)
    words += _notes(layer, choice)
    if then_24(layer, rule, {})[1]:
        return _pack_24(layer, prune, [*words, "so it is 2:4 alone"])
    return None, dense_row(layer, Code.WHOLE, "; ".join(words or [f"there are no {rule.side} to drop"]))


def dense_row(layer: Layer, code: Code, reason: str) -> Row:
    """The row of a layer that stays dense."""
    return Row(
        name=layer.name,
        kind=layer.kind,
        shape=layer.shape,
        format="",
        kernel="",
        code=code,
        reason="; ".join([reason, *layer.notes]),
        bytes_before=layer.nbytes,
        bytes_after=layer.nbytes,
    )


def _row(layer: Layer, sparse: SparseModule, packed: Any, words: list[str]) -> Row:
    words = list(words)
    if nonfinite := getattr(packed, "nonfinite", 0):
        words.append(f"{nonfinite} NaN or infinite weights count as the largest")
    hooks = sum(len(getattr(layer.module, name, None) or ()) for name in HOOKS)
    if hooks:
        words.append(f"{hooks} hook{'s' if hooks > 1 else ''} carried over")
    words += layer.notes
    if sparse.kernel_note is not None:
        words.append(sparse.kernel_note)
    return Row(
        name=layer.name,
        kind=layer.kind,
        shape=layer.shape,
        format=sparse.format,
        kernel=sparse.kernel,
        code=Code.ELIGIBLE,
        reason="; ".join(words),
        energy_kept=packed.energy_kept,
        bytes_before=layer.nbytes,
        bytes_after=packed.nbytes,
    )


def _by_magnitude(layers: dict[int, Layer]) -> dict[int, Layer]:
    """The layers with the criterion that zero channels matter least by, whatever evidence made them zero."""
    return {
        key: replace(layer, treatment=replace(layer.treatment, criterion=None))
        if isinstance(layer.treatment, Channels)
        else layer
        for key, layer in layers.items()
    }


# 2:4


def _check_transposable(layer: Layer, prune: str | None) -> None:
    weights = [p for p in layer.module._parameters.values() if p is not None and p.dim() > 1]
    if all(map(is_24_transposable, weights)):
        return
    source = '("2:4t" masks come from sparseops.Pruner)'
    if prune is not None:
        raise ValueError(f'convert: pattern must be "2:4" with prune="{prune}" {source}, got "2:4t"')
    raise ValueError(
        f"convert: weight of layer {layer.name!r} must be 2:4 along its inputs and along its outputs "
        f"{source}, got more than two non-zeros in a group of four"
    )


def _pack_24(layer: Layer, prune: str | None, words: list[str]) -> tuple[SparseModule, Row]:
    hint = _flat_hint(layer.module)
    try:
        sparse, packed = _class_of(layer).pack(layer.module, prune=prune, format=FORMAT_24)
    except ValueError as exc:
        raise ValueError(f"convert: weight of layer {layer.name!r} must be 2:4: {exc}{hint}") from exc
    pruned = packed.energy_kept < 1.0
    words = [*words, f"pruned by {prune}" if pruned else "already 2:4, taken as it is"]
    row = _row(layer, sparse, packed, words)
    return sparse, replace(row, reason=row.reason + hint) if pruned else row


def _flat_hint(module: nn.Module) -> str:
    """Says that a convolution weight has its groups along the wrong axis, as some pruning tools leave it."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() < 3 or weight.shape[2:].numel() == 1:
        return ""
    try:
        NM24.from_dense(weight.flatten(1))
    except ValueError:
        return ""
    return (
        "; the weight is 2:4 along its flattened input channels and kernel taps, but the pattern runs along "
        "the input channels of each tap: mask it again along dimension 1"
    )


# Channels

Found: TypeAlias = "tuple[SparseModule, Any, list[str]]"
"""A sparse layer, its packed weight, and what to say of it."""


def _pack_chosen(layer: Layer, rule: Channels, choice: Choice) -> Found:
    """The layer with the channels of ``choice`` alone."""
    said, halved = then_24(layer, rule, {part: its.count for part, its in choice.items()})
    sparse, packed = _pack_kept(layer, {part: its.kept for part, its in choice.items()}, halved)
    by = f"by {rule.criterion_name}, with {100 * packed.energy_kept:.1f}% of the energy"
    words = [_say_kept(layer, packed), by if packed.energy_kept < 1.0 else "the others were zero already"]
    return sparse, packed, [*words, *_notes(layer, choice), *said]


def _pack_zeros(layer: Layer, rule: Channels, may_have_none: bool) -> Found | None:
    """The layer without the channels that are zero; None if there are none and there need not be any."""
    what = f"weight of layer {layer.name!r}"
    try:
        sparse, packed = _class_of(layer).pack(layer.module, prune=None, format=FORMAT_CHANNELS)
    except ValueError as exc:
        if may_have_none:
            return None
        raise ValueError(f"convert: {what} must have zero channels: {exc}") from exc
    kept = {part: index for part, (index, _) in _lists(layer, packed).items()}
    said, halved = then_24(layer, rule, {part: len(index) for part, index in kept.items()})
    if halved:
        for weight in _weights_of(packed).values():
            try:
                NM24.from_dense(weight.compact.movedim(-1, 1))
            except ValueError as exc:
                raise ValueError(f"convert: {what} without its zero channels must be 2:4: {exc}") from exc
        sparse, packed = _pack_kept(layer, kept, halved)
    return sparse, packed, [_say_kept(layer, packed), "the others were zero already", *said]


def _pack_kept(layer: Layer, kept: Mapping[Part, Tensor | None], halved: bool) -> tuple[SparseModule, Any]:
    keeps = {name: Keep(kept.get((name, "inputs")), kept.get((name, "outputs")), halved) for name, _ in kept}
    prune: Any = keeps if isinstance(layer.module, nn.RNNBase) else keeps[""]
    if isinstance(layer.module, nn.Embedding):
        prune = Keep(inputs=keeps[""].outputs)  # its outputs are the columns of its weight
    return _class_of(layer).pack(layer.module, prune=prune, format=FORMAT_CHANNELS)


def _class_of(layer: Layer) -> type[SparseModule]:
    cls = layer.sparse_class
    assert cls is not None
    return cls


def _weights_of(packed: Any) -> dict[str, ChannelPruned]:
    return {"": packed} if isinstance(packed, ChannelPruned) else packed.weights


def _lists(layer: Layer, packed: Any) -> dict[Part, tuple[Tensor, int]]:
    """The channels that a packed weight keeps, and of how many."""
    lists: dict[Part, tuple[Tensor, int]] = {}
    for name, weight in _weights_of(packed).items():
        inputs = weight.in_index, weight.shape[1] * weight.groups
        if isinstance(layer.module, nn.RNNBase):
            # What goes into weight_hh_l0 are the hidden units, which come out of the layer.
            _, matrix, suffix = name.split("_", 2)
            lists[suffix, "outputs" if matrix == "hh" else "inputs"] = inputs
        elif isinstance(layer.module, nn.Embedding):
            lists["", "outputs"] = inputs
        else:
            lists["", "outputs"], lists["", "inputs"] = (weight.out_index, weight.shape[0]), inputs
    return lists


def _say_kept(layer: Layer, packed: Any) -> str:
    words = []
    for part, (index, total) in _lists(layer, packed).items():
        what, grain = _say_part(layer, part), granularity(index, total)
        if not grain:
            words.append(f"all {total} {what}")
            continue
        how = " as single channels, which is slow" if grain == 1 else f" in blocks of {grain}"
        if isinstance(layer.module, nn.RNNBase):
            how = ""  # next to its steps, one gather for all of them is nothing
        words.append(f"{len(index)} of {total} {what}{how}")
    return f"keeps {', '.join(words)}"


def _say_part(layer: Layer, part: Part) -> str:
    name, side = part
    if isinstance(layer.module, nn.RNNBase):
        return f"{'hidden units' if side == 'outputs' else 'inputs'} of {name}"
    return "columns" if isinstance(layer.module, nn.Embedding) else side


def _notes(layer: Layer, choice: Choice) -> list[str]:
    return [f"{_say_part(layer, part)}: {its.note}" for part, its in choice.items() if its.note]
