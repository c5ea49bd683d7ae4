"""What every sparse layer shares: its tensors, its dense view, and how checkpoints load into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from sparseops.formats import FORMATS, SparseFormat
from sparseops.ops import cuda, registry

Self = TypeVar("Self", bound="SparseModule")


class SparseModule(nn.Module):
    """A layer whose weight is held in a sparse format.

    The format's ``values`` are a Parameter, so that the layer can be fine-tuned and keeps its pattern
    exactly; its other tensors (``meta`` of 2:4, the lists of kept channels) are buffers. ``state_dict``
    holds these and ``bias``; ``load_state_dict`` takes them, of whatever size they are in the checkpoint, or
    the dense ``weight`` of an ordinary layer if it has the format's pattern.

    format: key of the format. weight_shape: shape of the dense weight. A subclass names its dense class and
    the second half of its op's name, and lists the attributes it takes over from the dense layer.
    """

    dense_class: ClassVar[type[nn.Module]]
    op_kind: ClassVar[str]
    hyperparameters: ClassVar[tuple[str, ...]]

    format: str
    weight_shape: tuple[int, ...]
    values: nn.Parameter
    bias: nn.Parameter | None

    @classmethod
    def from_dense(cls: type[Self], layer: nn.Module, *, prune: Any = None, format: str = "nm24") -> Self:
        """The sparse layer that computes what ``layer`` does, with a copy of its bias and its training mode.

        prune: how to choose the weights to drop when ``layer.weight`` does not have the pattern, in the words
        of the format's ``from_dense``; None refuses it.

        Raises:
            TypeError: ``layer`` is not of the dense class of this one, or its weight is not floating-point.
            ValueError: the weight does not have the pattern and ``prune`` is None; or prune or format is
            unknown.
        """
        return cls.pack(layer, prune=prune, format=format)[0]

    @classmethod
    def pack(
        cls: type[Self], layer: nn.Module, *, prune: Any = None, format: str = "nm24"
    ) -> tuple[Self, SparseFormat]:
        """``from_dense``, and beside the layer its packed weight, which knows what the pruning cost."""
        if not isinstance(layer, cls.dense_class):
            raise TypeError(
                f"{cls.__name__}.from_dense: layer must be {cls.dense_class.__name__}, "
                f"got {type(layer).__name__}"
            )
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        packed = self._take(layer, prune=prune, format=format)
        return self, packed

    def _take(self, layer: Any, *, prune: Any, format: str) -> SparseFormat:
        """Become the sparse form of ``layer``; returns the packed weight."""
        if format not in FORMATS:
            raise ValueError(
                f"{type(self).__name__}: format must be one of {', '.join(FORMATS)}, got {format!r}"
            )
        weight: Tensor = layer.weight
        bias: Tensor | None = layer.bias
        groups = getattr(layer, "groups", 1)
        packed = FORMATS[format].from_dense(weight.detach(), prune=prune, groups=groups)
        for name in self.hyperparameters:
            setattr(self, name, getattr(layer, name))
        self.format = format
        self.weight_shape = packed.shape
        self._op_name = f"{format}_{self.op_kind}"
        tensors = tensors_of(packed)
        self.values = nn.Parameter(tensors.pop("values"), requires_grad=weight.requires_grad)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self._buffer_names = tuple(tensors)
        self.bias = None
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        self.train(layer.training)
        self._prepare()
        return packed

    def _start(
        self,
        *args: Any,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        format: str,
        **options: Any,
    ) -> None:
        """``__init__`` of the subclasses: a new dense layer of these arguments, pruned by magnitude."""
        super().__init__()
        # Not torch.get_default_device(): torch 2.6's does not see `with torch.device(...)`.
        device = torch.device(device) if device is not None else torch.empty(0).device
        # On the meta device there is no data to prune, so the shapes are found on the CPU.
        host = torch.device("cpu") if device.type == "meta" else device
        layer = self.dense_class(*args, device=host, dtype=dtype, **options)
        self._take(layer, prune="magnitude", format=format)
        self.to(device)

    @property
    def op(self) -> registry.Op:
        """The op that this layer calls."""
        return registry.REGISTRY[self._op_name]

    @property
    def packed(self) -> SparseFormat:
        """The weight as a format object over this layer's own tensors (no copy)."""
        return self._packed({"values": self.values, **self._metadata()})

    def _packed(self, tensors: dict[str, Tensor]) -> SparseFormat:
        """A format object of other tensors for the weight of this layer."""
        constructor: Any = FORMATS[self.format]
        options = {
            name: getattr(self, name, 1) for name in constructor.options
        }  # linear layers have no groups
        packed: SparseFormat = constructor(shape=self.weight_shape, **options, **tensors)
        return packed

    def _tensors(self) -> list[Tensor]:
        """What ops take of the weight by position."""
        buffers = self._buffers
        names = FORMATS[self.format].positional
        return [self.values, *[buffers[name] for name in names]]  # type: ignore[list-item]

    def _keywords(self) -> dict[str, Any]:
        """What they take of it by keyword."""
        format = FORMATS[self.format]
        given: dict[str, Any] = {name: self._buffers.get(name) for name in format.by_keyword}
        if format.needs_outputs:
            given["outputs"] = self.weight_shape[0]
        return given

    def _metadata(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self._buffer_names}

    @property
    def weight(self) -> Tensor:
        """The dense weight: a fresh tensor at each access, differentiable in ``values``. Writing into it
        changes nothing; change ``values``, or load a dense weight with ``load_state_dict``."""
        return self.packed.to_dense()

    @property
    def kernel(self) -> str:
        """The kernel that runs for activations of this layer's dtype and device, or ``reference: <why>``."""
        values = self._some_values
        reason = self.op.supports(values, **self._options())
        if reason is not None:
            return f"reference: {reason}"
        if self.op.kernel is not None:
            return self.op.kernel(values, **self._options())
        return cuda.kernel_name(values, self._no_wgmma())

    @property
    def kernel_note(self) -> str | None:
        """What to know of ``kernel``, if anything."""
        values = self._some_values
        if self.op.supports(values, **self._options()) is not None or not cuda.is_hopper(values):
            return None
        reason = self._no_wgmma()
        return reason and f"by mma.sp, which may lose to a dense layer on this GPU: {reason}"

    def _no_wgmma(self) -> str | None:
        """Why none of the kernels by wgmma.sp can run where others can, None if one can."""
        values = self._some_values
        if self.op.no_wgmma is None or not registry.on_gpu(values):
            return None
        return self.op.no_wgmma(values, **self._options())

    @property
    def _some_values(self) -> Tensor:
        """Those of a weight that stands for all."""
        return self.values

    def _options(self) -> dict[str, Any]:
        """What of the layer, besides its tensors, decides whether a kernel can run."""
        return {}

    def _prepare(self) -> None:
        """The stored tensors are others than before: let the op derive from them what its kernels want."""
        if self.op.prepare is not None and self.op.supports(self.values, **self._options()) is None:
            options = {"channels": self.weight_shape[1]} | self._options()  # of convolutions: of all groups
            self.op.prepare(*self._tensors(), **self._keywords(), **options)

    def to_dense(self) -> nn.Module:
        """An ordinary layer with the same weight, zeros filled in; tensors of its own, same training mode."""
        device, dtype = self.values.device, self.values.dtype
        dense = self._empty_dense(device=torch.device("meta"), dtype=dtype)
        dense.weight = nn.Parameter(self.weight.detach(), requires_grad=self.values.requires_grad)
        if self.bias is not None:
            bias = self.bias.detach().to(device, copy=True)
            dense.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        return dense.train(self.training)

    def _empty_dense(self, **factory: Any) -> nn.Module:
        raise NotImplementedError

    def extra_repr(self) -> str:
        density = "unknown" if self.values.is_meta else f"{self.packed.density:.3g}"
        dense = self.dense_class.extra_repr(self)
        return f"{dense}, format={self.format}, density={density}, kernel={self.kernel}"

    def _apply(self: Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self._metadata()
        super()._apply(fn, recurse)
        # Module.type() casts every buffer, metadata too.
        for name, tensor in before.items():
            moved = getattr(self, name)
            if moved.dtype != tensor.dtype:
                setattr(self, name, tensor.to(moved.device))
        # .to(memory_format=...) means images, and takes compact weights of four dimensions for such.
        values = self._parameters.get("values")  # recurrent layers have several, of two dimensions
        if values is not None and not values.is_contiguous():
            values.data = values.data.contiguous()
        self._prepare()
        return self

    def _load_from_state_dict(  # noqa: PLR0913
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Checks what comes before anything is copied: on an error this layer is left as it was."""
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        try:
            if prefix + "weight" in own and prefix + "values" not in own:
                self._pack_checkpoint(own, prefix)
            else:
                self._check_checkpoint(own, prefix)
        except (ValueError, TypeError) as exc:
            error_msgs.append(str(exc))
            return
        super()._load_from_state_dict(
            own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._prepare()

    def _pack_checkpoint(self, own: dict[str, Any], prefix: str) -> None:
        """Replace the dense weight of a checkpoint by its packed tensors, patterned by its own zeros."""
        weight = own.pop(prefix + "weight")
        shape = tuple(getattr(weight, "shape", ()))
        if shape != self.weight_shape:
            raise ValueError(
                f"load_state_dict: {prefix}weight must have shape {self.weight_shape}, got {shape}"
            )
        try:
            packed = FORMATS[self.format].from_dense(weight, groups=getattr(self, "groups", 1))
        except (ValueError, TypeError) as exc:
            raise type(exc)(f"load_state_dict: {prefix}weight must fit format {self.format}: {exc}") from exc
        tensors = tensors_of(packed)
        for name, tensor in tensors.items():
            own[prefix + name] = tensor
        self._make_room(tensors)

    def _check_checkpoint(self, own: dict[str, Any], prefix: str) -> None:
        """Refuse packed tensors that a kernel could not read."""
        format = FORMATS[self.format]
        names = ("values", *format.positional, *format.by_keyword)
        given = [name for name in names if prefix + name in own]
        if not given:
            return
        if "values" not in given:
            raise ValueError(
                f"load_state_dict: {prefix}values must come with {prefix}{given[0]}, got a checkpoint without"
            )
        tensors = {"values": self.values, **self._metadata()}
        for name in format.by_keyword:
            tensors.pop(name, None)
        for name in given:
            tensor = own[prefix + name]
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"load_state_dict: {prefix}{name} must be a tensor, got {type(tensor).__name__}"
                )
            tensors[name] = own[prefix + name] = tensor.contiguous()
        device = (
            torch.device("meta") if any(t.is_meta for t in tensors.values()) else tensors["values"].device
        )
        on_one_device = {name: tensor.detach().to(device) for name, tensor in tensors.items()}
        try:
            self._packed(on_one_device).validate()
        except ValueError as exc:
            raise ValueError(f"load_state_dict: {prefix}{'/'.join(given)} must be valid: {exc}") from exc
        self._make_room(tensors)

    def _make_room(self, tensors: dict[str, Tensor]) -> None:
        """Tensors of the sizes of ``tensors``, for a checkpoint that keeps other channels than this layer."""
        device = self.values.device
        if self.values.shape != tensors["values"].shape:
            self.values.data = self.values.new_empty(tensors["values"].shape)
        for name, tensor in tensors.items():
            if name != "values" and getattr(self._buffers.get(name), "shape", None) != tensor.shape:
                self.register_buffer(name, torch.empty_like(tensor, device=device))
        self._buffer_names = tuple(name for name in tensors if name != "values")
        for name in FORMATS[self.format].by_keyword:
            if name not in tensors:
                self._buffers.pop(name, None)


def tensors_of(packed: SparseFormat) -> dict[str, Tensor]:
    """The tensors a format stores, by attribute name."""
    values = {field.name: getattr(packed, field.name) for field in fields(packed)}  # type: ignore[arg-type]
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}
