"""The weights of a recurrent layer in a sparse format: which hidden units and features go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from sparseops.formats import FORMATS, NM24, ChannelPruned, Keep

Prune: TypeAlias = "str | Keep | Mapping[str, Keep] | None"
"""None, "magnitude", or what to keep: of every layer and direction, or of some by name ("l0_reverse")."""

Weight: TypeAlias = "NM24 | ChannelPruned"

MATRICES = ("ih", "hh")
FIRST = ("l0", "l0_reverse")
"""The suffixes of the layers that read the input."""

_BLOCK = 8


@dataclass(frozen=True, eq=False)
class RecurrentWeights:
    """Every weight of a recurrent layer, by its name in the dense layer.

    energy_kept, nonfinite: as those of a format, over all weights.
    """

    weights: dict[str, Weight]
    energy_kept: float = 1.0
    nonfinite: int = 0

    @classmethod
    def of(
        cls, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], format: str
    ) -> RecurrentWeights:
        """The weights of ``shapes`` over the tensors that ``tensors`` gave."""
        weights: dict[str, Weight] = {}
        for name, shape in shapes.items():
            values, meta = tensors[f"{name}_values"], tensors.get(f"{name}_meta")
            if format == NM24.key:
                weights[name] = NM24(values, tensors[f"{name}_meta"], shape)
                continue
            matrix, suffix = _parts(name)
            hidden_size = shapes[f"weight_hh_{suffix}"][1]
            units = tensors[f"units_{suffix}"]
            columns = units if matrix == "hh" else tensors[f"inputs_{suffix}"]
            rows = gate_rows(units, shape[0] // hidden_size, hidden_size)
            weights[name] = ChannelPruned(values, columns, rows, shape, meta=meta)
        return cls(weights)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a layer stores, by name: ``weight_ih_l0_values``, with 2:4 ``weight_ih_l0_meta``, and of
        channels the features ``inputs_l0`` and the hidden units ``units_l0`` that are kept."""
        stored = {}
        for name, held in self.weights.items():
            stored[f"{name}_values"] = held.values
            if held.meta is not None:
                stored[f"{name}_meta"] = held.meta
            if isinstance(held, ChannelPruned):
                matrix, suffix = _parts(name)
                stored[f"units_{suffix}" if matrix == "hh" else f"inputs_{suffix}"] = held.in_index
        return stored

    def validate(self) -> None:
        """Check every tensor before a kernel reads it.

        Raises:
            ValueError: a tensor is malformed, or the compact weights are 2:4 in part.
        """
        for name, held in reversed(self.weights.items()):  # the recurrent weight finds fault with the units
            try:
                held.validate()
            except ValueError as exc:
                raise ValueError(f"{name}: {exc}") from exc
        missing = [name for name, held in self.weights.items() if held.meta is None]
        if missing and len(missing) < len(self.weights):
            raise ValueError(f"{missing[0]}: meta must be given for every weight or for none, got none")

    @property
    def density(self) -> float:
        """Share of the dense weights' elements that are non-zero."""
        numels = {name: prod(held.shape) for name, held in self.weights.items()}
        nonzero = sum(held.density * numels[name] for name, held in self.weights.items())
        return nonzero / sum(numels.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the dense weights."""
        return sum(prod(held.shape) * held.values.element_size() for held in self.weights.values())


def _parts(name: str) -> tuple[str, str]:
    """Matrix and suffix of a weight: "ih" and "l0_reverse"."""
    _, matrix, suffix = name.split("_", 2)
    return matrix, suffix


def gate_rows(units: Tensor, gates: int, hidden_size: int) -> Tensor:
    """The rows of a weight that belong to hidden ``units``, int32: those of the first gate, then the next."""
    first = torch.arange(gates, device=units.device, dtype=units.dtype).unsqueeze(1) * hidden_size
    return (first + units).flatten()


def unit_matrix(w_ih: Tensor, w_hh: Tensor) -> Tensor:
    """All that is dropped with a hidden unit as its row, [hidden_size, ...]: its rows in every gate of both
    weights, and its column of ``w_hh`` [gates * hidden_size, hidden_size]."""
    units = w_hh.shape[1]
    by_gate = [w.view(-1, units, w.shape[1]).transpose(0, 1).flatten(1) for w in (w_ih, w_hh)]
    return torch.cat([*by_gate, w_hh.t()], 1)


def pack_weights(
    dense: Mapping[str, Tensor], suffixes: list[str], *, prune: Prune, format: str
) -> RecurrentWeights:
    """Pack the weights ``weight_ih_<suffix>`` and ``weight_hh_<suffix>`` of a layer.

    With "2:4" the weights do not depend on one another, and some may be missing. Channels are hidden units
    and features: with prune=None those whose weights are all zero are dropped; ``"magnitude"`` keeps the half
    of each, in aligned blocks of 8, with the largest L2 norm, and features that come from a dropped unit go
    first; a lone ``Keep`` names the hidden units (``outputs``) of every layer and direction, and the features
    (``inputs``) that the first layer reads.

    Raises:
        TypeError: a weight is not floating-point.
        ValueError: a weight does not have the pattern although ``prune`` is None, or ``prune`` is no such
            thing or does not fit.
    """
    dense = {name: weight.detach() for name, weight in dense.items()}
    choice: Mapping[str, Any] = dict.fromkeys(dense, prune)
    if format == ChannelPruned.key:
        choice = _by_weight(dense, _keeps(dense, suffixes, prune))
    packed: dict[str, Any] = {}
    for name, weight in dense.items():
        try:
            packed[name] = FORMATS[format].from_dense(weight, prune=choice[name])
        except (ValueError, TypeError) as exc:
            raise type(exc)(f"{name} must fit format {format}: {exc}") from exc
    nonfinite = sum(held.nonfinite for held in packed.values())
    if prune is None:
        return RecurrentWeights(packed, nonfinite=nonfinite)
    sizes = [weight.double().nan_to_num(0.0, 0.0, 0.0).square().sum().item() for weight in dense.values()]
    kept = sum(size * held.energy_kept for size, held in zip(sizes, packed.values(), strict=True))
    share = kept / sum(sizes) if any(sizes) else 1.0
    return RecurrentWeights(packed, energy_kept=min(1.0, share), nonfinite=nonfinite)


def _keeps(dense: Mapping[str, Tensor], suffixes: list[str], prune: Prune) -> dict[str, Keep]:
    """The hidden units and features that each layer and direction keeps."""
    if isinstance(prune, Keep):
        upper = Keep(None, prune.outputs, prune.nm24)
        return {suffix: prune if suffix in FIRST else upper for suffix in suffixes}
    if isinstance(prune, Mapping):
        unknown = [repr(key) for key in prune if key not in suffixes]
        if unknown:
            raise ValueError(f"prune must name layers among {', '.join(suffixes)}, got {', '.join(unknown)}")
        # 2:4 of a compact weight is for the whole layer
        halved = {keep.nm24 for keep in prune.values()}
        if len(halved) > 1:
            raise ValueError("prune must ask for nm24 in every layer or in none, got some")
        return {suffix: prune.get(suffix, Keep(nm24=halved == {True})) for suffix in suffixes}
    if prune == "magnitude":
        return _largest(dense, suffixes)
    if prune is None:
        return _zeros_dropped(dense, suffixes)
    raise ValueError(
        f'prune must be None, "magnitude", a Keep or Keeps by layer ({", ".join(suffixes)}), got {prune!r}'
    )


def _by_weight(dense: Mapping[str, Tensor], keeps: Mapping[str, Keep]) -> dict[str, Keep]:
    """What of each weight is kept."""
    choice = {}
    for suffix, keep in keeps.items():
        recurrent = dense[f"weight_hh_{suffix}"]
        rows, hidden_size = recurrent.shape
        units = keep.outputs
        if units is not None:
            in_range = not units.numel() or (int(units.min()) >= 0 and int(units.max()) < hidden_size)
            if units.ndim != 1 or not in_range:
                raise ValueError(
                    f"hidden units kept in {suffix} must be a list of numbers from 0 to {hidden_size - 1}, "
                    f"got {units.tolist()}"
                )
            rows_kept = gate_rows(units, rows // hidden_size, hidden_size)
        else:
            rows_kept = None
        choice[f"weight_ih_{suffix}"] = Keep(keep.inputs, rows_kept, keep.nm24)
        choice[f"weight_hh_{suffix}"] = Keep(units, rows_kept, keep.nm24)
    return choice


def _largest(dense: Mapping[str, Tensor], suffixes: list[str]) -> dict[str, Keep]:
    keeps: dict[str, Keep] = {}
    directions = 1 + any(suffix.endswith("_reverse") for suffix in suffixes)
    for number, suffix in enumerate(suffixes):
        w_ih, w_hh = (dense[f"weight_{matrix}_{suffix}"] for matrix in MATRICES)
        layer = number // directions
        below = suffixes[(layer - 1) * directions : layer * directions] if layer else ()
        units = ChannelPruned.from_dense(unit_matrix(w_ih, w_hh), prune="magnitude").out_index
        for place, other in enumerate(below):
            is_dropped = torch.ones(w_hh.shape[1], dtype=torch.bool, device=w_hh.device)
            is_dropped[keeps[other].outputs.long()] = False  # type: ignore[union-attr]
            w_ih = w_ih.index_fill(1, is_dropped.nonzero().flatten() + place * w_hh.shape[1], 0)
        keeps[suffix] = Keep(ChannelPruned.from_dense(w_ih, prune="magnitude").in_index, units)
    return keeps


def _zeros_dropped(dense: Mapping[str, Tensor], suffixes: list[str]) -> dict[str, Keep]:
    keeps: dict[str, Keep] = {}
    for suffix in suffixes:
        w_ih, w_hh = (dense[f"weight_{matrix}_{suffix}"] != 0 for matrix in MATRICES)
        units, inputs = unit_matrix(w_ih, w_hh).any(1), w_ih.any(0)
        _check_zeros(suffix, w_ih, w_hh, units)
        for kept in (units, inputs):
            if not kept.any():
                kept[:_BLOCK] = True
        keeps[suffix] = Keep(inputs.nonzero().flatten(), units.nonzero().flatten())
    if all(
        len(keep.outputs) == dense[f"weight_hh_{suffix}"].shape[1]  # type: ignore[arg-type]
        and len(keep.inputs) == dense[f"weight_ih_{suffix}"].shape[1]  # type: ignore[arg-type]
        for suffix, keep in keeps.items()
    ):
        raise ValueError(
            "weights must have a hidden unit or a feature that is all zero "
            '(prune="magnitude" or a Keep drops some), got none'
        )
    return keeps


def _check_zeros(suffix: str, w_ih: Tensor, w_hh: Tensor, units: Tensor) -> None:
    """Refuse rows and columns of zeros that are not those of a whole hidden unit: whoever made them wanted
    something else, which this format does not hold."""
    hidden_size = w_hh.shape[1]
    zero_rows = {f"weight_{m}_{suffix}": ~w.any(1) for m, w in zip(MATRICES, (w_ih, w_hh), strict=True)}
    for name, is_zero in zero_rows.items():
        stray = is_zero.view(-1, hidden_size) & units
        if stray.any():
            gate, unit = stray.nonzero()[0].tolist()
            raise ValueError(
                f"{name} must have zero rows only where a hidden unit is zero in every gate of both weights "
                f"and in its column of weight_hh_{suffix}, got row {gate * hidden_size + unit}, "
                f"of hidden unit {unit}, which is not"
            )
    stray = ~w_hh.any(0) & units
    if stray.any():
        unit = int(stray.nonzero()[0])
        raise ValueError(
            f"weight_hh_{suffix} must have zero columns only where the hidden unit's rows are zero too, "
            f"got column {unit}"
        )
