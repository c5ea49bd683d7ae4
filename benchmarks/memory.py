"""``python -m benchmarks.memory``: memory of a sparse layer after its first forward, as a share of dense.

Measured in two ways, both over the bytes of the dense layer's tensors: the bytes of every tensor that the
sparse layer holds, and the growth of a fresh process that makes the layer and runs it (which also counts
what the kernel keeps for itself).
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn

from benchmarks.output import console
from sparseops.nn import SparseConv2d, SparseLinear

AT_MOST = 0.66
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
# Large weights: they leave the heap when freed, so that what is left over by making them does not count.
LAYERS = ("linear 4096->4096", "convolution 3x3 1024->1024")


def make(layer: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    """A dense layer and an input of it."""
    if layer == LAYERS[0]:
        return nn.Linear(4096, 4096, dtype=dtype), torch.randn(16, 4096, dtype=dtype)
    return nn.Conv2d(1024, 1024, 3, padding=1, dtype=dtype), torch.randn(1, 1024, 14, 14, dtype=dtype)


def sparse(layer: nn.Module) -> nn.Module:
    """The sparse layer of a dense one."""
    kind = SparseLinear if isinstance(layer, nn.Linear) else SparseConv2d
    return kind.from_dense(layer, prune="magnitude")


def _tensors(value: object, seen: set[int]) -> Iterator[Tensor]:
    """Tensors reachable from an object's attributes through modules and containers."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, seen)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _tensors(item, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _tensors(vars(value), seen)


def held_bytes(module: nn.Module) -> int:
    """Bytes of the storages that a module holds in any attribute, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(module, set())}
    return sum(storages.values())


def resident_bytes() -> int:
    """What this process has in memory, after giving free heap pages back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def grown(layer: str, dtype: torch.dtype) -> int:
    """Bytes this process grows by when it makes the sparse layer and runs it."""
    with torch.inference_mode():
        sparse(nn.Linear(64, 64, dtype=dtype))(torch.randn(4, 64, dtype=dtype))
        before = resident_bytes()
        dense, x = make(layer, dtype)
        module = sparse(dense)
        del dense
        module(x)
        del x
        return resident_bytes() - before


def measure(layer: str, dtype: torch.dtype) -> tuple[float, float]:
    """(share by tensors held, share by growth of the process)."""
    dense, x = make(layer, dtype)
    module = sparse(dense)
    with torch.inference_mode():
        dense(x)
        module(x)
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        growth = fresh.apply(grown, (layer, dtype))
    return held_bytes(module) / held_bytes(dense), growth / held_bytes(dense)


def main() -> int:
    """Prints the table; the exit status is 1 when a share is above AT_MOST."""
    table = Table(title="memory after the first forward, sparse over dense", title_justify="left")
    for heading in ("layer", "dtype", "tensors held", "growth of the process", f"at most {AT_MOST}"):
        table.add_column(heading, no_wrap=True)
    worst = 0.0
    for layer in LAYERS:
        for tag, dtype in DTYPES.items():
            held, by_growth = measure(layer, dtype)
            worst = max(worst, held, by_growth)
            reached = "yes" if max(held, by_growth) <= AT_MOST else "NO"
            table.add_row(layer, tag, f"{held:.3f}", f"{by_growth:.3f}", reached)
    console().print(table)
    return int(worst > AT_MOST)


if __name__ == "__main__":
    sys.exit(main())
