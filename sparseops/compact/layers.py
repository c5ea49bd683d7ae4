"""The layers of a model that can be cut, as what they are to the pass: a weight by outputs and inputs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from sparseops.compact.trace import Trace
from sparseops.nn import SparseConv1d, SparseConv2d, SparseEmbedding, SparseLinear, SparseModule

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
KINDS = (*CONVS, *TRANSPOSED, *NORMS, nn.Linear, nn.PReLU, nn.Embedding)
SPARSE_KINDS = (SparseLinear, SparseConv1d, SparseConv2d, SparseEmbedding)

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@dataclass(frozen=True, eq=False)
class Layer:
    """name: in the model. given: the module there, perhaps sparse. dense: a dense one of the same weight."""

    name: str
    given: nn.Module
    dense: nn.Module

    @property
    def groups(self) -> int:
        return int(getattr(self.dense, "groups", 1))

    @property
    def depthwise(self) -> bool:
        """A convolution with one input channel per group."""
        return self.groups > 1 and self.weight.shape[1] == 1

    @property
    def transposed(self) -> bool:
        return isinstance(self.dense, TRANSPOSED)

    @property
    def padded(self) -> bool:
        """Zeros stand beside the input, so that a constant channel is none at the border."""
        if not isinstance(self.dense, CONVS) or self.dense.padding_mode != "zeros":
            return False
        padding = self.dense.padding
        if isinstance(padding, str):
            return padding == "same" and math.prod(self.dense.kernel_size) > 1
        return any(padding)

    @property
    def weight(self) -> Tensor:
        """[O, C, ...], C the channels of one group."""
        weight: Tensor = self.dense._parameters["weight"].detach()  # type: ignore[union-attr]
        return weight.transpose(0, 1) if self.transposed else weight

    @property
    def bias(self) -> Tensor | None:
        bias = self.dense._parameters["bias"]
        return None if bias is None else bias.detach()

    @property
    def kept(self) -> tuple[Tensor, Tensor] | None:
        """Inputs and outputs that a compact 2:4 weight ties together, which can be renumbered only."""
        if isinstance(self.given, SparseModule) and self.given._buffers.get("meta") is not None:
            in_index, out_index = (self.given._buffers[name] for name in ("in_index", "out_index"))
            return in_index.cpu().long(), out_index.cpu().long()  # type: ignore[union-attr]
        return None

    @cached_property
    def nonzero(self) -> Tensor:
        """bool [groups, O / groups, C] on the CPU: which outputs read which inputs."""
        mask = (self.weight != 0).flatten(2).any(2) if self.weight.ndim > 2 else self.weight != 0
        return mask.view(self.groups, mask.shape[0] // self.groups, mask.shape[1]).cpu()

    def weighted(self, constant: Tensor) -> Tensor:
        """float64 [O, taps...] on the CPU: what inputs that are ``constant`` [groups * C] add to each output,
        through each tap."""
        weight = self.weight.cpu()
        if self.groups == 1:
            index = constant.nonzero().flatten()
            return torch.tensordot(weight.index_select(1, index).double(), constant[index], ([1], [0]))
        by_group = constant.view(self.groups, 1, -1).expand(self.nonzero.shape)
        return (weight.double() * by_group.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))).sum(1)


def find_layers(
    model: nn.Module, dense: Mapping[str, nn.Module], trace: Trace
) -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers of ``model`` that can be cut, by name, and why others with parameters cannot.

    dense: by name the modules of the model that was traced.
    """
    holders = Counter(
        id(tensor)
        for module in model.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    )
    names = {id(module): name for name, module in model.named_modules()}
    reads = Counter[str]()
    for node, name in trace.names.items():
        reads[name] += len(node.users)
    layers, fixed = {}, {}
    for name, given in model.named_modules(remove_duplicate=False):
        if not (given._parameters or given._buffers):
            continue
        layer = Layer(names[id(given)], given, dense[name])
        reason = _why_fixed(layer, holders, reads)
        if reason is None:
            layers[name] = layer
        else:
            fixed[name] = reason
    return layers, fixed


def _why_fixed(layer: Layer, holders: Counter[int], reads: Counter[str]) -> str | None:
    given = layer.given
    if isinstance(given, SparseModule) and given.format != "channel":
        return f"a weight of format {given.format} reads and writes every channel"
    if type(given) not in (*KINDS, *SPARSE_KINDS):
        return f"{type(given).__name__} is no kind of layer that can be cut"
    held = [*given._parameters.values(), *given._buffers.values()]
    if any(tensor is not None and holders[id(tensor)] > 1 for tensor in held):
        return "another module holds the same tensor"
    if any(getattr(given, hooks, None) for hooks in _HOOKS):
        return "hooks see its channels"
    if isinstance(layer.dense, nn.Embedding) and (given.max_norm is not None or given.sparse):
        return "max_norm and sparse gradients need whole rows"
    if any(reads[f"{layer.name}.{key}".lstrip(".")] > 1 for key in ("weight", "running_mean")):
        return "it is called more than once, or its weight is read elsewhere"
    if layer.transposed and layer.groups > 1:
        return "transposed convolutions are cut only without groups"
    if isinstance(given, nn.PReLU) and given.num_parameters == 1:
        return "one slope serves every channel"
    weight = layer.dense._parameters.get("weight")
    if weight is not None and (weight.is_meta or not torch.is_floating_point(weight)):
        return "its weight holds no floating-point data"
    return None
