"""Which layers of a model can be made sparse, and for each other one the reason why not."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from sparseops.nn import (
    SparseConv1d,
    SparseConv2d,
    SparseEmbedding,
    SparseGRU,
    SparseLinear,
    SparseLSTM,
    SparseModule,
)
from sparseops.prune import Channels, Layers, Plan, Treatment, Unstructured
from sparseops.report import Code

Choice: TypeAlias = "str | type[nn.Module] | Callable[[str, nn.Module], bool]"

SPARSE_CLASSES: tuple[type[SparseModule], ...] = (
    SparseLinear,
    SparseConv1d,
    SparseConv2d,
    SparseLSTM,
    SparseGRU,
    SparseEmbedding,
)

FORMAT_24, FORMAT_CHANNELS = "nm24", "channel"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_OUT = 8
MIN_IN_LINEAR = 32
MIN_IN_CONV = 16

# What a subclass may define and still behave as its base in a forward.
_HARMLESS = frozenset(
    "__init__ __module__ __qualname__ __doc__ __annotations__ __annotate__ __annotate_func__ __constants__ "
    "__annotations_cache__ __firstlineno__ __static_attributes__ __parameters__ __orig_bases__ "
    "reset_parameters extra_repr".split()
)

_WEIGHT_READERS: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.MultiheadAttention, ("out_proj",)),
    (nn.TransformerEncoderLayer, ("linear1", "linear2")),
)


@dataclass
class Layer:
    """A layer that holds a weight. names: all its names in the model. treatment: what was asked for it, and
    rule: the pattern of the plan that asked, if one did. code: None when it can be made sparse."""

    names: tuple[str, ...]
    module: Any
    kind: str
    shape: tuple[int, ...]
    nbytes: int
    treatment: Treatment = "2:4"
    rule: str | None = None
    code: Code | None = None
    reason: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def sparse_class(self) -> type[SparseModule] | None:
        return next((cls for cls in SPARSE_CLASSES if isinstance(self.module, cls.dense_class)), None)

    @property
    def format(self) -> str:
        """Of the sparse layer that was asked for."""
        return FORMAT_CHANNELS if isinstance(self.treatment, Channels) else FORMAT_24


def find_layers(
    model: nn.Module,
    include: Iterable[Choice] | None = None,
    exclude: Iterable[Choice] = (),
    pattern: Treatment | Plan = "2:4",
) -> list[Layer]:
    """Every layer of ``model`` with a weight of two or more dimensions, in the order of ``named_modules``."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    by_name = {name: modules[key] for key, its in names.items() for name in its}
    shared = _shared_weights(modules.values())
    readers = _read_from_outside(modules.values())
    layers = []
    for key, module in modules.items():
        layer = _layer(tuple(names[key]), module)
        if layer is None:
            continue
        if len(layer.names) > 1:
            layer.notes.append(f"also named {', '.join(layer.names[1:])}")
        unasked = _treatment(layer, by_name, pattern)
        verdict = (
            _identity(layer)
            or _choice(layer, by_name, include, exclude)
            or unasked
            or _behaviour(layer, readers)
            or _weight(layer, shared)
            or size_verdict(layer)
        )
        if verdict is not None:
            layer.code, layer.reason = verdict
        layers.append(layer)
    return layers


def _layer(names: tuple[str, ...], module: nn.Module) -> Layer | None:
    """None for a module that holds no weight."""
    if isinstance(module, SparseModule):
        kind = module.dense_class.__name__
        return Layer(names, module, kind, module.weight_shape, module.packed.nbytes)
    weight = _weight_of(module)
    if weight is None:
        return None
    nbytes = _nbytes(weight)
    if isinstance(module, nn.RNNBase):
        nbytes = sum(_nbytes(p) for p in _weights(module).values())
    return Layer(names, module, _kind(module), _shape(weight), nbytes)


Verdict: TypeAlias = "tuple[Code, str] | None"


def _identity(layer: Layer) -> Verdict:
    """Kinds of layers that are never replaced."""
    module = layer.module
    if isinstance(module, SparseModule):
        return Code.ALREADY_SPARSE, f"already {module.format}"
    if isinstance(module, torch.jit.ScriptModule):
        return Code.TORCHSCRIPT, f"{Code.TORCHSCRIPT.explanation}; convert the model before scripting it"
    if any(is_lazy(p) for p in module._parameters.values()):
        return Code.LAZY, f"{Code.LAZY.explanation}; run the model once, then convert"
    if _is_quantized(module):
        return Code.QUANTIZED, Code.QUANTIZED.explanation
    if layer.sparse_class is None:
        return Code.KIND, f"there is no sparse module for {layer.kind}"
    return None


def _choice(
    layer: Layer,
    by_name: dict[str, nn.Module],
    include: Iterable[Choice] | None,
    exclude: Iterable[Choice],
) -> Verdict:
    for choice in exclude:
        if _matches(choice, layer, by_name):
            return Code.EXCLUDED, f"exclude names it by {_say(choice)}"
    if include is not None and not any(_matches(choice, layer, by_name) for choice in include):
        return Code.EXCLUDED, "include does not name it"
    return None


def _treatment(layer: Layer, by_name: dict[str, nn.Module], pattern: Treatment | Plan) -> Verdict:
    """Finds out what is asked for the layer."""
    if not isinstance(pattern, Plan):
        layer.treatment = pattern
        return None
    for name, treatment in pattern.rules:
        if _matches(name, layer, by_name):
            layer.treatment, layer.rule = treatment, name
            if treatment is None:
                return Code.EXCLUDED, f"the plan leaves it dense by {_say(name)}"
            return None
    layer.treatment = None
    return Code.EXCLUDED, "no pattern of the plan names it"


def _behaviour(layer: Layer, readers: dict[int, str]) -> Verdict:
    """What the layer does besides multiplying by its weight, and who else needs that weight."""
    module = layer.module
    base = layer.sparse_class.dense_class  # type: ignore[union-attr]
    if (computed := _computed_weight(module)) is not None:
        return Code.PARAMETRIZED, f"{Code.PARAMETRIZED.explanation}; {computed}"
    if id(module) in readers:
        return Code.WEIGHT_READ, f"{readers[id(module)]} reads its weight and would not use the sparse kernel"
    own = sorted(_own_names(type(module), base))
    if own:
        return Code.SUBCLASS, f"{layer.kind} is a {base.__name__} that defines {', '.join(own)} of its own"
    patched = sorted(name for name in vars(module) if hasattr(base, name) and callable(getattr(base, name)))
    if patched:
        return Code.PATCHED, f"its {', '.join(patched)} was replaced on the instance"
    if vars(module).get("_compiled_call_impl") is not None:
        return Code.PATCHED, "its compile() was called; convert first, compile then"
    extra = [
        *(module._parameters.keys() - _own_parameters(module)),
        *module._buffers.keys(),
        *module._modules.keys(),
    ]
    if extra:
        return Code.EXTRA_STATE, f"it holds {', '.join(sorted(extra))} besides weight and bias"
    hooks = _dense_weight_hooks(module)
    if hooks:
        return Code.HOOKS, f"it has {hooks} that expect its dense weight"
    return None


def _weight(layer: Layer, shared: dict[int, str]) -> Verdict:
    """What the weights are."""
    weights = _weights(layer.module).values()
    for weight in weights:
        if type(weight) is not nn.Parameter or weight.layout != torch.strided:
            found = f"layout {weight.layout}" if type(weight) is nn.Parameter else type(weight).__name__
            return Code.TENSOR_KIND, f"{Code.TENSOR_KIND.explanation} but {found}"
        if weight.is_meta:
            return Code.META_DEVICE, f"{Code.META_DEVICE.explanation}; load the weights, then convert"
        if weight.is_complex():
            return Code.COMPLEX, f"{Code.COMPLEX.explanation} ({_say_dtype(weight)})"
        if weight.dtype not in DTYPES:
            return Code.DTYPE, f"{Code.DTYPE.explanation}, got {_say_dtype(weight)}"
        for other in layer.module._parameters.values():
            if other is not None and other.dtype != weight.dtype:
                return Code.DTYPE, (
                    f"bias and weight must have one dtype, got {_say_dtype(other)} and {_say_dtype(weight)}"
                )
    if id(layer.module) in shared:
        return Code.SHARED_WEIGHT, f"{shared[id(layer.module)]} uses the same weight"
    return None


def size_verdict(layer: Layer) -> Verdict:
    """Layers for which there is no format, or in which it can leave nothing out, or costs more than the
    products it saves."""
    module = layer.module
    if isinstance(layer.treatment, Layers):
        return Code.UNSTRUCTURED, "the plan drops it whole or not at all"
    if isinstance(layer.treatment, Unstructured):
        return Code.UNSTRUCTURED, Code.UNSTRUCTURED.explanation
    groups: int = getattr(module, "groups", 1)
    if groups > 1 and layer.shape[1] == 1:
        return Code.DEPTHWISE, Code.DEPTHWISE.explanation
    if getattr(module, "proj_size", 0):
        return Code.KIND, f"a recurrent layer must have no projection, got proj_size {module.proj_size}"
    if layer.shape[0] % groups:
        return Code.GROUPED, f"groups must divide the output channels, got {groups} for {layer.shape[0]}"
    if layer.format == FORMAT_CHANNELS:
        return None
    if isinstance(module, nn.Embedding):
        return Code.KIND, "there is no 2:4 module for Embedding, whose channels alone can be pruned"
    if isinstance(module, nn.RNNBase):
        return too_small_for_24(module, (module.hidden_size, module.input_size))
    return too_small_for_24(module, layer.shape)


def too_small_for_24(module: nn.Module, shape: Sequence[int]) -> Verdict:
    """Whether 2:4 would cost more than it saves in a layer of this kind with so many outputs and inputs (of a
    convolution group)."""
    outs, ins = shape[:2]
    if isinstance(module, nn.RNNBase):
        if min(outs, ins) < MIN_IN_LINEAR:
            return Code.TOO_SMALL, (
                f"input_size and hidden_size must be at least {MIN_IN_LINEAR}, got {ins} and {outs}"
            )
        return None
    if isinstance(module, nn.Linear):
        if ins < MIN_IN_LINEAR or outs < MIN_OUT:
            return Code.TOO_SMALL, (
                f"in_features must be at least {MIN_IN_LINEAR} and out_features {MIN_OUT}, "
                f"got {ins} and {outs}"
            )
        return None
    groups: int = module.groups  # type: ignore[assignment]
    if ins < MIN_IN_CONV or outs // groups < MIN_OUT:
        per_group = " per group" if groups > 1 else ""
        return (Code.GROUPED if groups > 1 else Code.TOO_SMALL), (
            f"input channels{per_group} must be at least {MIN_IN_CONV} and output channels{per_group} "
            f"{MIN_OUT}, got {ins} and {outs // groups}"
        )
    return None


def _own_parameters(module: nn.Module) -> set[str]:
    """The parameters that a layer of its kind has."""
    if isinstance(module, nn.RNNBase):
        return set(module._flat_weights_names)
    return {"weight"} if isinstance(module, nn.Embedding) else {"weight", "bias"}


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that are no biases, by name."""
    return {name: p for name, p in module._parameters.items() if p is not None and p.dim() >= 2}


def _weight_of(module: nn.Module) -> Tensor | None:
    """The largest tensor of at least two dimensions that the module itself holds as a weight."""
    if _is_quantized(module):
        weight = module.weight()  # type: ignore[operator]
        return weight if isinstance(weight, Tensor) else None
    if isinstance(module, parametrize.ParametrizationList):
        return None  # counted with the layer it belongs to
    own = list(module.parameters(recurse=False))
    if parametrize.is_parametrized(module, "weight"):
        # Not layer.weight: computing it may change state (spectral_norm's power iteration).
        own += module.parametrizations["weight"].parameters(recurse=False)  # type: ignore[index, union-attr]
    return max((p for p in own if is_lazy(p) or p.dim() >= 2), key=_numel, default=None)


def _computed_weight(module: nn.Module) -> str | None:
    """The cure for a layer whose weight or bias is not a parameter of its own, None when both are."""
    if "weight_mask" in module._buffers or "bias_mask" in module._buffers:
        return "call torch.nn.utils.prune.remove on it first, and the zeros stay in its weight"
    if parametrize.is_parametrized(module):
        return "call torch.nn.utils.parametrize.remove_parametrizations on it first"
    if _own_parameters(module) - module._parameters.keys():
        return (
            "make weight and bias parameters first (torch.nn.utils.remove_weight_norm, remove_spectral_norm)"
        )
    return None


def _own_names(cls: type, base: type) -> set[str]:
    """What the classes between ``cls`` and ``base`` define that may change what the layer does."""
    between = cls.__mro__[: cls.__mro__.index(base)]
    return {name for klass in between for name in vars(klass)} - _HARMLESS


def _dense_weight_hooks(module: nn.Module) -> str:
    """Hooks that could not follow to a sparse layer; forward and backward hooks of the module can."""
    found = []
    for name in ("_state_dict_hooks", "_state_dict_pre_hooks"):
        if getattr(module, name, None):
            found.append("state-dict hooks")
    for name in ("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"):
        if getattr(module, name, None):
            found.append("load-state-dict hooks")
    for weight in _weights(module).values():
        if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
            found.append("gradient hooks on its weight")
    return " and ".join(dict.fromkeys(found))


def _read_from_outside(modules: Iterable[nn.Module]) -> dict[int, str]:
    """Layers whose weight torch's own modules are known to read, by id, with the reader's class."""
    readers: dict[int, str] = {}
    for module in modules:
        for cls, children in _WEIGHT_READERS:
            if isinstance(module, cls):
                readers |= {id(getattr(module, child, None)): type(module).__name__ for child in children}
    return readers


def _shared_weights(modules: Iterable[nn.Module]) -> dict[int, str]:
    """Modules of which a weight overlaps in memory with another tensor of the model, by id, with which."""
    spans = []
    for module in modules:
        held = module.named_parameters(recurse=False, remove_duplicate=False)
        for name, tensor in (*held, *module.named_buffers(recurse=False, remove_duplicate=False)):
            if is_lazy(tensor) or not _has_memory(tensor):
                continue
            extent = sum(
                (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
            )
            start = tensor.data_ptr()
            end = start + (extent + 1) * tensor.element_size()
            spans.append((str(tensor.device), start, end, (module, name, tensor.dim() >= 2)))
    spans.sort(key=lambda span: span[:2])
    shared: dict[int, str] = {}
    reach: tuple[str, int, tuple[nn.Module, str, bool]] | None = None
    for device, start, end, holder in spans:
        if reach is not None and reach[0] == device and start < reach[1]:
            for (one, _, is_weight), (other, name, _) in ((holder, reach[2]), (reach[2], holder)):
                if is_weight:
                    shared.setdefault(id(one), f"{name} of {type(other).__name__}")
        if reach is None or reach[0] != device or end > reach[1]:
            reach = (device, end, holder)
    return shared


def _has_memory(tensor: Tensor) -> bool:
    plain = tensor.layout == torch.strided and type(tensor) in (nn.Parameter, Tensor, nn.Buffer)
    return plain and not tensor.is_meta and tensor.numel() > 0


def _matches(choice: Choice, layer: Layer, by_name: dict[str, nn.Module]) -> bool:
    """A pattern or type may name the layer or a module it lies in; a predicate is asked about the layer."""
    if not isinstance(choice, (str, type)):
        return any(bool(choice(name, layer.module)) for name in layer.names)
    for name in layer.names:
        parts = name.split(".") if name else []
        for depth in range(len(parts) + 1):
            within = ".".join(parts[:depth])
            if isinstance(choice, str):
                if (depth or not parts) and fnmatch.fnmatchcase(within, choice):
                    return True
            elif isinstance(by_name.get(within), choice):
                return True
    return False


def check_choices(model: nn.Module, argument: str, given: Any, caller: str = "convert") -> list[Choice]:
    """``given`` as a list of choices. caller: the function that a user called, which errors begin with.

    Raises:
        TypeError: something in it is no pattern, module type or predicate.
        ValueError: a pattern matches no module of the model, so it is most likely a typing error.
    """
    choices = list(given) if isinstance(given, (list, tuple, set, frozenset)) else [given]
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for choice in choices:
        is_type = isinstance(choice, type) and issubclass(choice, nn.Module)
        is_predicate = callable(choice) and not isinstance(choice, (type, nn.Module))
        if not (isinstance(choice, str) or is_type or is_predicate):
            raise TypeError(
                f"{caller}: {argument} must hold name patterns, module types or predicates "
                f"(name, module) -> bool, got {choice!r}"
            )
        if isinstance(choice, str) and not fnmatch.filter(names, choice):
            raise ValueError(
                f"{caller}: {argument} must match at least one module of the model, got {choice!r}"
            )
    return choices


def _say(choice: Choice) -> str:
    if isinstance(choice, str):
        return f"pattern {choice!r}"
    return f"type {choice.__name__}" if isinstance(choice, type) else "a predicate"


def _say_dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _kind(module: nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return str(getattr(module, "original_name", type(module).__name__))
    return type(module).__name__


def _is_quantized(module: nn.Module) -> bool:
    return "quantized" in type(module).__module__.split(".") and callable(getattr(module, "weight", None))


def _numel(tensor: Tensor) -> int:
    return 0 if is_lazy(tensor) else tensor.numel()


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return () if is_lazy(tensor) else tuple(tensor.shape)


def _nbytes(tensor: Tensor) -> int:
    return 0 if is_lazy(tensor) else tensor.numel() * tensor.element_size()
