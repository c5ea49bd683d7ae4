"""The metadata of ``nm24`` as GPU kernels read it: slabs of 128 columns, made from ``meta`` and never saved.

A slab holds 16 bytes, a *slot*, for each row of the weight. Slabs lie one behind the other, so the metadata
of a tile of rows and 128 columns is one run of bytes. Slots are ordered for ``mma.sp``: what a lane needs for
128 columns is one load.

For 16-bit values the rows 16i + g and 16i + g + 8 (g = 0 to 7) share two slots, g and g + 8 of the tile's
sixteen. For columns k of a slab::

    slot    16i + g + 8 q      q = bit 4 of k
    word    s                  s = bits 5 and 6 of k; 32 bits, little-endian
            bits 0-15          row 16i + g       columns 32s + 16q to 32s + 16q + 15, as two bytes of meta
            bits 16-31         row 16i + g + 8   the same columns

For 8-bit values slot m holds the 16 bytes that ``meta`` has for row m, as they are.

Rows are padded so that each convolution group begins at a multiple of 16 slots and a slab is a multiple of
128; columns to 128. Padding is 0x44, which is a legal pair of nibbles.

Source: PTX ISA 9.7, "Sparse matrix storage": metadata of mma.sp m16n8k32 with 16-bit elements and of m16n8k64
with 8-bit ones.
"""

import torch.nn.functional as F
from torch import Tensor

from sparseops.formats.nm24 import round_up

SLAB_COLUMNS = 128
SLOT_BYTES = 16
_TILE = 16
_PADDING = 0x44


def slab_rows(rows: int, groups: int = 1) -> int:
    """Slots of a slab for a weight of ``rows`` rows in ``groups`` convolution groups."""
    return round_up(groups * round_up(rows // groups, _TILE), SLAB_COLUMNS)


def pack_slabs(meta: Tensor, groups: int = 1, *, element_bits: int = 16) -> Tensor:
    """Slabs [ceil(P/128), slab_rows(O, groups), 16], uint8, of meta [O, P/8].

    element_bits: 16 for float16 and bfloat16 values, 8 for int8 ones.
    """
    rows, row_bytes = meta.shape
    slabs, slots = -(-row_bytes // SLOT_BYTES), slab_rows(rows, groups)
    in_group = rows // groups
    by_group = meta.reshape(groups, in_group, row_bytes)
    by_group = _pad(by_group, slabs * SLOT_BYTES, round_up(in_group, _TILE))
    canonical = _pad(by_group.flatten(0, 1), slabs * SLOT_BYTES, slots)
    if element_bits == 8:
        ordered = canonical.reshape(slots, slabs, SLOT_BYTES).transpose(0, 1)
    else:
        # (tile, half, g) of a row, (slab, s, q, byte) of a column
        split = canonical.reshape(slots // _TILE, 2, 8, slabs, 4, 2, 2)
        ordered = split.permute(3, 0, 5, 2, 4, 1, 6)
    return ordered.reshape(slabs, slots, SLOT_BYTES).contiguous()


def unpack_slabs(
    slabs: Tensor, rows: int, packed_cols: int, groups: int = 1, *, element_bits: int = 16
) -> Tensor:
    """The inverse of ``pack_slabs``: meta [rows, packed_cols / 8]."""
    count, slots, _ = slabs.shape
    if element_bits == 8:
        canonical = slabs.transpose(0, 1)
    else:
        canonical = slabs.reshape(count, slots // _TILE, 2, 8, 4, 2, 2).permute(1, 5, 3, 0, 4, 2, 6)
    in_group = rows // groups
    by_row = canonical.reshape(slots, count * SLOT_BYTES)[: groups * round_up(in_group, _TILE)]
    by_group = by_row.unflatten(0, (groups, -1))[:, :in_group, : packed_cols // 8]
    return by_group.reshape(rows, packed_cols // 8)


def _pad(meta: Tensor, row_bytes: int, rows: int) -> Tensor:
    """``meta`` [..., rows, row_bytes] with legal nibbles behind its rows and below them."""
    return F.pad(meta, (0, row_bytes - meta.shape[-1], 0, rows - meta.shape[-2]), value=_PADDING)
