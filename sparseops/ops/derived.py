"""Tensors that are made from a weight once and kept for as long as it lives: metadata in slabs, values in
another dtype.

``derive`` finds them by the tensor they were made from, and makes them again when that has changed: when its
version counter has moved (every in-place operation moves it), or when it holds other memory. Not seen are
writes through ``tensor.data`` and by kernels of others; so ``forget`` is called whenever a gradient for the
weight is asked for.

What is made again stays at the same address, since a captured CUDA graph goes on reading there. During a
capture nothing is kept: the memory would belong to the graph, and hold nothing before its first replay.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


@dataclass
class _Entry:
    """A derived tensor. ``stream``: where it was last made, on a GPU; ``event``: behind that, None once
    over."""

    stamp: tuple[int, int, torch.Size] | None
    tensor: Tensor
    stream: Any = None
    event: Any = None


_entries: Any = WeakTensorKeyDictionary()  # source -> {key: _Entry}


def derive(source: Tensor, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """``make()``, a function of ``source`` alone that ``key`` names, or what it gave before."""
    if source.is_inference():  # has no version counter
        return make()
    stamp = (source._version, source.data_ptr(), source.shape)
    entries = _entries.get(source)
    entry = entries.get(key) if entries is not None else None
    if entry is not None and entry.stamp == stamp:
        if entry.stream is not None:
            _order(entry)
        return entry.tensor
    if source.is_cuda and _is_capturing(source.device):
        return make()
    # Not in inference mode: what it makes could not be written again outside.
    with torch.inference_mode(False), torch.no_grad():
        made = _Entry(stamp, make())
        if entry is not None and _fits(entry.tensor, made.tensor):
            made.tensor = entry.tensor.copy_(made.tensor)
    if source.is_cuda:
        made.stream = torch.cuda.current_stream(source.device)
        made.event = made.stream.record_event()
        made.tensor.record_stream(made.stream)
    _entries.setdefault(source, {})[key] = made
    return made.tensor


def forget(source: Tensor, key: Hashable) -> None:
    """Have it made again at the next call."""
    entries = _entries.get(source)
    if entries is not None and key in entries:
        entries[key].stamp = None


def _fits(old: Tensor, new: Tensor) -> bool:
    return (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device)


def _order(entry: _Entry) -> None:
    """Put the current stream behind the one that made the tensor, and keep its memory for it."""
    device = entry.tensor.device
    current = torch.cuda.current_stream(device)
    # What was made before a capture is over when that begins, and an event from outside would break it.
    if current == entry.stream or _is_capturing(device):
        return
    if entry.event is not None and entry.event.query():
        entry.event = None
    if entry.event is not None:
        current.wait_event(entry.event)
    entry.tensor.record_stream(current)


def _is_capturing(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
