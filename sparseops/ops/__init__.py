"""The ops. Each file holds one op with all that belongs to it; importing it puts it into ``REGISTRY``."""

from sparseops.ops.nm24_conv import nm24_conv
from sparseops.ops.nm24_linear import nm24_linear
from sparseops.ops.nm24_to_dense import nm24_to_dense
from sparseops.ops.registry import REGISTRY, Op

__all__ = ["REGISTRY", "Op", "nm24_conv", "nm24_linear", "nm24_to_dense"]
