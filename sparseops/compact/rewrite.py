"""The layers of the smaller model: the old ones without the channels that need not exist."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseops.compact import cost
from sparseops.compact.channels import Flow, Use
from sparseops.compact.layers import NORMS, Layer
from sparseops.compact.trace import shape_of
from sparseops.formats.channel_pruned import Keep, compact_weight
from sparseops.nn import SparseModule

Module = TypeVar("Module", bound=nn.Module)

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)

# Of layers with numbers for each channel: the dimension of the channels, and the attribute that counts them.
_COUNTS = {nn.PReLU: (0, "num_parameters"), nn.Embedding: (1, "embedding_dim")}
_COUNTS |= dict.fromkeys(NORMS, (0, "num_features"))


class Uneven(Exception):
    """The groups of a convolution would keep different numbers of channels. layer: its name."""

    def __init__(self, layer: str) -> None:
        super().__init__(layer)
        self.layer = layer


class ConstantInputs(nn.Module):
    """A zero-padded convolution together with what it made of input channels that were constants.

    Inside the image they add the same number everywhere, at the border less, where taps meet the padding. So
    ``constants`` [O, 1, ...], the weight of those channels times their constants, is applied to one channel
    of ones as large as the input, and the result added.
    """

    def __init__(self, layer: nn.Module, constants: nn.Parameter) -> None:
        super().__init__()
        self.layer = layer
        self.constants = constants
        self.dims = constants.ndim - 2

    def forward(self, input: Tensor) -> Tensor:
        layer: Any = self.layer
        # One channel of one image, or of the only one where there is no batch.
        ones = torch.ones_like(input.narrow(-self.dims - 1, 0, 1)[:1])
        convolution: Any = _CONVOLUTIONS[self.dims - 1]
        added = convolution(ones, self.constants, None, layer.stride, layer.padding, layer.dilation)
        y: Tensor = layer(input)
        return y.add_(added)


@dataclass(frozen=True)
class Cut:
    """What became of a layer. module: the new one, None where the old one stays. inputs, outputs: channels on
    its edges. cols, rows: those that it reads and computes. gathers, scatters: whether it does so from or to
    more channels. folded: constant inputs that moved into it."""

    module: nn.Module | None
    inputs: int
    outputs: int
    cols: int
    rows: int
    gathers: bool = False
    scatters: bool = False
    folded: int = 0


def cut_layers(flow: Flow) -> dict[str, Cut]:
    """What becomes of each layer that the flow has seen.

    Raises:
        Uneven: a grouped convolution cannot be cut like this.
    """
    return {name: _cut(flow, use) for name, use in flow.uses.items()}


def _cut(flow: Flow, use: Use) -> Cut:
    dense = use.layer.dense
    if isinstance(dense, (*NORMS, nn.PReLU, nn.Embedding)):
        return _cut_columns(flow, use)
    return _cut_product(flow, use)


def _cut_columns(flow: Flow, use: Use) -> Cut:
    """Layers with numbers for each channel, or, the embedding, with a column."""
    layer, exists = use.layer, flow.exists(use.target)
    count = int(exists.sum())
    kept = (use.target.varying | (use.target.constant != 0))[exists]
    scatters = isinstance(layer.given, SparseModule) and not kept.all()
    rows = int(kept.sum()) if scatters else count
    if exists.all():
        return Cut(None, count, count, count, rows, scatters=scatters)
    index = exists.nonzero().flatten()
    width, name = _COUNTS[type(layer.dense)]
    new: nn.Module = shell(layer.dense).train(layer.given.training)
    setattr(new, name, count)
    for held in (new._parameters, new._buffers):
        for key, tensor in held.items():
            if tensor is not None:
                mine = tensor.detach()
                mine = mine.index_select(width, index.to(mine.device)) if mine.ndim > width else mine
                held[key] = _like(tensor, mine)
    if scatters:
        keep = Keep(kept.nonzero().flatten())
        new = type(layer.given).pack(new, prune=keep, format="channel")[0]  # type: ignore[attr-defined]
    return Cut(new, count, count, count, rows, scatters=scatters)


def _cut_product(flow: Flow, use: Use) -> Cut:
    layer, source, target = use.layer, use.source, use.target
    nonzero = layer.nonzero
    groups, _, width = nonzero.shape
    out = flow.exists(target)
    into = flow.exists(source) if source is not None else torch.ones(groups * width, dtype=torch.bool)
    computed = target.varying & target.live
    read = (nonzero & computed.view(groups, -1, 1)).any(1).flatten()
    fold = torch.zeros_like(into)
    if source is not None:
        fold = read & ~into & (source.constant != 0)
    if groups > 1 and not layer.depthwise:
        for exists in (into, out):
            if len(exists.view(groups, -1).sum(1).unique()) > 1:
                raise Uneven(layer.name)
    inputs, outputs = int(into.sum()), int(out.sum())
    cols, rows = int((read & into).sum()), int((computed & out).sum())
    before = _lists(layer)
    if layer.kept is not None:
        in_index, out_index = layer.kept
        cols, rows = len(in_index), len(out_index)
        new = None if into.all() and out.all() else _renumber(layer, use, into, out)
        return Cut(new, inputs, outputs, cols, rows, cols < inputs, rows < outputs)
    gathers, scatters = False, False
    if isinstance(layer.given, SparseModule) and not layer.depthwise and cols and rows:
        gathers, scatters = cost.gather_and_scatter(_shape(use, inputs, outputs, cols, rows))
    unchanged = into.all() and out.all() and not fold.any()
    if unchanged and (before is None or before == (cols, rows)):
        sparse = before is not None
        return Cut(None, inputs, outputs, cols, rows, sparse and cols < inputs, sparse and rows < outputs)
    dense, constants = _smaller(layer, use, into, out, computed, fold)
    new = dense
    if gathers or scatters:
        keep = Keep(
            (read & into)[into].nonzero().flatten() if gathers else None,
            (computed & out)[out].nonzero().flatten() if scatters else None,
        )
        new = type(layer.given).pack(dense, prune=keep, format="channel")[0]  # type: ignore[attr-defined]
    if constants is not None:
        new = ConstantInputs(new, constants).train(new.training)
    return Cut(new, inputs, outputs, cols, rows, gathers, scatters, int(fold.sum()))


def _lists(layer: Layer) -> tuple[int, int] | None:
    """How many inputs and outputs a sparse layer keeps."""
    if not isinstance(layer.given, SparseModule):
        return None
    in_index, out_index = (layer.given._buffers[name] for name in ("in_index", "out_index"))
    assert in_index is not None and out_index is not None
    return in_index.numel(), out_index.numel()


def _shape(use: Use, inputs: int, outputs: int, cols: int, rows: int) -> cost.Shape:
    weight = use.layer.weight
    x, y = (prod(shape_of(node) or ()) for node in (use.node.all_input_nodes[0], use.node))
    return cost.Shape(
        inputs=inputs,
        outputs=outputs,
        cols=cols,
        rows=rows,
        taps=prod(weight.shape[2:]),
        places_in=x // max(1, weight.shape[1] * use.layer.groups),
        places_out=y // max(1, weight.shape[0]),
        itemsize=weight.element_size(),
        fused=weight.is_cuda,
    )


def _smaller(
    layer: Layer, use: Use, into: Tensor, out: Tensor, computed: Tensor, fold: Tensor
) -> tuple[nn.Module, nn.Parameter | None]:
    """The dense layer of the channels that exist, and what a ``ConstantInputs`` around it has to add."""
    weight, bias, target = layer.weight, layer.bias, use.target
    device = weight.device
    rows = out.nonzero().flatten()
    cut = compact_weight(weight, into.nonzero().flatten().to(device), rows.to(device), layer.groups).movedim(
        -1, 1
    )
    idle = (~computed[out]).to(device)
    cut[idle] = 0
    offset = torch.zeros(len(rows), dtype=torch.float64)
    if bias is not None:
        offset += bias.cpu().double()[rows]
    constants = None
    if fold.any():
        assert use.source is not None
        folded = layer.weighted(use.source.constant * fold)[rows]
        folded[~computed[out]] = 0
        if layer.padded:
            constants = folded.unsqueeze(1).to(device, weight.dtype)
        else:
            offset += folded.flatten(1).sum(1) if folded.ndim > 1 else folded
    offset = torch.where(target.varying[rows], offset, target.constant[rows])
    new: Any = shell(layer.dense)
    new.train(layer.given.training)
    new.weight = _like(new.weight, cut.transpose(0, 1) if layer.transposed else cut)
    if bias is not None:
        new.bias = _like(new.bias, offset.to(device, bias.dtype))
    elif offset.any():
        new.bias = nn.Parameter(offset.to(device, weight.dtype), requires_grad=new.weight.requires_grad)
    _resize(new, int(into.sum()), len(rows))
    if layer.depthwise:
        new.groups = new.in_channels
    if constants is None:
        return new, None
    return new, nn.Parameter(constants, requires_grad=new.weight.requires_grad)


def _renumber(layer: Layer, use: Use, into: Tensor, out: Tensor) -> nn.Module:
    """The layer with its compact weight as it is, among fewer channels."""
    given: Any = layer.given
    new: Any = shell(given)
    inputs, outputs = int(into.sum()), int(out.sum())
    new.values = _like(given.values, given.values.detach())
    for name, exists in (("in_index", into), ("out_index", out)):
        index = given._buffers[name]
        new._buffers[name] = (exists.cumsum(0) - 1).to(index)[index.long()]
    new._buffers["meta"] = given._buffers["meta"].clone()
    new.weight_shape = (outputs, inputs // layer.groups, *given.weight_shape[2:])
    if layer.bias is not None:
        new.bias = _like(given.bias, layer.bias[out.to(layer.bias.device)])
    _resize(new, inputs, outputs)
    new._prepare()
    return new


def _resize(layer: Any, inputs: int, outputs: int) -> None:
    kind = "features" if hasattr(layer, "in_features") else "channels"
    setattr(layer, f"in_{kind}", inputs)
    setattr(layer, f"out_{kind}", outputs)


def _like(old: Tensor, new: Tensor) -> Any:
    """``new`` in memory of its own and in the memory format of ``old``, a parameter if that is one."""
    order = torch.contiguous_format
    if old.ndim == 4 and not old.is_contiguous() and old.is_contiguous(memory_format=torch.channels_last):
        order = torch.channels_last
    new = new.clone(memory_format=order)
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def shell(module: Module) -> Module:
    """A copy of a module that shares its tensors, to be given others."""
    new = copy.copy(module)
    for name, held in vars(new).items():
        if isinstance(held, (dict, set)):
            vars(new)[name] = held.copy()
    return new
