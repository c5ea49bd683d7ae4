"""Which tile of the CUDA kernels a product takes and how many blocks share one: a rule, nothing is tuned.

This is the rule for the tiles of mma.sp. Where a call may take those of sm90 as well, ``dispatch_sm90`` has
another one, for all of them.

A block of threads computes one output tile. What it has to do for ``cols`` columns of 16-bit elements, with F
features and T tokens to a tile:

    multiply-adds   F * T * cols                    half of them done
    bytes           F * cols * 1.125 + T * cols * 2   weight (values and metadata) and activations

- Up to 16 tokens the weight is nearly all that is read (2 * tokens operations to 1.125 bytes, where a GPU
  does hundreds for each byte), so the tile that streams it best is right, and a wider one would only multiply
  zeros: ``few8``, then ``few16``.
- Above that each byte that a tile reads should serve many operations: 41 multiply-adds for the large tile
  (128 x 128), 20 for the small one (64 x 64). Through shared memory, which is what bounds both, the large
  tile reaches at best 0.69 of the tensor cores' peak and the small one 0.43 (csrc/cuda/mainloop.cuh has the
  count): 1.6 times as much, which ``_LARGE_RATE`` stands for until a GPU has been asked. But a large tile
  wastes more where the output ends inside it, and has fewer tiles to give the multiprocessors. So both are
  estimated, and the one that is done first is taken.
- Tiles that are fewer than the multiprocessors leave some of them idle. Then the columns of a tile are split
  among blocks, so that there are up to twice as many blocks as multiprocessors. A split costs a tile of
  partial sums written and read, 8 * F * T bytes: 131 KB for the large tile, about what it reads for 256
  columns (102 KB), so a split has at least as many. The eight warps of a block for few tokens take 128
  columns each, so that its splits are 1024 columns deep.
"""

from collections.abc import Sequence
from functools import lru_cache

from sparseops import _native
from sparseops.ops import dispatch_sm90
from sparseops.ops.tiles import (
    BYTE_TILES,
    CONV_TILES,
    F8_TILES,
    FEW_TILES,
    MATRIX_TILES,
    MMA_TILES,
    SM90_RS_TILES,
    WIDE_TILES,
    Plan,
    Product,
    Tile,
    ceil_div,
)

__all__ = [
    "BYTE_TILES",
    "CONV_TILES",
    "F8_TILES",
    "MATRIX_TILES",
    "MMA_TILES",
    "SM90_RS_TILES",
    "WIDE_TILES",
    "Plan",
    "Product",
    "Tile",
    "built_tiles",
    "plan",
]

_LARGE_RATE = 1.7
_MOST_SPLITS = 16
_SLAB = 128  # splits are whole slabs of metadata
_LEAST_SLABS = {"few8": 8, "few16": 8, "small": 2, "large": 2}


@lru_cache(maxsize=1)
def built_tiles() -> dict[str, Tile]:
    """The tiles of the built module by name."""
    tiles = _native.require("cuda_tiles").cuda_tiles()
    return {name: Tile(i, name, *sizes) for i, (name, *sizes) in enumerate(tiles)}


def plan(op: str, product: Product, multiprocessors: int, allowed: Sequence[str]) -> Plan:
    """How ``product`` is cut, by the rule or as ``SPARSEOPS_IMPL`` says. allowed: the tiles that this call
    can take on this GPU.

    Raises:
        ValueError: ``SPARSEOPS_IMPL`` names a tile that is not among them.
    """
    tiles, forced = built_tiles(), _native.impl
    if forced in tiles and forced not in allowed:
        raise ValueError(
            f"{op}: SPARSEOPS_IMPL must be auto, dense or one of {', '.join(allowed)} for this call, "
            f"got {forced!r}"
        )
    names = (forced,) if forced in tiles else _candidates(product.tokens, allowed, tiles)
    return _soonest(product, multiprocessors, tuple(tiles[name] for name in names))


@lru_cache(maxsize=1024)
def _soonest(product: Product, multiprocessors: int, tiles: tuple[Tile, ...]) -> Plan:
    sm90 = [tile for tile in tiles if tile.is_sm90]
    plans = [plan for tile in sm90 for plan in dispatch_sm90.plans(product, tile, multiprocessors)]
    plans += [_split(product, tile, multiprocessors) for tile in tiles if not tile.is_sm90]
    if sm90:
        return min(plans, key=lambda plan: dispatch_sm90.cost(product, plan, multiprocessors))
    return min(plans, key=lambda plan: _duration(plan, multiprocessors))


def _candidates(tokens: int, allowed: Sequence[str], tiles: dict[str, Tile]) -> list[str]:
    """Those of the allowed tiles that the rule looks at."""
    few = [name for name in FEW_TILES if name in allowed and tokens <= tiles[name].tokens]
    wide = few[:1] or [name for name in WIDE_TILES if name in allowed]
    sm90 = [name for name in allowed if tiles[name].is_sm90 and not tiles[name].from_registers]
    return [*wide, *sm90]


def _split(product: Product, tile: Tile, multiprocessors: int) -> Plan:
    rows = product.rows // product.groups
    tiles = ceil_div(rows, tile.features) * product.groups * ceil_div(product.tokens, tile.tokens)
    slabs = ceil_div(product.cols, _SLAB)
    splits = 1
    if tiles < multiprocessors:
        splits = max(1, min(2 * multiprocessors // tiles, _MOST_SPLITS, slabs // _LEAST_SLABS[tile.name]))
        splits = ceil_div(slabs, ceil_div(slabs, splits))  # none without columns
    return Plan(tile, splits, tiles)


def _duration(plan: Plan, multiprocessors: int) -> float:
    """In units of a full column of a 64 x 64 tile on one multiprocessor."""
    area = plan.tile.features * plan.tile.tokens / 4096
    rate = _LARGE_RATE if plan.tile.name == "large" else 1.0
    return ceil_div(plan.tiles * plan.splits, multiprocessors) / plan.splits * area / rate
