"""The rule for GPUs of compute capability 9.0: the plan that a multiprocessor should be done with first, by a
model of what keeps it busy. Nothing is tuned, and nothing of it has been measured on these kernels.

A stage is 128 columns of 16-bit elements or 256 of 8-bit ones. With F features and T tokens to a tile it is F
rows of 128 bytes of values and their metadata, and T rows of 256 bytes of x. Of the multiprocessors of an
H100, per clock:

- The tensor cores do 4096 multiply-adds of the whole weight by wgmma.sp.
- Shared memory moves 128 bytes, and what comes into it counts like what is read: everything comes in once,
  then each 64 rows of the weight are read once, with all of x again. A tile of ``rs`` brings in and reads x
  alone, for the weight goes from L2 to registers. (csrc/cuda/mainloop_sm90.cuh counts the same.)
- L2 gives at least 35 bytes: fast.cu's dense kernel of 192 x 192 tiles on 128 of 132 multiprocessors, without
  clusters, takes 42.7 at the tensor cores' peak and gets to 0.79 of it, 777 of 989 TFLOP/s at 8192^3
  (github.com/pranjalssh/fast.cu, matmul_6.cuh). In a cluster of two each block reads half of x.

A stage takes as long as the slowest of the three. The sums of a tile then leave at 32 bytes a clock. Splits
write their sums to L2, and the last to arrive reads all of them. Blocks stay for as many tiles as there are,
so that time comes in rounds of one tile, or one split of it, for every block.

Memory gives 13 bytes a clock to each of 132 multiprocessors (3.0 TB/s at 1.755 GHz), and no plan is done
before the weight has come from there. Of those that wait for it the tiles of sm90 come first, and of these
the one that leaves the multiprocessors most time to spare.

mma.sp gets 0.62 of a dense wgmma's 2048 multiply-adds here, whatever bounds it (NVIDIA/cutlass issue 1335:
its sm80 kernel took 74.2 us where a dense one took 45.7). So it is left with a few shapes that come out even
in its smaller tiles, and with calls that wgmma.sp cannot take.

The tiles of ``rs`` are not the rule's to choose, as they want a second copy of the values in memory;
``SPARSEOPS_IMPL`` may ask for them.

The dense expansion is not an outcome either. By the same count a dense product in tiles of 128 x 256 takes
2048 clocks for 128 columns, where wgmma.sp takes 1824. Only mma.sp could lose to it: to fill in the zeros
moves 4 bytes more for each weight, a third of a clock of a multiprocessor, and that is what mma.sp loses in
1000 tokens. Nothing to act on unmeasured: ``convert`` measures both where it is given inputs, and reports
which layers are left with mma.sp.
"""

from collections.abc import Iterator

from sparseops.ops.tiles import Plan, Product, Tile, ceil_div

_MULTIPLY_ADDS = 4096
_MULTIPLY_ADDS_BY_MMA = 0.62 * 2048
_SHARED_BYTES = 128
_L2_BYTES = 35
_STORED_BYTES = 32
_MEMORY_BYTES = 13
_MOST_SPLITS = 16
_LEAST_TOKENS_OF_CLUSTER = 64


def plans(product: Product, tile: Tile, multiprocessors: int) -> Iterator[Plan]:
    """The plans with a tile of sm90 among which to choose."""
    feature_tiles, token_tiles = _grid(product, tile)
    stages = _stages(product)
    paired = tile.tokens >= _LEAST_TOKENS_OF_CLUSTER and min(feature_tiles, multiprocessors) > 1
    for cluster in (1, 2) if paired else (1,):
        room = 2 * multiprocessors // (ceil_div(feature_tiles, cluster) * cluster * token_tiles)
        most = max(1, min(room, _MOST_SPLITS, stages))
        # as many stages to each, and none without
        for splits in sorted({ceil_div(stages, ceil_div(stages, n)) for n in range(1, most + 1)}):
            yield Plan(tile, splits, feature_tiles * token_tiles, cluster)


def cost(product: Product, plan: Plan, multiprocessors: int) -> tuple[float, bool, float]:
    """What is least for the plan to take."""
    busy = busy_clocks(product, plan, multiprocessors)
    return max(busy, memory_clocks(product, multiprocessors)), not plan.tile.is_sm90, busy


def memory_clocks(product: Product, multiprocessors: int) -> float:
    """How long an H100 takes to read the weight."""
    bits = product.rows * product.cols * (product.element_bits / 2 + 1)
    return bits / 8 / (_MEMORY_BYTES * multiprocessors)


def busy_clocks(product: Product, plan: Plan, multiprocessors: int) -> float:
    """How long the multiprocessors of an H100 are busy."""
    tile, (feature_tiles, token_tiles) = plan.tile, _grid(product, plan.tile)
    at_once = multiprocessors // plan.cluster
    clusters = ceil_div(feature_tiles, plan.cluster) * token_tiles
    rounds, rounds_of_tiles = ceil_div(clusters * plan.splits, at_once), ceil_div(clusters, at_once)
    elements = tile.features * tile.tokens
    clocks = rounds * ceil_div(_stages(product), plan.splits) * stage_clocks(tile, plan.cluster, product)
    if plan.splits > 1:
        clocks += (rounds + rounds_of_tiles * plan.splits) * elements * 4 / _L2_BYTES
    return clocks + rounds_of_tiles * elements * 2 / _STORED_BYTES


def stage_clocks(tile: Tile, cluster: int, product: Product) -> float:
    """How long a multiprocessor takes for one stage of a tile."""
    weight, x = tile.features * (128 + _stage_columns(product) // 8), tile.tokens * 256
    from_l2 = (weight + x / cluster) / _L2_BYTES
    multiply_adds = tile.features * tile.tokens * 128  # twice as many of 8 bits, in as many clocks
    if not tile.is_sm90:
        return max(multiply_adds / _MULTIPLY_ADDS_BY_MMA, from_l2)
    shared = x + tile.features // 64 * x + (0 if tile.from_registers else 2 * weight)
    return max(multiply_adds / _MULTIPLY_ADDS, shared / _SHARED_BYTES, from_l2)


def _stage_columns(product: Product) -> int:
    return 128 * 16 // product.element_bits


def _stages(product: Product) -> int:
    return ceil_div(product.cols, _stage_columns(product))


def _grid(product: Product, tile: Tile) -> tuple[int, int]:
    in_group = ceil_div(product.rows // product.groups, tile.features)
    return in_group * product.groups, ceil_div(product.tokens, tile.tokens)
