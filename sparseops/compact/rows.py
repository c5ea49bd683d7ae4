"""The rows of the report, from what the flow has found and what the layers have become."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import fx, nn

from sparseops.compact.channels import Flow, Use
from sparseops.compact.layers import NORMS
from sparseops.compact.report import Code, EdgeRow, LayerRow
from sparseops.compact.rewrite import Cut
from sparseops.compact.trace import op_name
from sparseops.nn import SparseEmbedding, SparseModule

_SIZES = (
    ("in_channels", "out_channels"),
    ("in_features", "out_features"),
    ("num_embeddings", "embedding_dim"),
)


def layer_rows(
    model: nn.Module,
    flow: Flow,
    cuts: Mapping[str, Cut],
    macs: tuple[Mapping[str, int], Mapping[str, int]],
) -> list[LayerRow]:
    rows = []
    for name, module in model.named_modules():
        sizes = _sizes(module)
        if sizes is None or isinstance(module, (*NORMS, nn.PReLU)):
            continue
        cost = macs[0].get(name, 0), macs[1].get(name, 0) + macs[1].get(f"{name}.layer".lstrip("."), 0)
        cut = cuts.get(name)
        if cut is None:
            reason = flow.fixed.get(name) or barrier_of(flow, name)
            row = LayerRow(name, _kind(module), Code.KEPT, (sizes[0],) * 2, (sizes[1],) * 2, cost, reason)
        else:
            inputs = sizes[0] if isinstance(module, (nn.Embedding, SparseEmbedding)) else cut.inputs
            code, reason = _verdict(sizes, cut)
            row = LayerRow(
                name, _kind(module), code, (sizes[0], inputs), (sizes[1], cut.outputs), cost, reason
            )
        rows.append(row)
    return rows


def unchanged_rows(model: nn.Module, reason: str) -> list[LayerRow]:
    """Rows of a model that stays as it is."""
    return [
        LayerRow(name, _kind(module), Code.KEPT, (sizes[0],) * 2, (sizes[1],) * 2, (0, 0), reason)
        for name, module in model.named_modules()
        if (sizes := _sizes(module)) is not None
    ]


def _kind(module: nn.Module) -> str:
    return module.dense_class.__name__ if isinstance(module, SparseModule) else type(module).__name__


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    for names in _SIZES:
        if all(isinstance(getattr(module, name, None), int) for name in names):
            return getattr(module, names[0]), getattr(module, names[1])
    return None


def barrier_of(flow: Flow, name: str) -> str:
    """Why a layer that could be cut was not seen as one."""
    own = f"{name}: "
    found = (reason.removeprefix(own) for reason in flow.barriers.values() if reason.startswith(own))
    return next(found, "it is not called on the example")


def _verdict(sizes: tuple[int, int], cut: Cut) -> tuple[Code, str]:
    words = []
    if cut.gathers:
        words.append(f"gathers {cut.cols} of {cut.inputs} inputs")
    elif cut.cols < cut.inputs:
        words.append(f"reads {cut.cols} of {cut.inputs} inputs, zeros for the others")
    if cut.scatters:
        words.append(f"keeps its scatter: {cut.rows} of {cut.outputs} outputs")
    elif cut.rows < cut.outputs:
        words.append(f"computes {cut.rows} of {cut.outputs} outputs, the others united with zeros")
    joined = bool(words)
    if cut.folded:
        words.append(f"{cut.folded} constant inputs folded into it")
    if joined:
        code = Code.JOINED if cut.module is not None else Code.KEPT
    else:
        code = Code.COMPACTED if cut.module is not None else Code.WHOLE
    return code, "; ".join(words)


def edge_rows(flow: Flow, cuts: Mapping[str, Cut]) -> list[EdgeRow]:
    by_node = {use.node: name for name, use in flow.uses.items() if _mixes(use)}
    rows = []
    for node, name in by_node.items():
        for consumer in _consumers(flow, node, by_node):
            rows.append(_edge(flow, cuts, name, consumer, by_node.get(consumer)))
    return list(dict.fromkeys(rows))


def _mixes(use: Use) -> bool:
    """The layer ends an edge and begins another."""
    return not isinstance(use.layer.dense, (*NORMS, nn.PReLU))


def _consumers(flow: Flow, node: fx.Node, layers: Mapping[fx.Node, str]) -> Iterator[fx.Node]:
    """Layers and barriers that a layer's output reaches."""
    seen, waiting = {node}, [node]
    while waiting:
        for user in waiting.pop(0).users:
            if user in seen:
                continue
            seen.add(user)
            if user in layers or user in flow.barriers:
                yield user
            else:
                waiting.append(user)


def _edge(flow: Flow, cuts: Mapping[str, Cut], name: str, consumer: fx.Node, to: str | None) -> EdgeRow:
    use, cut = flow.uses[name], cuts[name]
    before, after = len(use.target), cut.outputs
    other = cuts.get(to) if to is not None else None
    words = []
    if cut.rows < cut.outputs:
        exists = flow.exists(use.target)
        words += flow.why(use.target, exists & ~(use.target.varying & use.target.live))
    if other is not None and other.cols < other.inputs:
        words.append(f"{to} reads {other.cols} of {other.inputs}")
    if to is None:
        words.append(flow.barriers[consumer])
    label = to if to is not None else _label(flow, consumer)
    if not words:
        code = Code.COMPACTED if after < before else Code.WHOLE
    else:
        code = Code.JOINED if after < before else Code.KEPT
    if to is None and cut.rows == cut.outputs == before:
        code = Code.WHOLE
    return EdgeRow(name, label, code, (before, after), "; ".join(dict.fromkeys(words)))


def _label(flow: Flow, consumer: fx.Node) -> str:
    """A layer that is not cut by its name, what else stops the pass in parentheses."""
    for given in consumer.all_input_nodes:
        owner = flow.trace.names.get(given, "").rpartition(".")[0]
        if owner in flow.fixed:
            return owner
    return f"({op_name(consumer) or consumer.op})"
