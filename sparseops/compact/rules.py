"""How channels go through each op of ATen: the table ``RULES``, and the few rules that it is made of.

An op that is not in the table is a barrier: all channels of its arguments stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from math import prod
from typing import TypeGuard

import torch
from torch import Tensor, fx

from sparseops.compact.channels import Flow, Rule, Use, Value, unknown
from sparseops.compact.trace import arg, op_name, shape_of

# Convolution, matrix product, depthwise convolution


def _product(flow: Flow, node: fx.Node) -> Value | None:
    """A layer that mixes channels. Its outputs are new ones; one that reads nothing that varies is constant.
    Of a depthwise convolution each output belongs to the input that it reads."""
    layer = flow.layer_of(node)
    if isinstance(layer, str):
        return flow.barrier(node, layer)
    x, shape = node.all_input_nodes[0], shape_of(node)
    assert shape is not None
    axis = len(shape) - 1 if op_name(node) == "linear" else len(shape) + 1 - layer.weight.ndim
    source = flow.along(x, axis)
    if source is None and layer.depthwise:
        return flow.barrier(node)
    if source is not None and layer.transposed:
        # A constant channel does not give a constant one: not every tap reaches every place.
        _demand_nonzero(flow, source, layer.nonzero.any(1).flatten())
    nonzero = layer.nonzero
    groups, _, width = nonzero.shape
    given = source if source is not None else unknown(axis, torch.arange(groups * width))
    by_group = given.varying.view(groups, 1, width)
    known = given.constant.view(groups, 1, width)
    varying = (nonzero & by_group).any(2)
    if layer.padded or layer.transposed:
        border = (nonzero & ~by_group & (known != 0)).any(2)
        varying |= border
    constant = torch.zeros(varying.numel(), dtype=torch.float64)
    if bool((known != 0).any()):
        constant += layer.weighted(given.constant).view(len(constant), -1).sum(1)
    if layer.bias is not None:
        constant += layer.bias.cpu().double()
    ids = flow.new_ids(varying.numel())
    if layer.depthwise and source is not None:
        ids = source.ids.repeat_interleave(varying.shape[1])
    varying = varying.flatten()
    if layer.kept is not None:
        varying[layer.kept[1]] = True
    target = Value(axis, ids, varying, constant)
    if layer.depthwise and layer.padded:
        flow.note(target, border.flatten(), f"{layer.name} pads a constant that is not zero")
    flow.uses[layer.name] = Use(layer, node, source, target)
    if layer.kept is not None:
        _keep_as_they_are(flow, flow.uses[layer.name], layer.kept)
    return target


def _reads(flow: Flow, node: fx.Node, target: Value) -> None:
    use = flow.uses[flow.layer_of(node).name]  # type: ignore[union-attr]
    if use.source is None:
        return
    nonzero = use.layer.nonzero
    rows = (target.live & target.varying).view(nonzero.shape[0], -1, 1)
    use.source.live |= (nonzero & rows).any(1).flatten()


def _demand_nonzero(flow: Flow, source: Value, read: Tensor) -> None:
    which = read & ~source.varying & (source.constant != 0)
    flow.demand_ids(source, which, "a transposed convolution reads a constant that is not zero")


def _keep_as_they_are(flow: Flow, use: Use, kept: tuple[Tensor, Tensor]) -> None:
    """The inputs and outputs that a compact 2:4 weight ties together stay."""
    reason = f"{use.layer.name} has a compact weight that is 2:4, which is not cut"
    for value, index in zip((use.source, use.target), kept, strict=True):
        if value is not None:
            which = torch.zeros(len(value), dtype=torch.bool)
            which[index] = True
            flow.demand_ids(value, which, reason)


def _embedding(flow: Flow, node: fx.Node) -> Value | None:
    """Columns of a table; one that holds one number throughout is constant."""
    layer = flow.layer_of(node)
    shape = shape_of(node)
    if isinstance(layer, str):
        return flow.barrier(node, layer)
    assert shape is not None
    table = layer.weight.cpu()
    varying = (table != table[:1]).any(0)
    target = Value(len(shape) - 1, flow.new_ids(len(varying)), varying, table[0].double())
    flow.uses[layer.name] = Use(layer, node, None, target)
    return target


def _nothing(flow: Flow, node: fx.Node, target: Value) -> None:
    """Reads no channels."""


# Channel by channel


def _same(flow: Flow, node: fx.Node) -> Value | None:
    """Each channel by itself, everywhere alike: a constant gives the constant that the op makes of it."""
    x = next((x for x in node.all_input_nodes if x in flow.values), None)
    value = node.meta.get("val")
    others = [other for other in node.all_input_nodes if other is not x]
    if x is None or not all(_is_number(flow, other) for other in others) or not _is_floating(value):
        return flow.barrier(node)
    return _applied(flow, node, x)


def _applied(flow: Flow, node: fx.Node, x: fx.Node) -> Value:
    source = flow.values[x]
    constant = flow.apply(node, {x: _tiny(source, len(shape_of(x) or ()))})
    return Value(source.axis, source.ids, source.varying, constant.flatten())


def _own(parameter: str) -> Callable[[Flow, fx.Node], Value | None]:
    """The same, with numbers of a layer for each channel; ``parameter`` says which layer."""

    def forward(flow: Flow, node: fx.Node) -> Value | None:
        given = flow.trace.tensors.get(arg(node, parameter))
        if op_name(node) == "prelu" and given is not None and given.numel() == 1:
            return _same(flow, node)
        if arg(node, "training"):
            return flow.barrier(node, f"{op_name(node)} takes the statistics of the batch")
        layer = flow.layer_of(node, parameter)
        source = flow.along(node.all_input_nodes[0], 1)
        if isinstance(layer, str):
            return flow.barrier(node, layer)
        if source is None:
            return flow.barrier(node)
        value = _applied(flow, node, node.all_input_nodes[0])
        flow.uses[layer.name] = Use(layer, node, source, value)
        return value

    return forward


def _as_it_was(flow: Flow, node: fx.Node) -> Value | None:
    """Each channel by itself, and a constant channel stays what it is."""
    if arg(node, "train"):
        return flow.barrier(node, f"{op_name(node)} is random")
    x, value = node.all_input_nodes[0], node.meta.get("val")
    source = flow.values.get(x)
    if source is None or not _is_floating(value) or value.ndim != len(shape_of(x) or ()):
        return flow.barrier(node)
    if value.shape[source.axis] != len(source) or source.axis >= value.ndim - _spatial(node):
        return flow.barrier(node)
    return Value(source.axis, source.ids, source.varying, source.constant)


def _spatial(node: fx.Node) -> int:
    """How many of the last dimensions an op like max_pool2d mixes."""
    name = op_name(node)
    return int(name[-2]) if name[-2:] in ("1d", "2d", "3d") else 0


def _bordered(filling: Callable[[fx.Node], float | None]) -> Callable[[Flow, fx.Node], Value | None]:
    """The same, but for a border of ``filling``: another constant varies from place to place."""

    def forward(flow: Flow, node: fx.Node) -> Value | None:
        value, border = _as_it_was(flow, node), filling(node)
        if value is None or border is None:
            return value
        broken = ~value.varying & (value.constant != border)
        flow.note(value, broken, f"{op_name(node)} pads a constant that is not {border:g}")
        return Value(value.axis, value.ids, value.varying | broken, value.constant)

    return forward


def _passes(flow: Flow, node: fx.Node, target: Value) -> None:
    """Who reads a channel of the result reads that of the arguments, unless it is constant in any case."""
    for x in node.all_input_nodes:
        source = flow.values.get(x)
        if source is not None and len(source) == len(target):
            source.live |= target.live & target.varying


def _is_floating(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor) and value.is_floating_point()


def _pooling_border(node: fx.Node) -> float | None:
    if arg(node, "divisor_override"):
        return math.nan  # even without a border no constant stays what it is
    padding = arg(node, "padding")
    padded = any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
    return 0.0 if padded and arg(node, "count_include_pad") else None


def _padding_border(node: fx.Node) -> float | None:
    if op_name(node) == "pad" and arg(node, "mode") != "constant":
        return None
    return float(arg(node, "value") or 0.0)


def _tiny(value: Value, ndim: int) -> Tensor:
    shape = [1] * ndim
    shape[value.axis] = len(value)
    return value.constant.view(shape)


# Two or more tensors


def _join(flow: Flow, node: fx.Node) -> Value | None:
    """Element by element of two tensors: their channels are of one class."""
    shape = shape_of(node)
    operands = [x for x in node.args[:2] if isinstance(x, fx.Node) and not _is_number(flow, x)]
    if len(operands) == 1:
        return _same(flow, node)
    found = [x for x in operands if x in flow.values]
    if not found or shape is None:
        return flow.barrier(node)
    # Shapes are matched from the right.
    counts = [len(flow.values[x]) for x in found]
    first = found[counts.index(max(counts))]
    value = flow.values[first]
    axis = value.axis + len(shape) - len(shape_of(first) or ())
    for x in operands:
        if not _fits(flow, x, axis, shape, value):
            return flow.barrier(node, f"{op_name(node)} meets a tensor whose channels are not known")
    partners = [flow.values[x] for x in found if len(flow.values[x]) == len(value)]
    spread = len(partners) < len(operands)
    if spread:
        flow.demand([x for x in found if len(flow.values[x]) != len(value)], f"{op_name(node)} spreads it")
    for partner in partners[1:]:
        flow.unite(partners[0].ids, partner.ids)
    varying = torch.stack([partner.varying for partner in partners]).any(0) | spread
    zero = _zeros(node, partners)
    if spread or len(partners) == 1:
        constant = torch.zeros(len(value), dtype=torch.float64)
    else:
        tiny = {x: _tiny(flow.values[x], len(shape_of(x) or ())) for x in operands}
        constant = flow.apply(node, tiny).flatten()
    return Value(axis, value.ids, varying & ~zero, constant.masked_fill(zero, 0.0))


def _fits(flow: Flow, x: fx.Node, axis: int, shape: tuple[int, ...], like: Value) -> bool:
    """Whether a tensor brings a channel for each of ``like``'s, or one number for all of them."""
    own = shape_of(x)
    if own is None:
        return False
    place = axis - (len(shape) - len(own))
    value = flow.values.get(x)
    if value is not None and len(value) == len(like):
        return value.axis == place
    return place < 0 or own[place] == 1


def _is_number(flow: Flow, x: fx.Node) -> bool:
    known = flow.trace.tensors.get(x)
    return known is not None and known.numel() == 1


def _zeros(node: fx.Node, partners: list[Value]) -> Tensor:
    """Channels of a product of which one factor is the constant zero."""
    zero = torch.zeros(len(partners[0]), dtype=torch.bool)
    if op_name(node) == "mul":
        for partner in partners:
            zero |= ~partner.varying & (partner.constant == 0)
    return zero


def _concatenate(flow: Flow, node: fx.Node) -> Value | None:
    parts, shape = arg(node, "tensors"), shape_of(node)
    found = [flow.values[x] for x in parts if x in flow.values]
    if not found or shape is None:
        return flow.barrier(node)
    axis, dim = found[0].axis, arg(node, "dim") % len(shape)
    if any(value.axis != axis for value in found):
        return flow.barrier(node)
    if dim != axis:
        return _stack(flow, node, parts)
    values = [flow.values[x] if x in flow.values else flow.whole(x, axis) for x in parts]
    ids, varying, constant = (
        torch.cat([getattr(value, name) for value in values]) for name in ("ids", "varying", "constant")
    )
    return Value(axis, ids, varying, constant)


def _stack(flow: Flow, node: fx.Node, parts: list[fx.Node]) -> Value | None:
    """Side by side along another dimension: constant where all parts are the same constant."""
    if not all(x in flow.values for x in parts):
        return flow.barrier(node)
    first, *others = values = [flow.values[x] for x in parts]
    varying = first.varying
    for value in others:
        flow.unite(first.ids, value.ids)
        varying = varying | value.varying | (value.constant != first.constant)
    return Value(values[0].axis, first.ids, varying, first.constant)


def _parts(flow: Flow, node: fx.Node, target: Value) -> None:
    place, axis = 0, arg(node, "dim") % len(shape_of(node) or ())
    for x in arg(node, "tensors"):
        shape, value = shape_of(x), flow.values.get(x)
        count = shape[axis] if shape is not None and axis == target.axis else 0
        if value is not None:
            value.live |= target.live[place : place + count] if axis == target.axis else target.live
        place += count


# Shapes


def _reshape(flow: Flow, node: fx.Node) -> Value | None:
    """Dimensions before the channels' and after it change as they like; some after may be merged into it."""
    x = node.all_input_nodes[0]
    source, old, new = flow.values.get(x), shape_of(x), shape_of(node)
    if source is None or old is None or new is None:
        return flow.barrier(node)
    before, after = prod(old[: source.axis]), prod(old[source.axis + 1 :])
    for axis, size in enumerate(new):
        merged = size // max(1, len(source))
        if prod(new[:axis]) == before and size == merged * len(source) and merged and after % merged == 0:
            if prod(new[axis + 1 :]) * merged == after and (size > 1 or len(source) == 1):
                fields = (source.ids, source.varying, source.constant)
                return Value(axis, *(field.repeat_interleave(merged) for field in fields))
    return flow.barrier(node, "a reshape divides its channels")


def _merged(flow: Flow, node: fx.Node, target: Value) -> None:
    source = flow.values[node.all_input_nodes[0]]
    source.live |= target.live.view(len(source), -1).any(1)


def _permute(flow: Flow, node: fx.Node) -> Value | None:
    x = node.all_input_nodes[0]
    source, shape = flow.values.get(x), shape_of(x)
    if source is None or shape is None:
        return flow.barrier(node)
    order = list(range(len(shape)))
    if op_name(node) == "permute":
        order = [dim % len(shape) for dim in arg(node, "dims")]
    elif op_name(node) == "transpose":
        a, b = arg(node, "dim0"), arg(node, "dim1")
        order[a], order[b] = order[b], order[a]
    else:
        order.reverse()
    return Value(order.index(source.axis), source.ids, source.varying, source.constant)


def _reduce(flow: Flow, node: fx.Node) -> Value | None:
    """A mean or an extreme over other dimensions than the channels'."""
    x = node.all_input_nodes[0]
    source, shape, dims = flow.values.get(x), shape_of(x), arg(node, "dim")
    if source is None or shape is None or not dims:
        return flow.barrier(node)
    reduced = {dim % len(shape) for dim in dims}
    if source.axis in reduced:
        return flow.barrier(node)
    gone = 0 if arg(node, "keepdim") else sum(dim < source.axis for dim in reduced)
    return Value(source.axis - gone, source.ids, source.varying, source.constant)


def _slice(flow: Flow, node: fx.Node) -> Value | None:
    x = node.all_input_nodes[0]
    source, shape = flow.values.get(x), shape_of(x)
    if source is None or shape is None or arg(node, "dim") % len(shape) == source.axis:
        return flow.barrier(node, "a slice counts its channels")
    dropped = op_name(node) == "select" and arg(node, "dim") % len(shape) < source.axis
    return Value(source.axis - dropped, source.ids, source.varying, source.constant)


def _table(*rows: tuple[str, Rule]) -> dict[str, Rule]:
    return {op: rule for ops, rule in rows for op in ops.split()}


_EACH, _CARRIED = Rule(_same, _passes), Rule(_as_it_was, _passes)

RULES = _table(
    ("linear conv1d conv2d conv3d", Rule(_product, _reads)),
    ("conv_transpose1d conv_transpose2d conv_transpose3d", Rule(_product, _reads)),
    ("embedding", Rule(_embedding, _nothing)),
    ("batch_norm", Rule(_own("running_mean"), _passes)),
    ("prelu", Rule(_own("weight"), _passes)),
    ("relu relu6 leaky_relu elu celu selu gelu silu mish hardswish hardsigmoid hardtanh", _EACH),
    ("sigmoid log_sigmoid softplus softsign tanh tanhshrink softshrink hardshrink", _EACH),
    ("threshold clamp clamp_min clamp_max round floor ceil abs neg reciprocal rsub", _EACH),
    ("pow square sqrt rsqrt exp log sin cos erf", _EACH),
    ("dropout alpha_dropout feature_dropout clone contiguous detach alias to _to_copy", _CARRIED),
    ("max_pool1d max_pool2d max_pool3d expand lift_fresh_copy", _CARRIED),
    ("adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d", _CARRIED),
    ("upsample_nearest1d upsample_nearest2d upsample_nearest3d", _CARRIED),
    ("upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d", _CARRIED),
    ("reflection_pad1d reflection_pad2d reflection_pad3d", _CARRIED),
    ("replication_pad1d replication_pad2d replication_pad3d", _CARRIED),
    ("avg_pool1d avg_pool2d avg_pool3d", Rule(_bordered(_pooling_border), _passes)),
    ("pad constant_pad_nd", Rule(_bordered(_padding_border), _passes)),
    ("add sub mul div maximum minimum", Rule(_join, _passes)),
    ("cat", Rule(_concatenate, _parts)),
    ("view reshape flatten unflatten squeeze unsqueeze _unsafe_view", Rule(_reshape, _merged)),
    ("permute transpose t numpy_T", Rule(_permute, _passes)),
    ("mean amax amin", Rule(_reduce, _passes)),
    ("slice select", Rule(_slice, _passes)),
    ("sym_size sym_stride sym_numel _assert_tensor_metadata", Rule(lambda flow, node: None, _nothing)),
)

RESHAPES = frozenset(op for op, rule in RULES.items() if rule.forward is _reshape)
"""Ops that may hold sizes written into the model's code, which only running the smaller model shows."""
