"""Which weights of a model a plan prunes, and for each other layer the reason why not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from zlib import crc32

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparseops._eligible import Layer, check_choices, find_layers, size_verdict
from sparseops._select import outputs_first
from sparseops.nn import SparseModule
from sparseops.prune import Criterion, Layers, Plan, Treatment, Unstructured
from sparseops.report import Code
from sparseops.train.shards import is_sharded

KINDS: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.MultiheadAttention,
)
"""The layers that unstructured pruning takes without being asked for each by name."""

IMPOSSIBLE = frozenset(
    {Code.LAZY, Code.META_DEVICE, Code.COMPLEX, Code.QUANTIZED, Code.TORCHSCRIPT, Code.PARAMETRIZED}
)
"""Of layers without a weight that could be changed in place."""

# What fully_shard does to a layer while it is trained says nothing of the layer that convert will see.
_OF_SHARDING = frozenset({Code.SUBCLASS, Code.TENSOR_KIND})


@dataclass(frozen=True, eq=False)
class Target:
    """A weight that is pruned: a parameter of a layer.

    layer: where it lies, with what is asked for it as ``treatment``. parameter: its name there. note: what to
    know of it.
    """

    layer: Layer
    parameter: str
    note: str = ""

    @property
    def name(self) -> str:
        """The parameter's name in the model."""
        return f"{self.layer.name}.{self.parameter}" if self.layer.name else self.parameter

    @property
    def weight(self) -> nn.Parameter:
        """The parameter as it is now."""
        weight: nn.Parameter = self.layer.module._parameters[self.parameter]
        return weight

    @property
    def groups(self) -> int:
        """Of a convolution; 1 of other layers."""
        return int(getattr(self.layer.module, "groups", 1))

    @property
    def seed(self) -> int:
        """A number that depends on the name alone, for scores at random."""
        return crc32(self.name.encode())

    def criterion(self, default: str | Criterion) -> str | Criterion:
        """The one that it is scored by: its rule's own, else ``default``."""
        own: str | Criterion | None = getattr(self.layer.treatment, "criterion", None)
        return own or default

    def logical(self, t: Tensor) -> Tensor:
        """A tensor of the parameter's shape as [outputs, inputs of a group, *taps]; the columns of an
        embedding are its outputs."""
        return t.t() if isinstance(self.layer.module, nn.Embedding) else outputs_first(self.layer.module, t)

    def physical(self, t: Tensor) -> Tensor:
        """What ``logical`` made such, of the parameter's shape again."""
        if isinstance(self.layer.module, nn.Embedding):
            return t.t()
        if not getattr(self.layer.module, "transposed", False):
            return t
        by_group = t.unflatten(0, (self.groups, -1)).transpose(1, 2)
        return by_group.flatten(0, 1)


@dataclass(frozen=True)
class Left:
    """A layer that is not pruned, and why."""

    layer: Layer
    reason: str


def find_targets(model: nn.Module, plan: Treatment | Plan, caller: str) -> tuple[list[Target], list[Left]]:
    """The weights that ``plan`` prunes, and the layers that it leaves.

    A layer that ``convert`` cannot make sparse would lose accuracy for nothing, and is pruned only where a
    name pattern of the plan other than "*" asks for it, or where the zeros are in no pattern anyway.

    Raises:
        ValueError: there is no such weight; a name pattern matches nothing; the model is converted already;
            or one weight has two names that the plan treats differently.
    """
    if isinstance(plan, Plan):
        check_choices(model, "plan", [name for name, _ in plan.rules], caller)
    for name, module in model.named_modules():
        if isinstance(module, SparseModule):
            raise ValueError(
                f"{caller}: model must not be converted yet, got sparse layer {name!r} "
                "(sparseops.to_dense(model) makes it an ordinary one again)"
            )
    targets: list[Target] = []
    left: list[Left] = []
    for layer in find_layers(model, pattern=plan):
        reason, note = _verdict(layer)
        if reason is not None:
            left.append(Left(layer, reason))
            continue
        made = list(_targets_of(replace(layer, code=None, reason=""), note))
        targets += made
        if not made:
            left.append(Left(layer, "it has no weight of two or more dimensions"))
    if not targets:
        why = f"; {left[0].layer.name or 'the model'}: {left[0].reason}" if left else ""
        raise ValueError(f"{caller}: plan must name at least one layer that can be pruned, got none{why}")
    return _once(targets, caller), left


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that data parallelism holds; another one as it is."""
    inner: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
    return inner


def _verdict(layer: Layer) -> tuple[str | None, str]:
    """Why a layer is not pruned, None if it is; and what to know of one that is."""
    code, reason, treatment = layer.code, layer.reason, layer.treatment
    if code in IMPOSSIBLE or treatment is None:
        return reason, ""
    if code in _OF_SHARDING and is_sharded(layer.module._parameters.values()):
        code, reason = size_verdict(layer) or (None, "")
    explicit = layer.rule is not None and layer.rule != "*"
    if isinstance(treatment, (Unstructured, Layers)):
        if not explicit and not isinstance(layer.module, KINDS):
            return f"{layer.kind} is pruned only where a name pattern of the plan asks for it", ""
        return None, ""
    if code is None:
        return None, ""
    if not explicit and code is not Code.HOOKS:  # which may be there for training alone
        return f"convert could not make it sparse: {reason}", ""
    return None, f"convert will leave it dense: {reason}"


def _targets_of(layer: Layer, note: str) -> Iterator[Target]:
    for name, parameter in layer.module._parameters.items():
        if parameter is None or parameter.dim() < 2 or not parameter.is_floating_point():
            continue
        frozen = "" if parameter.requires_grad else "frozen, and pruned all the same"
        yield Target(layer, name, "; ".join(filter(None, [note, frozen])))


def _once(targets: list[Target], caller: str) -> list[Target]:
    """Each weight one time, though several layers hold it."""
    seen: dict[int, Target] = {}
    for target in targets:
        first = seen.setdefault(id(target.weight), target)
        if first.layer.treatment != target.layer.treatment:
            raise ValueError(
                f"{caller}: plan must treat {first.name} and {target.name}, which are one weight, alike, "
                f"got {first.layer.treatment!r} and {target.layer.treatment!r}"
            )
    return list(seen.values())
