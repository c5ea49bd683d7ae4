"""What other tools leave and read: their masks, and their checkpoints of sparse weights."""

from sparseops.interop.compressed import load_compressed, read_compressed, save_compressed
from sparseops.interop.dense import load_dense, save_dense
from sparseops.interop.masks import TakenMasks, take_masks

__all__ = [
    "TakenMasks",
    "load_compressed",
    "load_dense",
    "read_compressed",
    "save_compressed",
    "save_dense",
    "take_masks",
]
