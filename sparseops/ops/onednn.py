"""Dense products on the CPU by oneDNN, the library that torch brings along, with a weight in the order that
it wants.

``F.conv2d`` puts a weight in that order at every call, which may take longer than the convolution itself, and
``F.linear`` may hand float32 to a slower library. Here it is done once for as long as the weight does not
change. Writes that leave no trace (through ``tensor.data``) are not seen; ``forget`` is called wherever a
gradient for the weight is asked for.

The functions are those that torch.compile generates calls of. Where torch lacks one, or oneDNN is turned off
or does not take the dtype, and for small products, ``F.linear`` and ``F.conv2d`` run.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_known: Any = WeakTensorKeyDictionary()  # weight -> {key: (version, address, reordered or None)}

# Below so many products a call costs more in oneDNN than in what torch has for small ones.
_LEAST_LINEAR = 1 << 19
_LEAST_CONV = 1 << 20
# Of one weight, for images of several sizes.
_MOST_ORDERS = 8

_order_conv: Any
try:
    _order_linear = torch.ops.mkldnn._reorder_linear_weight.default
    _linear = torch.ops.mkldnn._linear_pointwise.default
    _conv = torch.ops.mkldnn._convolution_pointwise.default
    _order_conv = torch._C._nn.mkldnn_reorder_conv2d_weight
    _IS_THERE = torch.backends.mkldnn.is_available()
    _is_on = torch._C._get_mkldnn_enabled
except AttributeError:  # another torch has moved these private names
    _IS_THERE = False


def _takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN can be called for ``dtype``."""
    return _IS_THERE and _is_on() and _computes_in(dtype)


@lru_cache
def _computes_in(dtype: torch.dtype) -> bool:
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype is torch.float32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, source: Tensor | None = None) -> Tensor:
    """``F.linear`` of ``x`` [n, K]; source: what ``weight`` is another form of."""
    rows = x.shape[0]  # one row of float32 is bound by the weight's bytes in any order
    if (
        rows * weight.numel() < _LEAST_LINEAR
        or (rows == 1 and x.dtype is torch.float32)
        or not _takes(x.dtype)
    ):
        return F.linear(x, weight, bias)
    ordered = _ordered(weight if source is None else source, None, lambda: _order_linear(weight))
    y: Tensor = _linear(x, ordered, bias, "none", [], "")
    return y


def conv(
    x: Tensor,
    source: Tensor,
    make: Callable[[Tensor], Tensor],
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pixels: int,
    key: Hashable,
) -> Tensor:
    """``F.conv2d`` of ``x`` [N, C, H, W] with the weight ``make(source)`` [O, C / groups, R, S].

    pixels: of all images of the output. key: what ``make`` depends on besides ``source``.
    """
    if (groups == 1 and pixels * source.numel() < _LEAST_CONV) or not _takes(x.dtype):
        return F.conv2d(x, make(source), bias, stride, padding, dilation, groups)
    sizes: Any = tuple(padding), tuple(stride), tuple(dilation), groups
    shape = tuple(x.shape)  # the order depends on the size of the images, and on how many they are
    ordered = _ordered(
        source, (key, sizes, shape), lambda: _order_conv(make(source).to_mkldnn(), *sizes, shape)
    )
    y: Tensor = _conv(x, ordered, bias, *sizes, "none", [], "")
    return y


def forget(source: Tensor) -> None:
    """The weight is being trained, perhaps by writes that leave no trace."""
    _known.pop(source, None)


def _ordered(source: Tensor, key: Hashable, order: Callable[[], Tensor]) -> Tensor:
    """``order()``, the weight in oneDNN's order, or what it gave before."""
    if source.is_inference():  # has no version counter
        return order()
    entries = _known.get(source)
    found = entries.get(key) if entries is not None else None
    version, address = source._version, source.data_ptr()
    if found is not None and found[:2] == (version, address):
        kept: Tensor = found[2]
        return kept
    with torch.inference_mode(False), torch.no_grad():
        made = order()
    if found is not None or entries is None or len(entries) < _MOST_ORDERS:
        _known.setdefault(source, {})[key] = version, address, made
    return made
