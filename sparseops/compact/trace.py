"""The graph of a model: one node per ATen op, each weight known by its name in the model.

``torch.export`` draws it. Where that refuses, ``torch.fx`` traces the Python code symbolically, which shows
that the path through it does not depend on the data, and the traced code is run once to see its ATen ops. The
model that is drawn is a copy in which every sparse layer is a dense one with zeros: what a layer computes is
all that matters here, not by which kernel.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

# They may return their argument itself, though their schemas do not say so.
_MAYBE_VIEWS = frozenset({"alpha_dropout", "contiguous", "dropout", "feature_dropout", "reshape", "to"})


class Untraceable(Exception):
    """The model has no graph that can be relied on; the text says why."""


@dataclass(frozen=True)
class Trace:
    """nodes: in the order of execution. tensors: the model's own (parameters, buffers, constants), by the
    node that stands for each, and names: what the model calls those, if anything. fresh: nodes whose result
    lies in memory of its own. by: who drew the graph."""

    nodes: tuple[fx.Node, ...]
    tensors: Mapping[fx.Node, Tensor]
    names: Mapping[fx.Node, str]
    fresh: frozenset[fx.Node]
    by: str


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """The graph of ``model``, which holds no sparse layer and is in evaluation mode, called like this.

    Raises:
        Untraceable: neither way works, or the model writes into views of its activations.
    """
    reasons = []
    for by, draw in (("torch.export", _export), ("torch.fx", _symbolic)):
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                graph, tensors, names = draw(model, args, kwargs)
        except Exception as exc:  # whatever a model's code raises when it meets a stand-in for a tensor
            lines = str(exc).strip().splitlines() or [""]
            reasons.append(f"{by}: {type(exc).__name__}: {lines[0]}")
            continue
        return Trace(tuple(graph.nodes), tensors, names, _read_after_write(graph), by)
    raise Untraceable("; ".join(reasons))


def op_name(node: fx.Node) -> str:
    """``"relu"`` of aten::relu_, the full name of an op of another library, "" of what is no op."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return ""
    library, name = schema.name.split("::")
    return name.rstrip("_") if library == "aten" else schema.name


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of the node's tensor on the example; None if it is no single tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def arg(node: fx.Node, name: str) -> Any:
    """An argument of an ATen op by its name in the schema: its default where it is not given, None where the
    op has none of that name."""
    for place, formal in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if formal.name == name:
            if place < len(node.args):
                return node.args[place]
            return node.kwargs.get(name, formal.default_value)
    return None


Drawn = tuple[fx.Graph, dict[fx.Node, Tensor], dict[fx.Node, str]]


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Drawn:
    program = torch.export.export(model, args, kwargs, strict=False)
    signature = program.graph_signature
    held = {**program.constants, **program.state_dict}
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    tensors, named = {}, {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and isinstance(held.get(names.get(node.name, "")), Tensor):
            named[node] = names[node.name]
            tensors[node] = held[names[node.name]]
    return program.graph, tensors, named


def _symbolic(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Drawn:
    traced = fx.symbolic_trace(model)
    state = {**dict(traced.named_parameters()), **dict(traced.named_buffers())}

    def call(state: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
        return functional_call(traced, state, args, kwargs)

    drawn = make_fx(call, pre_dispatch=True)(state, args, kwargs)
    # make_fx flattens its arguments; those of the state come first.
    leaves = pytree.tree_leaves((state, args, kwargs))
    places = [node for node in drawn.graph.nodes if node.op == "placeholder"]
    assert len(places) == len(leaves)
    named = dict(zip(places, state, strict=False))
    tensors = {node: state[name] for node, name in named.items()}
    for node in drawn.graph.nodes:
        if node.op == "get_attr" and isinstance(held := getattr(drawn, str(node.target), None), Tensor):
            tensors[node] = held
    return drawn.graph, tensors, named


def _read_after_write(graph: fx.Graph) -> frozenset[fx.Node]:
    """Where an op changes its argument, let whoever reads that later read the op's result instead, so that
    the edges of the graph say what is read. The answer is the nodes with memory of their own.

    Raises:
        Untraceable: another view of the same memory is read after the change.
    """
    place = {node: number for number, node in enumerate(graph.nodes)}
    memory: dict[fx.Node, fx.Node] = {}  # a node and whose memory its tensor lies in
    for node in graph.nodes:
        written = next(_written(node), None)
        seen = written if written is not None else _viewed(node)
        memory[node] = memory[seen] if seen is not None else node
        if written is None or memory[node].op != "call_function":
            continue
        for other, its in memory.items():
            late = any(place[user] > place[node] for user in other.users)
            if its is memory[node] and other not in (node, written) and late:
                raise Untraceable(f"{op_name(node)}_ writes into memory that is also read as {other.name}")
        for user in [user for user in written.users if place[user] > place[node]]:
            user.replace_input_with(written, node)
    return frozenset(node for node, its in memory.items() if its is node and node.op == "call_function")


def _written(node: fx.Node) -> Iterator[fx.Node]:
    for number, formal in enumerate(getattr(getattr(node.target, "_schema", None), "arguments", ())):
        if formal.alias_info is not None and formal.alias_info.is_write:
            given = node.args[number] if number < len(node.args) else node.kwargs.get(formal.name)
            if isinstance(given, fx.Node):
                yield given


def _viewed(node: fx.Node) -> fx.Node | None:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    is_view = any(result.alias_info is not None for result in schema.returns)
    return node.args[0] if is_view or op_name(node) in _MAYBE_VIEWS else None
