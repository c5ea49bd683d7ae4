"""Output tiles of the CUDA kernels, products, and the plans by which they are cut into tiles."""

from typing import NamedTuple

FEW_TILES = ("few8", "few16")
WIDE_TILES = ("small", "large")
MMA_TILES = FEW_TILES + WIDE_TILES
"""The tiles by mma.sp; all others are by wgmma.sp."""
SM90_FEW_TILES = ("sm90_128x8", "sm90_128x16", "sm90_128x32")
SM90_WIDE_TILES = ("sm90_128x64", "sm90_128x128", "sm90_128x256", "sm90_256x128", "sm90_192x192")
SM90_RS_TILES = ("sm90_rs_128x256", "sm90_rs_256x128")

MATRIX_TILES = MMA_TILES + SM90_FEW_TILES + SM90_WIDE_TILES + SM90_RS_TILES
"""The tiles that there are for products of 16-bit matrices; these are all."""
BYTE_TILES = WIDE_TILES + SM90_WIDE_TILES
"""Those for matrices of 8-bit integers."""
F8_TILES = SM90_WIDE_TILES
"""Those for matrices of 8-bit floating-point numbers."""
CONV_TILES = WIDE_TILES + SM90_WIDE_TILES
"""Those for convolutions."""


class Tile(NamedTuple):
    """A tile of the kernels, as the built module lists it. ``code``: its place there; ``depth``: 16-bit
    columns of one step; ``consumers``: its parts that count their splits apart; ``arch``: the least compute
    capability, and for 90 the only one."""

    code: int
    name: str
    features: int
    tokens: int
    depth: int
    consumers: int
    arch: int

    @property
    def is_sm90(self) -> bool:
        return self.arch == 90

    @property
    def from_registers(self) -> bool:
        """Whether it takes the weight's values as ``formats.nm24_fragments`` orders them."""
        return self.name in SM90_RS_TILES


class Product(NamedTuple):
    """The sizes of a product: ``tokens`` x ``rows`` outputs over ``cols`` packed columns. The rows of a
    grouped convolution lie in ``groups`` equal parts, and no tile spans two."""

    tokens: int
    rows: int
    cols: int
    groups: int = 1
    element_bits: int = 16


class Plan(NamedTuple):
    """A tile, how many blocks share each output tile, how many output tiles there are, and how many blocks
    share what they read of the activations."""

    tile: Tile
    splits: int
    tiles: int
    cluster: int = 1

    @property
    def partials(self) -> int:
        """Elements of 4 bytes of the workspace for partial sums."""
        return self.tiles * self.splits * self.tile.features * self.tile.tokens if self.splits > 1 else 0

    @property
    def counters(self) -> int:
        """How many count the splits that are done."""
        return self.tiles * self.tile.consumers if self.splits > 1 else 0


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
