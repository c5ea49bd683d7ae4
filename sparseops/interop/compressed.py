"""Checkpoints of the package compressed-tensors in its format "sparse-24-bitmask".

The weight [O, K] of a linear layer, K a multiple of 4, is three tensors there::

    <layer>.compressed [O, K/2]         kept values, in ascending column order
    <layer>.bitmask    [O, ceil(K/8)]   uint8; bit i of byte b is 1 if column 8b + i is kept
    <layer>.shape      [2, 1]           int64: O, K

Of every four neighbouring columns two are kept. A byte of ``bitmask`` so stands for the same two groups as a
byte of the meta of ``NM24``, and one becomes the other by a table of 256 entries. docs/interop.md describes
the whole checkpoint.

Source: compressed-tensors 0.9.4 to 0.13.0, compressors/sparse_compressors/sparse_24_bitmask.py.
"""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseops.formats import NM24
from sparseops.formats.nm24 import DTYPES, GROUP, NIBBLES, packed_cols
from sparseops.interop.dense import (
    SAFETENSORS,
    check_model,
    dense_state,
    load_all,
    safetensors,
    write_safetensors,
)
from sparseops.nn import SparseLinear

FORMAT = "sparse-24-bitmask"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

_PARTS = ("compressed", "bitmask", "shape")
_KEPT = {nibble: 1 << (nibble & 3) | 1 << (nibble >> 2) for nibble in NIBBLES}
_EMPTY_META = NIBBLES[0] | NIBBLES[0] << 4
_FIRST_TWO = _KEPT[NIBBLES[0]] << 4

# 0 is no legal byte on either side.
_META_OF_BITS = torch.zeros(256, dtype=torch.uint8, device="cpu")
_BITS_OF_META = torch.zeros(256, dtype=torch.uint8, device="cpu")
for _low, _low_bits in _KEPT.items():
    for _high, _high_bits in _KEPT.items():
        _META_OF_BITS[_low_bits | _high_bits << 4] = _low | _high << 4
        _BITS_OF_META[_low | _high << 4] = _low_bits | _high_bits << 4


def to_bitmask(packed: NM24) -> tuple[Tensor, Tensor]:
    """``compressed`` and ``bitmask`` of a weight [O, K].

    Raises:
        ValueError: the weight is no matrix, or K is no multiple of 4.
    """
    _check_shape(packed.shape, "to_bitmask: packed")
    columns = packed.shape[1]
    bits = _BITS_OF_META.to(packed.meta.device)[packed.meta[:, : -(-columns // 8)].int()]
    if columns % 8:
        bits[:, -1] &= 15
    return packed.values.detach()[:, : columns // 2].contiguous(), bits


def from_bitmask(compressed: Tensor, bitmask: Tensor, shape: Iterable[int], name: str = "weight") -> NM24:
    """The weight of the three tensors, which is called ``name`` in messages.

    Raises:
        TypeError: compressed is not float16, bfloat16, float32 or float64, or bitmask is not uint8.
        ValueError: the shapes do not fit one another, or the bitmask does not keep two of each four.
    """
    size = tuple(int(n) for n in shape)
    _check_shape(size, f"from_bitmask: {name}.shape")
    rows, columns = size
    for part, tensor, dtypes, width in (
        ("compressed", compressed, DTYPES, columns // 2),
        ("bitmask", bitmask, (torch.uint8,), -(-columns // 8)),
    ):
        if tensor.dtype not in dtypes:
            rule = " or ".join(str(dtype) for dtype in dtypes)
            raise TypeError(f"from_bitmask: {name}.{part} must have dtype {rule}, got {tensor.dtype}")
        if tuple(tensor.shape) != (rows, width):
            raise ValueError(
                f"from_bitmask: {name}.{part} must have shape {(rows, width)} for a weight of shape {size}, "
                f"got {tuple(tensor.shape)}"
            )
    _check_bits(bitmask, columns, name)
    bits = bitmask.clone()
    if columns % 8:
        bits[:, -1] |= _FIRST_TWO
    meta = _META_OF_BITS.to(bits.device)[bits.int()]
    packed = packed_cols(size)
    return NM24(
        F.pad(compressed, (0, packed // 2 - compressed.shape[1])).contiguous(),
        F.pad(meta, (0, packed // 8 - meta.shape[1]), value=_EMPTY_META).contiguous(),
        size,
    )


def read_compressed(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint with dense weights, as the model's state dict without compression.

    path: the folder, with config.json and one or more safetensors files, or one safetensors file.

    Raises:
        ValueError: the folder's configuration is of another format or of a quantized model; or a weight is
            malformed, see ``from_bitmask``.
        TypeError: values are not floating-point.
        FileNotFoundError: there is no such file.
        ImportError: the package safetensors is not there.
    """
    state, packed = _read(Path(path), "read_compressed")
    return state | {f"{layer}.weight": weight.to_dense() for layer, weight in packed.items()}


def load_compressed(model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> Any:
    """Load a checkpoint into a model of ordinary or sparse layers: an ordinary linear layer gets its weight
    with zeros, and a 2:4 ``SparseLinear`` the packed one, without a dense weight between.

    path: as for ``read_compressed``. strict, the return value, the copy of the model's tensors that is held
    meanwhile: as for ``load_dense``.

    Raises:
        TypeError: model is no module.
        RuntimeError: names or shapes do not fit; the model is as before.
        And what ``read_compressed`` raises.
    """
    check_model(model, "load_compressed")
    state, packed = _read(Path(path), "load_compressed")
    modules = dict(model.named_modules(remove_duplicate=False))
    for layer, weight in packed.items():
        module = modules.get(layer)
        is_sparse = isinstance(module, SparseLinear) and module.format == NM24.key
        if is_sparse and module.weight_shape == weight.shape:  # type: ignore[union-attr]
            state |= {f"{layer}.values": weight.values, f"{layer}.meta": weight.meta}
        else:
            state[f"{layer}.weight"] = weight.to_dense()
    return load_all(model, state, strict, "load_compressed")


def save_compressed(
    model: nn.Module, folder: str | os.PathLike[str], *, ignore: Iterable[str] | None = None
) -> list[str]:
    """Write ``model`` as a folder with model.safetensors and config.json.

    Linear layers, ordinary or sparse ones, whose weight is 2:4 are compressed; everything else is written
    dense. A config.json that is in the folder already keeps its other entries, so that of a model of
    transformers is written first: ``model.config.save_pretrained(folder)``.

    Args:
        model: any module. Not changed.
        folder: made if it is not there.
        ignore: name patterns (fnmatch) of the linear layers that are written dense; every other must be 2:4
            then. None writes those dense that are not.

    Returns:
        The names of the layers that were compressed.

    Raises:
        TypeError: model is no module, or its state dict holds something else than tensors.
        ValueError: there is no 2:4 linear layer; ``ignore`` is given and another weight is not 2:4 (the text
            names its first row and group), or a pattern names no linear layer; a tensor is on the meta
            device; or the folder holds other weights.
        ImportError: the package safetensors is not there.
    """
    check_model(model, "save_compressed")
    folder = Path(folder)
    others = sorted(file.name for file in folder.glob(f"*{SAFETENSORS}*") if file.name != WEIGHTS)
    if others:
        raise ValueError(
            f"save_compressed: folder must hold no weights but {WEIGHTS}, got {', '.join(others)} in {folder}"
        )
    linear: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and isinstance(module, (nn.Linear, SparseLinear))
    }
    packed = _packed(linear, ignore)
    state = dense_state(model, "save_compressed", packed)
    dense = [tensor for tensor in state.values() if isinstance(tensor, Tensor)]
    zeros = sum(tensor.numel() - int(tensor.count_nonzero()) for tensor in dense)
    numel = sum(tensor.numel() for tensor in dense)
    for layer, weight in packed.items():
        rows, columns = weight.shape
        zeros += rows * columns - int(weight.values.count_nonzero())
        numel += rows * columns
        compressed, bitmask = to_bitmask(weight)
        state |= {
            f"{layer}.compressed": compressed,
            f"{layer}.bitmask": bitmask,
            f"{layer}.shape": torch.tensor([[rows], [columns]]),
        }
    config = folder / CONFIG
    entries = json.loads(config.read_text()) if config.exists() else {}
    entries["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "sparsity_config": {
            "format": FORMAT,
            "global_sparsity": zeros / max(numel, 1),
            "ignore": [name for name in linear if name not in packed],
            "sparsity_structure": "2:4",
            "targets": ["Linear"],
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(state, folder / WEIGHTS, "save_compressed")
    config.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n")
    return list(packed)


def _packed(linear: dict[str, nn.Module], ignore: Iterable[str] | None) -> dict[str, NM24]:
    """The weights that are compressed, by layer."""
    patterns = [] if ignore is None else [ignore] if isinstance(ignore, str) else list(ignore)
    for pattern in patterns:
        if not fnmatch.filter(linear, pattern):
            raise ValueError(f"save_compressed: ignore must match a linear layer, got {pattern!r}")
    packed: dict[str, NM24] = {}
    for name, module in linear.items():
        # Readers find the layers by the name of their class.
        if type(module) not in (nn.Linear, SparseLinear) or any(
            fnmatch.fnmatchcase(name, pattern) for pattern in patterns
        ):
            continue
        try:
            packed[name] = _pack(module)
        except (ValueError, TypeError) as exc:
            if ignore is not None:
                raise type(exc)(
                    f"save_compressed: {name}.weight must be 2:4, or ignore must name it: {exc}"
                ) from exc
    if not packed:
        raise ValueError(
            "save_compressed: model must hold a named linear layer whose weight is 2:4, got none "
            f"among {len(linear)}"
        )
    return packed


def _pack(module: Any) -> NM24:
    is_packed = isinstance(module, SparseLinear) and module.format == NM24.key
    weight: NM24 = module.packed if is_packed else NM24.from_dense(module.weight)
    _check_shape(weight.shape, "to_bitmask: packed")
    return weight


def _read(path: Path, caller: str) -> tuple[dict[str, Tensor], dict[str, NM24]]:
    """The tensors that are not compressed, and the compressed weights by layer."""
    load_file = safetensors(caller).load_file
    state: dict[str, Tensor] = {}
    for file in _files(path, caller):
        state |= load_file(file)
    packed = {}
    for layer in [key.removesuffix(".bitmask") for key in state if key.endswith(".bitmask")]:
        missing = [f"{layer}.{part}" for part in _PARTS if f"{layer}.{part}" not in state]
        if missing:
            raise ValueError(
                f"{caller}: {layer}.bitmask must come with {' and '.join(missing)}, got it alone"
            )
        compressed, bitmask, shape = (state.pop(f"{layer}.{part}") for part in _PARTS)
        packed[layer] = from_bitmask(compressed, bitmask, shape.flatten().tolist(), layer)
    if not packed:
        raise ValueError(f"{caller}: {path} must hold weights in the format {FORMAT}, got none")
    return state, packed


def _files(path: Path, caller: str) -> list[Path]:
    if not path.is_dir():
        return [path]
    config = json.loads((path / CONFIG).read_text()).get("quantization_config") or {}
    format = (config.get("sparsity_config") or {}).get("format")
    if format != FORMAT:
        raise ValueError(
            f"{caller}: {path / CONFIG} must say format {FORMAT} in its sparsity_config, got {format}"
        )
    if config.get("config_groups"):
        raise ValueError(
            f"{caller}: {path / CONFIG} must be of a model that is not quantized, got config_groups"
        )
    if (path / INDEX).exists():
        files = json.loads((path / INDEX).read_text())["weight_map"].values()
        return [path / name for name in dict.fromkeys(files)]
    return [path / WEIGHTS]


def _check_shape(shape: tuple[int, ...], argument: str) -> None:
    if len(shape) != 2 or shape[1] % GROUP:
        raise ValueError(
            f"{argument} must be a matrix whose columns are a multiple of {GROUP}, got shape {shape}"
        )


def _check_bits(bitmask: Tensor, columns: int, name: str) -> None:
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    bits = (bitmask.unsqueeze(-1) >> shifts & 1).flatten(1)
    kept = bits[:, :columns].unflatten(1, (columns // GROUP, GROUP)).sum(-1)
    wrong = (kept != 2).nonzero()
    if len(wrong):
        row, group = wrong[0].tolist()
        raise ValueError(
            f"from_bitmask: {name}.bitmask must keep two of each four columns, got {int(kept[row, group])} "
            f"in row {row}, group {group} (columns {group * GROUP}-{group * GROUP + 3})"
        )
    stray = bits[:, columns:].any(1).nonzero()
    if len(stray):
        raise ValueError(
            f"from_bitmask: {name}.bitmask must be 0 behind column {columns - 1}, "
            f"got 1 in row {int(stray[0])}"
        )
