"""The values of ``nm24`` in the order in which tensor cores take them from registers: *fragments*, made from
16-bit ``values`` for the kernels that never bring a weight into shared memory, and never saved.

A fragment is what a warp holds of 16 rows and 32 columns, of which 16 are kept: 32 lanes of 16 bytes. Lane
4g + t (g = 0 to 7, t = 0 to 3) has four registers of two neighbouring kept values each::

    register  row   kept values
    0         g     2t, 2t + 1
    1         g + 8 2t, 2t + 1
    2         g     2t + 8, 2t + 9
    3         g + 8 2t + 8, 2t + 9

Fragments lie in the order of slabs of 128 columns, within a slab of 16 rows, and of those by columns. So what
a warp wants of a stage of a kernel is one run of 2 KB, and each of its loads a line. Rows are padded with
zeros to those of the metadata's slabs (``nm24_slabs``), columns to 128.

Source: PTX ISA 9.7, "Register fragments for wgmma.mma_async.m64nNk16", which those of wgmma.mma_async.sp are
in terms of kept values: the four warps of a warpgroup have 16 rows each. The operand A of mma.m16n8k16 is the
same.
"""

import torch.nn.functional as F
from torch import Tensor

from sparseops.formats.nm24_slabs import SLAB_COLUMNS, slab_rows

_ROWS = 16
_STEPS = 4  # of 32 columns, in a slab
_KEPT = SLAB_COLUMNS // 2


def pack_fragments(values: Tensor) -> Tensor:
    """Fragments [ceil(P/128), slab_rows(O) / 16, 4, 32, 8] of values [O, P/2], in their dtype."""
    rows, kept = values.shape
    slabs, padded = -(-kept // _KEPT), slab_rows(rows)
    whole = F.pad(values, (0, slabs * _KEPT - kept, 0, padded - rows))
    # (16 rows, half, g) of a row, (slab, step, half, t, one of two) of a kept value
    split = whole.reshape(padded // _ROWS, 2, 8, slabs, _STEPS, 2, 4, 2)
    ordered = split.permute(3, 0, 4, 2, 6, 5, 1, 7)
    return ordered.reshape(slabs, padded // _ROWS, _STEPS, 32, 8).contiguous()


def unpack_fragments(fragments: Tensor, rows: int, packed_cols: int) -> Tensor:
    """The inverse of ``pack_fragments``: values [rows, packed_cols / 2]."""
    slabs, row_tiles = fragments.shape[:2]
    split = fragments.reshape(slabs, row_tiles, _STEPS, 8, 4, 2, 2, 2)
    whole = split.permute(1, 6, 3, 0, 2, 5, 4, 7).reshape(row_tiles * _ROWS, slabs * _KEPT)
    return whole[:rows, : packed_cols // 2].contiguous()
