"""Which channels of a model can change places: those that every tensor treats alike in which they lie.

The graph and the classes of channels that exist together are those of ``sparseops.compact``, with rules for a
few ops more, in which all channels may be mixed as long as their order does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx, nn

from sparseops._replace import HOOKS
from sparseops.compact.channels import Flow, Rule, Use, Value, unknown
from sparseops.compact.layers import NORMS, find_layers
from sparseops.compact.rows import barrier_of
from sparseops.compact.rules import RULES
from sparseops.compact.trace import Trace, arg, op_name, shape_of
from sparseops.nn import SparseModule

_JOINS = ("add", "sub", "mul", "div", "maximum", "minimum")
_LAYER_NORMS = ("layer_norm", "rms_norm")


@dataclass(frozen=True, eq=False)
class Place:
    """A dimension of one of the model's tensors along which channels lie. roots: int64 [size], their
    classes."""

    tensor: str
    dim: int
    roots: Tensor


class Spaces:
    """places: of all channels in the model's own tensors. groups: of classes, each in ascending order, that
    can change places among one another.

    An order is a tensor ``moved`` over all classes, where ``moved[a] = b`` puts class b in the place of a.
    """

    def __init__(self, model: nn.Module, twin: nn.Module, drawn: Trace) -> None:
        """twin: the model that was drawn, without sparse layers."""
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._tensors = tensors_of(model).keys()
        layers, fixed = find_layers(model, dict(twin.named_modules(remove_duplicate=False)), drawn)
        sparse = [name for name, layer in layers.items() if isinstance(layer.given, SparseModule)]
        for name in sparse:
            del layers[name]
            fixed[name] = "it is sparse already"
        own: dict[str, Callable[[Flow, fx.Node], Value | None]] = {
            **{op: partial(self._joined, op) for op in _JOINS},
            **{op: partial(self._product, op) for op, rule in RULES.items() if op.startswith("conv")},
            **{op: partial(self._reduced, op) for op in ("mean", "amax", "amin")},
            **dict.fromkeys(_LAYER_NORMS, self._layer_norm),
        }
        rules = {op: Rule(forward, RULES.get(op, RULES["relu"]).backward) for op, forward in own.items()}
        self.flow = Flow(drawn, RULES | _MORE_RULES | rules, layers, fixed)
        self.places = tuple(self._places())
        self.groups = self._groups()

    def source(self, layer: str) -> Tensor | None:
        """int64 [C]: the classes of the channels that a layer reads, None if nothing is known of them."""
        use = self.flow.uses.get(layer)
        return None if use is None or use.source is None else self.flow.roots(use.source)

    def identity(self) -> Tensor:
        """The order that moves nothing."""
        return torch.arange(self._count)

    def why_fixed(self, layer: str) -> str:
        """Why the channels that a layer reads stay, if they do, all or some."""
        use = self.flow.uses.get(layer)
        if use is None:
            return self.flow.fixed.get(layer) or barrier_of(self.flow, layer)
        if use.source is None:
            return self._origin(use.node)
        found = (self._demanded.get(root) for root in self.flow.roots(use.source).tolist())
        return "; ".join(dict.fromkeys(reason for reason in found if reason))

    # Rules

    def _joined(self, op: str, flow: Flow, node: fx.Node) -> Value | None:
        """Numbers for each channel that are the model's own go along."""
        operands = [x for x in node.args[:2] if isinstance(x, fx.Node)]
        for x, y in (operands, operands[::-1]) if len(operands) == 2 else ():
            value, shape, own = flow.values.get(x), shape_of(x), shape_of(y)
            if value is not None and shape is not None and own is not None:
                # Shapes are matched from the right.
                axis = value.axis - len(shape) + len(own)
                if axis >= 0 and own[axis] == len(value):
                    self._adopt(flow, y, axis, value.ids)
        return RULES[op].forward(flow, node)

    def _layer_norm(self, flow: Flow, node: fx.Node) -> Value | None:
        """The order of what is normalised together does not matter, if weight and bias go along."""
        x = node.all_input_nodes[0]
        value, shape = flow.values.get(x), shape_of(x)
        if value is None or shape is None:
            return None
        axis = value.axis - (len(shape) - len(arg(node, "normalized_shape")))
        for given in node.all_input_nodes[1:]:
            if axis >= 0 and not self._adopt(flow, given, axis, value.ids):
                return flow.barrier(node)
        return unknown(value.axis, value.ids)

    def _reduced(self, op: str, flow: Flow, node: fx.Node) -> Value | None:
        """Over all channels, their order does not matter, and the result has none."""
        x = node.all_input_nodes[0]
        value, shape, dims = flow.values.get(x), shape_of(x), arg(node, "dim")
        if value is not None and shape is not None and value.axis in {dim % len(shape) for dim in dims or ()}:
            return None
        return RULES[op].forward(flow, node)

    def _product(self, op: str, flow: Flow, node: fx.Node) -> Value | None:
        """Channels of a convolution with groups belong to these."""
        target = RULES[op].forward(flow, node)
        layer = flow.layer_of(node)
        if target is not None and not isinstance(layer, str) and layer.groups > 1 and not layer.depthwise:
            for value in (flow.uses[layer.name].source, target):
                if value is not None:
                    which = torch.ones(len(value), dtype=torch.bool)
                    flow.demand_ids(value, which, f"{layer.name} reads its channels by groups")
        return target

    def _adopt(self, flow: Flow, node: fx.Node, axis: int, ids: Tensor) -> bool:
        """Whether the channels of one of the model's own tensors are now these, along ``axis``. One that is
        read elsewhere too, perhaps by another name, has them not."""
        name = flow.trace.names.get(node, "")
        if name not in self._tensors:
            return False
        owner = self._modules[name.rpartition(".")[0]]
        if any(getattr(owner, hooks, None) for hooks in HOOKS) or len(node.users) > 1:
            return False
        flow.values[node] = unknown(axis, ids)
        return True

    # What the flow has found

    def _places(self) -> Iterator[Place]:
        for use in self.flow.uses.values():
            for name, dim, value in _places_of(use):
                yield Place(f"{use.layer.name}.{name}".lstrip("."), dim, self.flow.roots(value))
        for node, value in self.flow.values.items():
            if node in self.flow.trace.names:
                yield Place(self.flow.trace.names[node], value.axis, self.flow.roots(value))

    def _groups(self) -> list[Tensor]:
        """Classes of which every tensor has as many channels of the one as of the other."""
        self._demanded = self.flow.demanded()
        label: dict[int, int] = {}
        fresh = 0
        for value in self.flow.values.values():
            roots, counts = self.flow.roots(value).unique(return_counts=True)
            renamed: dict[tuple[int, int], int] = {}
            for root, count in zip(roots.tolist(), counts.tolist(), strict=True):
                key = (label.get(root, -1), count)
                if key not in renamed:
                    renamed[key] = fresh = fresh + 1
                label[root] = renamed[key]
        self._count = 1 + max(label, default=0)
        groups: dict[int, list[int]] = {}
        for root in sorted(label.keys() - self._demanded.keys()):
            groups.setdefault(label[root], []).append(root)
        return [torch.tensor(roots) for roots in groups.values() if len(roots) > 1]

    def _origin(self, node: fx.Node) -> str:
        """Why nothing is known of the channels that an op reads."""
        while node.all_input_nodes:
            node = node.all_input_nodes[0]
            # Not the ops behind, which are barriers only because nothing is known.
            known = any(x in self.flow.values for x in node.all_input_nodes)
            if node in self.flow.barriers and (known or self._is_layer(node)):
                return self.flow.barriers[node]
        return "it reads the model's input"

    def _is_layer(self, node: fx.Node) -> bool:
        """It is an op with weights of its own."""
        return op_name(node) not in _JOINS and any(x in self.flow.trace.names for x in node.all_input_nodes)


def reordered(roots: Tensor, moved: Tensor) -> Tensor:
    """int64 [C]: for each place the channel that comes to it. Of a class with several channels the first
    goes where the first of another was, the second to the second, and so on."""
    index = torch.empty_like(roots)
    index[moved[roots].argsort(stable=True)] = roots.argsort(stable=True)
    return index


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by all their names."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _places_of(use: Use) -> Iterator[tuple[str, int, Value]]:
    """The tensors of a layer with the dimension of its channels."""
    layer, dense = use.layer, use.layer.dense
    if isinstance(dense, nn.Embedding):
        yield "weight", 1, use.target
    elif isinstance(dense, (*NORMS, nn.PReLU)):
        for held in (dense._parameters, dense._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.ndim == 1:
                    yield name, 0, use.target
    else:
        yield "weight", int(layer.transposed), use.target
        if use.source is not None and layer.groups == 1:
            yield "weight", 1 - int(layer.transposed), use.source
        if layer.bias is not None:
            yield "bias", 0, use.target


def _nothing(flow: Flow, node: fx.Node, target: Value) -> None:
    """The model's own tensors read no channels."""


def _stop(flow: Flow, node: fx.Node) -> Value | None:
    return flow.barrier(node)


_MORE_RULES = {
    # Ops without a name, and the model's own tensors among the values.
    "": Rule(_stop, _nothing),
    # Channel by channel, or all alike.
    "softmax": RULES["dropout"],
    "log_softmax": RULES["dropout"],
}
