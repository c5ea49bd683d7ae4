"""Which channels of a model's layers are kept: what competes, what is chosen together, what has to stay."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from torch import Tensor, nn

from sparseops import _measure
from sparseops._eligible import Layer, too_small_for_24
from sparseops.compact import meeting_layers
from sparseops.nn import SparseEmbedding, SparseModule
from sparseops.nn.recurrent_weights import unit_matrix
from sparseops.prune import Channels, ChannelSet, Selection, select

Part: TypeAlias = tuple[str, str]
"""The layer and direction of a recurrent layer, "" of another one, and the side of its channels."""

Choice: TypeAlias = dict[Part, Selection]
"""Which channels of a layer are kept."""

Entry: TypeAlias = tuple[int, Part, ChannelSet]
"""The id of a layer, and some of its channels."""

SIDES = ("outputs", "inputs")


@dataclass(frozen=True, eq=False)
class Stand:
    """What is known of a layer's weights, by parameter: the tensors to judge them by, where they are not the
    layer's own, and evidence for criteria, which has their shapes."""

    weights: Mapping[str, Tensor]
    evidence: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def choose(
    layers: Mapping[int, Layer],
    last: Collection[int],
    meeting: Mapping[int, int],
    stands: Mapping[int, Stand] | None = None,
    share: float = 1.0,
) -> dict[int, Choice]:
    """What is kept of each layer, by its id. Layers with equal ``Channels`` compete, if that has global
    scope; inputs and outputs do not compete with each other.

    last: the layers whose outputs are the model's. meeting: a number for each whose outputs meet those of
    others, the same for all that meet. stands: where the layers are not judged by their own weights alone.
    share: of the ratio or threshold of each rule that counts.

    Raises:
        ValueError: a criterion gives no scores.
    """
    pools: dict[tuple[Channels, str], list[Entry]] = {}
    for key, layer in layers.items():
        rule = layer.treatment
        if not isinstance(rule, Channels):
            continue
        for part, channels in channels_of(layer, stands[key] if stands else None).items():
            side = part[1]
            if rule.side not in (side, "both") or (side == "outputs" and rule.keep_last and key in last):
                continue
            pools.setdefault((rule, side), []).append((key, part, channels))
    choices: dict[int, Choice] = {}
    for (rule, side), pool in pools.items():
        bands = _bands(pool, meeting if rule.together and side == "outputs" else {})
        sets = [replace(band[0][2], others=tuple(c for *_, c in band[1:])) for band in bands]
        for band, selection in zip(bands, select(_scaled(rule, share), sets), strict=True):
            names = [layers[key].name for key, *_ in band]
            for key, part, _ in band:
                others = [name for name in names if name != layers[key].name]
                choices.setdefault(key, {})[part] = _say_together(selection, others)
    return choices


def channels_of(layer: Layer, stand: Stand | None = None) -> dict[Part, ChannelSet]:
    """What can be dropped of the layer. Hidden units are the outputs of a recurrent one, and columns those of
    an embedding."""
    if stand is None:
        return _sets(layer.module, dict(layer.module._parameters))
    sets = _sets(layer.module, stand.weights)
    known: dict[Part, dict[str, Any]] = {part: {} for part in sets}
    for name in {name for held in stand.evidence.values() for name in held}:
        held = {parameter: its[name] for parameter, its in stand.evidence.items() if name in its}
        if isinstance(next(iter(held.values())), Tensor):
            for part, its in _sets(layer.module, held).items():
                known[part][name] = its.weight
        else:
            for part in known:
                known[part][name] = next(iter(held.values()))
    return {part: replace(channels, evidence=known[part]) for part, channels in sets.items()}


def _sets(module: nn.Module, tensors: Mapping[str, Any]) -> dict[Part, ChannelSet]:
    if isinstance(module, nn.RNNBase):
        sets = {}
        for name in module._flat_weights_names:
            if name.startswith("weight_hh_"):
                suffix = name.removeprefix("weight_hh_")
                w_ih, w_hh = tensors[f"weight_ih_{suffix}"], tensors[name]
                sets[suffix, "outputs"] = ChannelSet(unit_matrix(w_ih, w_hh))
                sets[suffix, "inputs"] = ChannelSet(w_ih, 1)
        return sets
    if isinstance(module, nn.Embedding):
        return {("", "outputs"): ChannelSet(tensors["weight"].t())}
    groups: int = getattr(module, "groups", 1)
    weight = outputs_first(module, tensors["weight"])
    return {("", side): ChannelSet(weight, dim, groups) for dim, side in enumerate(SIDES)}


def outputs_first(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight, or a tensor of its shape, as [O, C, ...]: that of a transposed convolution is [C, O, ...] in
    each group."""
    if not getattr(module, "transposed", False):
        return weight
    groups: int = module.groups  # type: ignore[assignment]
    by_group = weight.unflatten(0, (groups, -1)).transpose(1, 2)
    return by_group.flatten(0, 1)


def then_24(layer: Layer, rule: Channels, counts: Mapping[Part, int]) -> tuple[list[str], bool]:
    """What to say of the 2:4 that comes after, and whether it does, for a layer that keeps ``counts``."""
    if rule.then is None:
        return [], False
    module = layer.module
    if isinstance(module, nn.Embedding):
        return ["2:4 is left out, since an embedding does not multiply"], False
    if isinstance(module, nn.RNNBase):
        whole, groups = {"outputs": module.hidden_size, "inputs": module.input_size}, 1
    else:
        groups = getattr(module, "groups", 1)
        whole = {"outputs": layer.shape[0], "inputs": layer.shape[1] * groups}
    least = {
        side: min([count for part, count in counts.items() if part[1] == side], default=size)
        for side, size in whole.items()
    }
    verdict = too_small_for_24(module, (least["outputs"], least["inputs"] // groups))
    if verdict is not None:
        return [f"2:4 is left out: {verdict[1]}"], False
    return ["what is kept is 2:4"], True


def last_layers(model: nn.Module, layers: list[Layer], inputs: _measure.Inputs | None) -> set[int]:
    """The ids of the layers whose outputs are the model's, where a ``Channels`` keeps those."""
    rules = [layer.treatment for layer in layers if layer.code is None]
    if not any(isinstance(rule, Channels) and rule.keep_last for rule in rules):
        return set()
    if inputs is not None:
        return _measure.output_layers(model, {id(layer.module) for layer in layers}, inputs)
    # An embedding is no model's last layer, wherever it was registered.
    ends = [
        layer.module
        for layer in layers
        if (isinstance(layer.module, SparseModule) or layer.sparse_class is not None)
        and not isinstance(layer.module, (nn.Embedding, SparseEmbedding))
    ]
    return {id(ends[-1])} if ends else set()


def meeting(
    model: nn.Module, eligible: Mapping[int, Layer], inputs: _measure.Inputs | None, caller: str
) -> dict[int, int]:
    """For each layer that is chosen together with others the number of these, by its id.

    Raises:
        ValueError: there are no ``inputs`` to find that out with, or the model's graph cannot be drawn.
    """
    rules = [layer.treatment for layer in eligible.values()]
    if not any(isinstance(rule, Channels) and rule.together for rule in rules):
        return {}
    if inputs is None:
        raise ValueError(f"{caller}: example_inputs must be given with Channels(together=True), got None")
    modules = dict(model.named_modules(remove_duplicate=False))
    groups = meeting_layers(model, inputs, caller)
    return {id(modules[name]): number for number, names in enumerate(groups) for name in names}


def _scaled(rule: Channels, share: float) -> Channels:
    if share == 1.0:
        return rule
    threshold = None if rule.threshold is None else rule.threshold * share
    return replace(rule, ratio=rule.ratio * share, threshold=threshold)


def _bands(pool: list[Entry], meeting: Mapping[int, int]) -> list[list[Entry]]:
    """Which entries lose the same channels: those of layers that meet and have as many of them in as many
    groups."""
    bands: dict[Any, list[Entry]] = {}
    for number, (key, part, channels) in enumerate(pool):
        band = (meeting[key], channels.total, channels.groups) if key in meeting else number
        bands.setdefault(band, []).append((key, part, channels))
    return list(bands.values())


def _say_together(selection: Selection, others: list[str]) -> Selection:
    if not others:
        return selection
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    words = f"chosen together with those of {others[0]}{more}, which they meet"
    return replace(selection, note="; ".join(filter(None, [selection.note, words])))
