"""What ``SparseLSTM`` and ``SparseGRU`` share: their tensors, how checkpoints load, and the forward."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from sparseops.formats import FORMATS, ChannelPruned
from sparseops.nn.base import SparseModule
from sparseops.nn.recurrence import (
    GATES,
    STATES,
    Layout,
    Packed,
    Padded,
    State,
    run_constant,
    run_dense,
    run_nm24,
    select,
)
from sparseops.nn.recurrent_weights import FIRST, MATRICES, Prune, RecurrentWeights, pack_weights
from sparseops.ops import registry


class SparseRecurrent(SparseModule):
    """A recurrent layer whose weights are all held in one format.

    Weights are told apart as in the dense layer, as ``weight_ih_l0``, ``weight_hh_l0``,
    ``weight_ih_l0_reverse`` and so on. ``weight_ih_l0_values`` is a Parameter, and with 2:4
    ``weight_ih_l0_meta`` is a buffer; biases are Parameters under the dense layer's names. In the channel
    format the buffers ``inputs_l0`` and ``units_l0`` list the features and the hidden units that are kept. A
    hidden unit is dropped as a whole: its rows in every gate of both weights and its column of
    ``weight_hh_l0``. What is left of it are its biases and its first state, so that its output does not
    depend on the input; it is computed and written.

    ``load_state_dict`` takes these, of whatever size they are in the checkpoint, or the dense weights of an
    ordinary layer if they have the format's pattern.

    Under autocast the layer computes in autocast's dtype. torch.compile unrolls the loop over the steps,
    and so does torch.export where the weights are 2:4: the number of steps is fixed then.
    """

    mode: str
    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool  # type: ignore[assignment]
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int

    hyperparameters = (
        "mode",
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
        "proj_size",
    )

    _hx_names: ClassVar[tuple[str, ...]]

    def _take(self, layer: Any, *, prune: Prune, format: str) -> RecurrentWeights:  # type: ignore[override]
        name = type(self).__name__
        if format not in FORMATS:
            raise ValueError(f"{name}: format must be one of {', '.join(FORMATS)}, got {format!r}")
        if layer.proj_size:
            raise ValueError(f"{name}: proj_size must be 0, got {layer.proj_size}")
        for attribute in self.hyperparameters:
            setattr(self, attribute, getattr(layer, attribute))
        self.format = format
        dense = {weight: getattr(layer, weight) for weight in self._shapes()}
        self.weight_shape = tuple(max(dense.values(), key=Tensor.numel).shape)
        try:
            packed = pack_weights(dense, self._suffixes(), prune=prune, format=format)
        except (ValueError, TypeError) as exc:
            raise type(exc)(f"{name}: {exc}") from exc
        for name, tensor in packed.tensors.items():
            if name.endswith("_values"):
                is_trained = dense[name.removesuffix("_values")].requires_grad
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=is_trained))
            else:
                self.register_buffer(name, tensor)
        for name in self._bias_names():
            given: Tensor = getattr(layer, name)
            own = nn.Parameter(given.detach().clone(), requires_grad=given.requires_grad)
            self.register_parameter(name, own)
        self.train(layer.training)
        self._prepare()
        return packed

    def _suffixes(self) -> list[str]:
        """What ends the names of the tensors of each layer and direction, in the order of a state's first
        dimension."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"l{layer}{direction}" for layer in range(self.num_layers) for direction in directions]

    def _bias_names(self) -> list[str]:
        return [f"bias_{matrix}_{suffix}" for suffix in self._suffixes() for matrix in MATRICES if self.bias]

    def _shapes(self) -> dict[str, tuple[int, int]]:
        """Of the dense weights."""
        rows, above = GATES[self.mode] * self.hidden_size, self.hidden_size * (1 + self.bidirectional)
        shapes = {}
        for suffix in self._suffixes():
            shapes[f"weight_ih_{suffix}"] = rows, self.input_size if suffix in FIRST else above
            shapes[f"weight_hh_{suffix}"] = rows, self.hidden_size
        return shapes

    def _named_tensors(self) -> dict[str, Tensor]:
        """What the state dict holds besides the biases."""
        values = {name: p for name, p in self._parameters.items() if name.endswith("_values")}
        derived = self._non_persistent_buffers_set
        saved = {name: buffer for name, buffer in self._buffers.items() if name not in derived}
        return {**values, **saved}  # type: ignore[dict-item]

    @property
    def packed(self) -> RecurrentWeights:  # type: ignore[override]
        """The weights as format objects over this layer's own tensors (no copy)."""
        return RecurrentWeights.of(self._named_tensors(), self._shapes(), self.format)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The dense weights by their names in the dense layer: fresh tensors at each access,
        differentiable in the values."""
        return {weight: held.to_dense() for weight, held in self.packed.weights.items()}

    @property
    def weight(self) -> Tensor:
        raise AttributeError(f"{type(self).__name__} has several weights: see weights")

    def _metadata(self) -> dict[str, Tensor]:
        return {name: buffer for name, buffer in self._buffers.items() if buffer is not None}

    @property
    def _some_values(self) -> Tensor:
        return getattr(self, "weight_hh_l0_values")  # noqa: B009

    @property
    def _is_nm24(self) -> bool:
        return "weight_hh_l0_meta" in self._buffers

    @property
    def op(self) -> registry.Op:
        """The op that multiplies by a 2:4 weight."""
        return registry.REGISTRY["nm24_linear"]

    @property
    def kernel(self) -> str:
        """The kernel that runs for activations of this layer's dtype and device, or ``reference: <why>``."""
        return super().kernel if self._is_nm24 else f"torch.{self.mode.lower()} on the compact weights"

    @property
    def kernel_note(self) -> str | None:
        """What to know of ``kernel``, if anything."""
        return super().kernel_note if self._is_nm24 else None

    def _prepare(self) -> None:
        for suffix in self._suffixes():
            units = self._buffers.get(f"units_{suffix}")
            if units is not None and not units.is_meta:
                is_dropped = torch.ones(self.hidden_size, dtype=torch.bool, device=units.device)
                is_dropped[units.long()] = False
                dropped = is_dropped.nonzero().flatten()
                self.register_buffer(f"dropped_{suffix}", dropped, persistent=False)
                place = torch.cat([units.long(), dropped]).argsort()
                self.register_buffer(f"place_{suffix}", place, persistent=False)
        if self._is_nm24 and self.op.prepare is not None and self.op.supports(self._some_values) is None:
            for weight in self._shapes():
                self.op.prepare(self._parameters[f"{weight}_values"], self._buffers[f"{weight}_meta"])

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """As ``nn.LSTM`` and ``nn.GRU``: the outputs of all steps, and the last state.

        Raises:
            TypeError: a dtype or the type of hx is wrong.
            ValueError: a shape is wrong, or there is no step.
        """
        x = input.data if isinstance(input, PackedSequence) else input
        kind = x.device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if cast is not None and x.dtype == torch.float64:
            cast = None
        state = self._as_state(input, x, hx, cast or x.dtype)
        self._check_input(input, x, cast)
        if cast is not None:
            x, state = x.to(cast), None if state is None else tuple(s.to(cast) for s in state)
        layout: Layout
        if isinstance(input, PackedSequence):
            layout = Packed(input.batch_sizes)
        else:
            x = x.unsqueeze(1) if x.ndim == 2 else x.transpose(0, 1) if self.batch_first else x
            layout = Padded(x)
        with torch.autocast(kind, enabled=False) if cast is not None else nullcontext():
            y, last = self._run(x, layout, state)
        return self._as_given(input, y, last)

    def _check_input(self, input: Tensor | PackedSequence, x: Tensor, cast: torch.dtype | None) -> None:
        name, is_packed = type(self).__name__, isinstance(input, PackedSequence)
        dims = (2,) if is_packed else (2, 3)
        if x.ndim not in dims or x.shape[-1] != self.input_size:
            raise ValueError(
                f"{name}: input must have {' or '.join(map(str, dims))} dimensions and "
                f"{self.input_size} features, got shape {tuple(x.shape)}"
            )
        dtype = self._some_values.dtype
        if cast is None and x.dtype != dtype:
            raise TypeError(f"{name}: input must have the dtype of the weights ({dtype}), got {x.dtype}")
        if not x.shape[1 if x.ndim == 3 and self.batch_first else 0]:
            raise ValueError(f"{name}: input must have at least one step, got shape {tuple(x.shape)}")

    def _as_state(
        self, input: Tensor | PackedSequence, x: Tensor, hx: Any, dtype: torch.dtype
    ) -> State | None:
        """``hx`` as a batched state, its sequences in the order of the input's elements."""
        if hx is None:
            return None
        name = type(self).__name__
        given = hx if self.mode == "LSTM" else (hx,)
        is_pair = isinstance(given, (tuple, list)) and len(given) == STATES[self.mode]
        if not is_pair or not all(isinstance(s, Tensor) for s in given):
            rule = "a tuple of two tensors" if self.mode == "LSTM" else "a tensor"
            raise TypeError(f"{name}: hx must be {rule}, got {type(hx).__name__}")
        cells = len(self._suffixes())
        if isinstance(input, PackedSequence):
            shape: tuple[int, ...] = (cells, int(input.batch_sizes[0]), self.hidden_size)
        elif x.ndim == 3:
            shape = (cells, x.shape[0 if self.batch_first else 1], self.hidden_size)
        else:
            shape = (cells, self.hidden_size)
        for label, s in zip(self._hx_names, given, strict=True):
            if s.shape != shape:
                raise ValueError(f"{name}: {label} must have shape {shape}, got {tuple(s.shape)}")
            if s.dtype != dtype and dtype == x.dtype:
                raise TypeError(f"{name}: {label} must have the dtype of input ({dtype}), got {s.dtype}")
        state = tuple(s.unsqueeze(1) if len(shape) == 2 else s for s in given)
        order = input.sorted_indices if isinstance(input, PackedSequence) else None
        return state if order is None else tuple(s.index_select(1, order) for s in state)

    def _as_given(self, input: Tensor | PackedSequence, y: Tensor, last: State) -> tuple[Any, Any]:
        """Outputs and last state in the form that belongs to ``input``."""
        output: Any = y
        if isinstance(input, PackedSequence):
            output = PackedSequence(y, *input[1:])
            if input.unsorted_indices is not None:
                last = tuple(s.index_select(1, input.unsorted_indices) for s in last)
        elif input.ndim == 2:
            output, last = y.squeeze(1), tuple(s.squeeze(1) for s in last)
        elif self.batch_first:
            output = y.transpose(0, 1)
        return output, last if self.mode == "LSTM" else last[0]

    def _run(self, x: Tensor, layout: Layout, state: State | None) -> tuple[Tensor, State]:
        """All layers and directions."""
        suffixes, finals = self._suffixes(), []
        directions = 1 + self.bidirectional
        for layer in range(self.num_layers):
            outputs = []
            for cell in range(layer * directions, (layer + 1) * directions):
                own = None if state is None else tuple(s[cell] for s in state)
                is_reverse = cell % directions == 1
                y, last = self._run_cell(suffixes[cell], layout.flip(x) if is_reverse else x, layout, own)
                outputs.append(layout.flip(y) if is_reverse else y)
                finals.append(last)
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if self.dropout and layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
        return x, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))

    def _run_cell(self, suffix: str, x: Tensor, layout: Layout, state: State | None) -> tuple[Tensor, State]:
        """One direction of one layer: the kept units, and beside them those that were dropped."""
        units, dropped = self._buffers.get(f"units_{suffix}"), self._buffers.get(f"dropped_{suffix}")
        if units is None or dropped is None or not dropped.shape[0]:
            return self._run_kept(suffix, x, layout, state, None)
        kept_state = None if state is None else tuple(select(s, units) for s in state)
        y, last = self._run_kept(suffix, x, layout, kept_state, units)
        rest = None if state is None else tuple(select(s, dropped) for s in state)
        if not self.bias and rest is None:
            silent = (y, *last)
            idle = [t.new_zeros(*t.shape[:-1], dropped.shape[0]) for t in silent]
            others, idle_last = idle[0], tuple(idle[1:])
        else:
            others, idle_last = run_constant(
                self.mode, layout, rest, self._biases(suffix, x, dropped) or self._no_biases(x, dropped), y
            )
        place = self._buffers[f"place_{suffix}"]
        y, *both = (
            select(torch.cat(pair, -1), place)  # type: ignore[arg-type]
            for pair in zip((y, *last), (others, *idle_last), strict=True)
        )
        return y, tuple(both)

    def _run_kept(
        self, suffix: str, x: Tensor, layout: Layout, state: State | None, units: Tensor | None
    ) -> tuple[Tensor, State]:
        ih, hh = (self._parameters[f"weight_{m}_{suffix}_values"].to(x.dtype) for m in MATRICES)  # type: ignore[union-attr]
        inputs = self._buffers.get(f"inputs_{suffix}")
        if inputs is not None and inputs.shape[0] != x.shape[-1]:
            x = select(x, inputs)
        if state is None:
            width = self.hidden_size if units is None else units.shape[0]
            state = (x.new_zeros(layout.batch, width),) * STATES[self.mode]
        biases = self._biases(suffix, x, units)
        if not self._is_nm24:
            return run_dense(self.mode, x, layout, state, [ih, hh, *(biases or ())], self.training)
        b_ih, b_hh = biases or (None, None)
        ih_meta, hh_meta = (self._buffers[f"weight_{m}_{suffix}_meta"] for m in MATRICES)
        return run_nm24(self.mode, x, layout, state, (ih, ih_meta, b_ih), (hh, hh_meta, b_hh))  # type: ignore[arg-type]

    def _biases(self, suffix: str, x: Tensor, units: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Both biases of some hidden units (None for all), in the dtype of ``x``."""
        if not self.bias:
            return None
        ih, hh = (self._parameters[f"bias_{matrix}_{suffix}"].to(x.dtype) for matrix in MATRICES)  # type: ignore[union-attr]
        if units is not None:
            ih, hh = (b.view(-1, self.hidden_size).index_select(1, units).flatten() for b in (ih, hh))
        return ih, hh

    def _no_biases(self, x: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
        none = x.new_zeros(GATES[self.mode] * units.shape[0])
        return none, none

    def to_dense(self) -> nn.Module:
        """An ordinary layer with the same weights, zeros filled in; tensors of its own, same training
        mode."""
        dense = self._empty_dense(device=torch.device("meta"), dtype=self._some_values.dtype)
        dense.dropout = self.dropout  # type: ignore[assignment]
        for name, weight in self.weights.items():
            is_trained = self._parameters[f"{name}_values"].requires_grad  # type: ignore[union-attr]
            setattr(dense, name, nn.Parameter(weight.detach(), requires_grad=is_trained))
        for name, bias in self._parameters.items():
            if name.startswith("bias_") and bias is not None:
                own = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
                setattr(dense, name, own)
        return dense.train(self.training)

    def _empty_dense(self, **factory: Any) -> nn.Module:
        return self.dense_class(
            self.input_size,
            self.hidden_size,
            self.num_layers,
            bias=self.bias,
            batch_first=self.batch_first,
            bidirectional=self.bidirectional,
            **factory,
        )

    def extra_repr(self) -> str:
        density = "unknown" if self._some_values.is_meta else f"{self.packed.density:.3g}"
        dense = nn.RNNBase.extra_repr(self)  # type: ignore[arg-type]
        return f"{dense}, format={self.format}, density={density}, kernel={self.kernel}"

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
            self._pack_dense(own, prefix)
            self._check_checkpoint(own, prefix)
        except (ValueError, TypeError) as exc:
            error_msgs.append(str(exc))
            return
        nn.Module._load_from_state_dict(
            self, own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._prepare()

    def _pack_dense(self, own: dict[str, Any], prefix: str) -> None:
        """Replace the dense weights of a checkpoint by their packed tensors, patterned by their own zeros."""
        dense: dict[str, Tensor] = {}
        for weight, shape in self._shapes().items():
            if prefix + weight not in own or f"{prefix}{weight}_values" in own:
                continue
            dense[weight] = own.pop(prefix + weight)
            found = tuple(getattr(dense[weight], "shape", ()))
            if found != shape:
                raise ValueError(f"load_state_dict: {prefix}{weight} must have shape {shape}, got {found}")
        missing = self._shapes().keys() - dense.keys()
        if dense and missing and self.format == ChannelPruned.key:
            raise ValueError(
                f"load_state_dict: {prefix}{next(iter(dense))} must come with every other dense weight, "
                f"got a checkpoint without {prefix}{min(missing)}"
            )
        if dense:
            try:
                packed = pack_weights(dense, self._suffixes(), prune=None, format=self.format)
            except (ValueError, TypeError) as exc:
                raise type(exc)(f"load_state_dict: {prefix}{exc}") from exc
            own |= {prefix + name: tensor for name, tensor in packed.tensors.items()}

    def _check_checkpoint(self, own: dict[str, Any], prefix: str) -> None:
        """Refuse packed tensors that a kernel could not read, and make room for the others."""
        tensors, given = self._named_tensors(), []
        for weight in self._shapes():
            values, meta = f"{weight}_values", f"{weight}_meta"
            if prefix + values in own and self.format == ChannelPruned.key:
                tensors.pop(meta, None)
            elif prefix + meta in own and prefix + values not in own:
                raise ValueError(
                    f"load_state_dict: {prefix}{values} must come with {prefix}{meta}, "
                    "got a checkpoint without"
                )
            given += [values, meta]
        if self.format == ChannelPruned.key:
            given += [f"{kind}_{suffix}" for suffix in self._suffixes() for kind in ("inputs", "units")]
        given = [name for name in given if prefix + name in own]
        for name in given:
            tensor = own[prefix + name]
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"load_state_dict: {prefix}{name} must be a tensor, got {type(tensor).__name__}"
                )
            tensors[name] = own[prefix + name] = tensor.contiguous()
        if not given:
            return
        device = (
            torch.device("meta") if any(t.is_meta for t in tensors.values()) else tensors[given[0]].device
        )
        on_one_device = {name: tensor.detach().to(device) for name, tensor in tensors.items()}
        try:
            RecurrentWeights.of(on_one_device, self._shapes(), self.format).validate()
        except ValueError as exc:
            raise ValueError(f"load_state_dict: {prefix}{exc}") from exc
        self._make_room(tensors)

    def _make_room(self, tensors: dict[str, Tensor]) -> None:
        device = self._some_values.device
        for name in self._named_tensors().keys() - tensors.keys():
            del self._buffers[name]
        for name, tensor in tensors.items():
            if name.endswith("_values"):
                held: Any = self._parameters[name]
                if held.shape != tensor.shape:
                    held.data = held.new_empty(tensor.shape)
            elif getattr(self._buffers.get(name), "shape", None) != tensor.shape:
                self.register_buffer(name, torch.empty_like(tensor, device=device))
