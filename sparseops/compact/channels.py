"""Which channels of a model's activations have to exist: what is known of each, and of all together.

A channel of a tensor is *varying*, or it is a known constant whatever the input; and it is *live* if anything
reads it. One that is both has to exist. Tensors that pass through an element-wise op, or meet in one, have to
bring the same channels: theirs are of one *class*, and exist in all of them or in none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from sparseops.compact.layers import Layer
from sparseops.compact.trace import Trace, arg, op_name, shape_of


@dataclass(eq=False)
class Value:
    """The channels of one tensor, all fields on the CPU.

    axis: the dimension they lie along. ids: int64 [C], the channel's number, the same where the same has to
    exist. varying: bool [C]. constant: float64 [C], what the others are. live: bool [C].
    """

    axis: int
    ids: Tensor
    varying: Tensor
    constant: Tensor
    live: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.constant = self.constant.masked_fill(self.varying, 0.0)
        self.live = torch.zeros_like(self.varying)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class Use:
    """The one call of a layer. source, target: the channels that it reads and writes; None: all stay."""

    layer: Layer
    node: fx.Node
    source: Value | None
    target: Value


@dataclass(frozen=True)
class Rule:
    """How channels go through an op.

    forward: the channels of its result, None if nothing is known of them; marks what has to stay.
    backward: given the result's live channels, marks those that it reads.
    """

    forward: Callable[[Flow, fx.Node], Value | None]
    backward: Callable[[Flow, fx.Node, Value], None]


class Flow:
    """The channels of every tensor in a trace, found by one pass forwards and one backwards.

    layers: those that can be cut, by name. fixed: why others, by name, cannot.
    """

    def __init__(
        self, trace: Trace, rules: Mapping[str, Rule], layers: Mapping[str, Layer], fixed: Mapping[str, str]
    ) -> None:
        self.trace = trace
        self.layers = layers
        self.fixed = fixed
        self.values: dict[fx.Node, Value] = {}
        self.uses: dict[str, Use] = {}
        self.barriers: dict[fx.Node, str] = {}
        self._demands: list[tuple[Tensor, str]] = []
        self._notes: list[tuple[Tensor, str]] = []
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._count = 0
        for node in trace.nodes:
            value = None
            if node.op == "output":
                self.barrier(node, "the model returns it")
            elif node.op == "call_function":
                rule = rules.get(op_name(node))
                value = rule.forward(self, node) if rule is not None else self.barrier(node)
            if value is not None:
                self.values[node] = value
        for node in reversed(trace.nodes):
            if node in self.values:
                rules[op_name(node)].backward(self, node, self.values[node])
        self._settle()

    # What rules ask and say.

    def new_ids(self, count: int) -> Tensor:
        self._count += count
        return torch.arange(self._count - count, self._count)

    def unite(self, a: Tensor, b: Tensor) -> None:
        """Channels of these numbers exist together or not at all."""
        self._pairs.append((a, b))

    def demand(self, nodes: Iterable[fx.Node], reason: str) -> None:
        """All channels of these tensors have to exist."""
        for value in map(self.values.get, nodes):
            if value is not None:
                self.demand_ids(value, torch.ones_like(value.live), reason)

    def demand_ids(self, value: Value, which: Tensor, reason: str) -> None:
        """These channels (bool [C]) of a tensor have to exist."""
        value.live |= which
        self._demands.append((value.ids[which], reason))

    def barrier(self, node: fx.Node, reason: str | None = None) -> Value | None:
        """The op takes its arguments as they are, and nothing is known of its result: None."""
        self.barriers[node] = reason or f"{_say(node)} reads every channel"
        self.demand(node.all_input_nodes, self.barriers[node])
        return None

    def note(self, value: Value, which: Tensor, reason: str) -> None:
        """Why these channels (bool [C]) vary though they do not depend on the input."""
        self._notes.append((value.ids[which], reason))

    def along(self, node: fx.Node, axis: int) -> Value | None:
        """The channels of a tensor if they lie along ``axis``; if not, they have to stay."""
        value = self.values.get(node)
        if value is not None and value.axis != axis:
            self.demand([node], "a later layer counts its channels along another dimension")
            return None
        return value

    def whole(self, node: fx.Node, axis: int) -> Value:
        """The channels of a tensor of which nothing is known: all vary and have to stay."""
        shape = shape_of(node)
        assert shape is not None
        value = unknown(axis, self.new_ids(shape[axis]))
        self._demands.append((value.ids, f"{node.name} has all its channels"))
        return value

    def layer_of(self, node: fx.Node, parameter: str = "weight") -> Layer | str:
        """The layer whose parameter the op gets, or why it is none that can be cut."""
        given = arg(node, parameter)
        name = self.trace.names.get(given) if isinstance(given, fx.Node) else None
        if name is None:
            return f"the weight of {op_name(node)} is computed"
        owner = name.rpartition(".")[0]
        if owner in self.fixed:
            return f"{owner}: {self.fixed[owner]}"
        return self.layers.get(owner) or f"{owner}: its {name.rpartition('.')[2]} is used by {op_name(node)}"

    def apply(self, node: fx.Node, constants: Mapping[fx.Node, Tensor]) -> Tensor:
        """The op's result, in float64, on these tensors in place of its arguments."""

        def wide(a: fx.Node) -> Any:
            return constants[a] if a in constants else self.trace.tensors[a].detach().cpu().double()

        args: Any = fx.map_arg(node.args, wide)
        kwargs: Any = fx.map_arg(node.kwargs, wide)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    # What the passes have found.

    def _settle(self) -> None:
        self._root = _roots(self._count, self._pairs)
        self._exists = torch.zeros(self._count, dtype=torch.bool)
        self._why: dict[int, str] = {}
        for value in self.values.values():
            self._exists[self._root[value.ids[value.varying & value.live]]] = True
        for ids, _ in self._demands:
            self._exists[self._root[ids]] = True
        for value in self.values.values():
            if len(value) and not self.exists(value).any():
                self._exists[self._root[value.ids[0]]] = True
                self.note(value, torch.arange(len(value)) == 0, "a tensor has at least one channel")
        for ids, reason in (*self._demands, *self._notes):
            for root in self._root[ids].tolist():
                self._why.setdefault(root, reason)

    def exists(self, value: Value) -> Tensor:
        """bool [C]: the channels that the tensor will have."""
        return self._exists[self._root[value.ids]]

    def roots(self, value: Value) -> Tensor:
        """int64 [C]: the class of each channel, which is the smallest number in it."""
        return self._root[value.ids]

    def demanded(self) -> dict[int, str]:
        """The classes that have to exist whatever their layers are, and why."""
        found: dict[int, str] = {}
        for ids, reason in self._demands:
            for root in self._root[ids].tolist():
                found.setdefault(root, reason)
        return found

    def classes(self, value: Value) -> tuple[int, ...] | None:
        """Which channels exist with each of these or not at all, as a number for each; None if one of them
        has to exist whatever its layer is."""
        roots = self.roots(value).tolist()
        return None if self.demanded().keys() & set(roots) else tuple(roots)

    def why(self, value: Value, which: Tensor) -> list[str]:
        """Why these channels (bool [C]) of a tensor have to exist though it could do without."""
        reasons = (self._why.get(root) for root in self._root[value.ids[which]].tolist())
        return list(dict.fromkeys(reason or "another tensor that it meets has them" for reason in reasons))


def unknown(axis: int, ids: Tensor) -> Value:
    """Channels that all vary."""
    count = len(ids)
    return Value(axis, ids, torch.ones(count, dtype=torch.bool), torch.zeros(count, dtype=torch.float64))


def _roots(count: int, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """For each of ``count`` numbers the smallest of those that ``pairs`` tie it to."""
    parent = list(range(count))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for left, right in pairs:
        for a, b in zip(left.tolist(), right.tolist(), strict=True):
            low, high = sorted((root(a), root(b)))
            parent[high] = low
    return torch.tensor([root(i) for i in range(count)], dtype=torch.long)


def _say(node: fx.Node) -> str:
    return op_name(node) or str(node.target)
