"""The ops. Each file holds one op with all that belongs to it; importing it puts it into ``REGISTRY``."""

from sparseops.ops.channel_conv import channel_conv
from sparseops.ops.channel_linear import channel_linear
from sparseops.ops.nm24_compress import nm24_compress
from sparseops.ops.nm24_conv import nm24_conv
from sparseops.ops.nm24_grad_values import nm24_grad_values
from sparseops.ops.nm24_linear import nm24_linear
from sparseops.ops.nm24_linear_f8 import nm24_linear_f8
from sparseops.ops.nm24_linear_i8 import nm24_linear_i8
from sparseops.ops.nm24_to_dense import nm24_to_dense
from sparseops.ops.registry import REGISTRY, Op

__all__ = [
    "REGISTRY",
    "Op",
    "channel_conv",
    "channel_linear",
    "nm24_compress",
    "nm24_conv",
    "nm24_grad_values",
    "nm24_linear",
    "nm24_linear_f8",
    "nm24_linear_i8",
    "nm24_to_dense",
]
