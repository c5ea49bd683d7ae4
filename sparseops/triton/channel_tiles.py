"""What the kernels of channel-pruned layers share: which channels a tile holds, and how it ends.

A side of a layer, its inputs or its outputs, has a mode (``sparseops.formats.channel_pruned`` calls it the
granularity) and a table of int32:

    mode 0       every channel is kept, the position among the kept ones is the channel; no table
    mode 8, 16   blocks of so many channels: the blocks that are kept, then those that are dropped
    mode 1       the channels that are kept, then those that are dropped

With several groups of channels ``starts`` int32 [groups + 1] says at which position the kept channels of each
group begin; blocks are then used where a group is whole blocks wide.

Numbers that are multiples of 8 are given to kernels as how many times 8 (``UNIT``), since Triton itself only
looks at whether a number is a multiple of 16, and loads of 16 bytes need to know of 8.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseops.triton.common import activate, pointers

UNIT = 8
"""Channels of a 16-bit type that are loaded at once."""

INDEX_LIMIT = 2**31
"""Kernels count rows, tiles and what lies within a row in 32 bits."""

OF_32_ROWS = {90: "mma.sync", 100: "mma.sync"}
"""What multiplies tiles of 32 rows, fewer than the newer instructions take, by compute capability."""


class Side(NamedTuple):
    """The inputs or outputs of a layer, as above. kept, total: channels. most: that any group keeps. even:
    every group keeps a multiple of 8."""

    mode: int
    kept: int
    total: int
    table: Tensor | None
    starts: Tensor | None
    most: int
    even: bool


class Taps(NamedTuple):
    """The kernel of a convolution: pairs are of height and width; top and left are rows and columns of zeros
    before the first."""

    size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    top: int
    left: int


def unit(*numbers: int) -> int:
    """What a kernel is given these numbers in units of: 8 if all are multiples of it, else 1."""
    return UNIT if all(number % UNIT == 0 and number < INDEX_LIMIT for number in numbers) else 1


def config_name(
    dtype: torch.dtype, sides: tuple[Side, Side], units: tuple[int, int], *tensors: Tensor | None
) -> str:
    """The configuration that these tensors are served by. Loads of single elements, where channels do not
    come in blocks, or a tensor or its rows do not lie at multiples of 16 bytes, take more registers, and
    tiles are then smaller."""
    if dtype is torch.float32:
        return "float32"
    blocks = all(side.mode != 1 for side in sides) and units == (UNIT, UNIT)
    whole = all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors)
    return "large" if blocks and whole else "small"


def product_config(
    rows: int,
    dtype: torch.dtype,
    sides: tuple[Side, Side],
    units: tuple[int, int],
    *tensors: Tensor | None,
) -> str:
    """The same for a product that writes ``rows`` rows of the second side: "narrow" where "large" tiles of
    128 rows and columns would be emptier than those of 64 columns, or too few for all multiprocessors."""
    name = config_name(dtype, sides, units, *tensors)
    if name != "large":
        return name
    output, tensor = sides[1], tensors[0]
    assert tensor is not None
    columns = triton.cdiv(output.most, 128)
    groups = 1 if output.starts is None else output.starts.shape[0] - 1
    tiles = triton.cdiv(rows, 128) * columns * groups
    is_full = 2 * columns == triton.cdiv(output.most, 64)
    return "large" if is_full and tiles >= multiprocessors(tensor.device) else "narrow"


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many the GPU has; a few where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def tables(modes: tuple[int, int], groups: bool | None = None) -> dict[str, str | None]:
    """The types of what a kernel is given of lists of these modes, for a ``Signature``; of starts too, unless
    groups is None, which are there if it is set."""
    given = dict(zip(("in_ptr", "out_ptr"), modes, strict=True))
    if groups is not None:
        given |= dict.fromkeys(("in_starts_ptr", "out_starts_ptr"), groups)
    tables = pointers(" ".join(given), torch.int32)
    return {name: tables[name] if there else None for name, there in given.items()}


@triton.jit
def tile_of(rows, column_tiles, dropped_tiles, BM: tl.constexpr):
    """The tile of this program: its row and column, and whether it has kept channels. Tiles of kept channels
    come first, since those of dropped ones have nothing to multiply. Eight rows of tiles are gone through
    column by column, so that what is read once is still in the L2 cache when it is read again."""
    program = tl.program_id(0)
    row_tiles = tl.cdiv(rows, BM)
    kept = program < row_tiles * column_tiles
    columns = tl.where(kept, column_tiles, dropped_tiles)
    program = tl.where(kept, program, program - row_tiles * column_tiles)
    band = program // (8 * columns)
    height = tl.minimum(row_tiles - 8 * band, 8)
    inside = program % (8 * columns)
    return 8 * band + inside % height, inside // height, kept


@triton.jit
def channels_at(table_ptr, skipped, position, mask, MODE: tl.constexpr):
    """The channels at ``position`` (0 where ``mask`` is not set), behind ``skipped`` entries of the table."""
    if MODE == 0:
        channel = position
    elif MODE == 1:
        channel = tl.load(table_ptr + skipped + position, mask=mask, other=0)
    else:
        block = tl.load(table_ptr + skipped + position // MODE, mask=mask, other=0)
        channel = block * MODE + position % MODE
    return channel


@triton.jit
def outputs_of(table_ptr, first, kept, total, tile_columns, columns, is_kept, MODE: tl.constexpr):
    """The output channels of a tile's ``tile_columns``, and which of them there are. first: the position of
    the tile's first kept channel; columns: of its group; kept, total: of the layer."""
    mask = tile_columns < tl.where(is_kept, columns, total - kept)
    entries = 0
    if MODE != 0:
        entries = tl.where(is_kept, 0, tl.cdiv(kept, MODE))
    position = tl.where(is_kept, first, 0) + tile_columns
    return channels_at(table_ptr, entries, position, mask, MODE), mask


@triton.jit
def store_tile(
    sums, bias_ptr, residual_ptr, y_ptr, row, channel, row_mask, channel_mask, width, residual_row,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """``y[row, channel] = act(sums + bias[channel] + residual[row, channel])``; its rows are ``width``."""
    mask = row_mask[:, None] & channel_mask[None, :]
    row = row.to(tl.int64)
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + channel, mask=channel_mask, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        residual_rows = residual_ptr + (row * residual_row)[:, None]
        residual = tl.load(residual_rows + channel[None, :], mask=mask, other=0.0)
        sums += residual.to(tl.float32)
    y = activate(sums, ACTIVATION).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + (row * width)[:, None] + channel[None, :], y, mask=mask)
