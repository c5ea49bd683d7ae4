"""The rule for GPUs of compute capability 9.0: plans that the kernels take, and the model that chooses."""

from math import ceil

import pytest
from conftest import TILES
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseops import _native
from sparseops.ops import dispatch, dispatch_sm90
from sparseops.ops.dispatch import (
    BYTE_TILES,
    CONV_TILES,
    MATRIX_TILES,
    MMA_TILES,
    SM90_RS_TILES,
    Plan,
    Product,
)

H100 = 132


@pytest.fixture(autouse=True, scope="module")
def tiles():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "built_tiles", lambda: TILES)
        patch.setattr(_native, "impl", "auto")
        yield


products = st.builds(
    lambda tokens, rows, pitches, bits: Product(tokens, rows, 32 * pitches, element_bits=bits),
    st.one_of(st.integers(1, 300), st.integers(1, 10**6)),
    st.integers(1, 50000),
    st.integers(1, 2000),
    st.sampled_from([16, 16, 8]),
)


@given(products, st.integers(1, 200), st.sampled_from(["auto", *MATRIX_TILES]))
@settings(max_examples=300)
def test_every_plan(product, multiprocessors, forced):
    allowed = MATRIX_TILES if product.element_bits == 16 else BYTE_TILES
    forced = forced if forced in allowed else "auto"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "impl", forced)
        plan = dispatch.plan("op", product, multiprocessors, allowed)
    tile, splits, tiles, cluster = plan
    assert tile is TILES[tile.name] and tile.name in allowed
    if forced == "auto":
        assert tile.name not in SM90_RS_TILES
    else:
        assert tile.name == forced
    assert tiles == ceil(product.rows / tile.features) * ceil(product.tokens / tile.tokens)
    if not tile.is_sm90:
        assert cluster == 1
        return
    # what csrc/cuda/launch_sm90.cuh refuses
    stages = ceil(product.cols / (128 if product.element_bits == 16 else 256))
    assert 1 <= splits <= stages and ceil(stages / ceil(stages / splits)) == splits
    assert cluster in (1, 2) and cluster <= multiprocessors
    if cluster == 2:
        assert tile.tokens >= 64 and product.rows > tile.features, "and the second block has something to do"
    assert splits <= 16
    if splits > 1:
        assert tiles * splits <= 2 * multiprocessors


@given(products, st.integers(1, 200))
def test_plans_to_choose_among(product, multiprocessors):
    stages = ceil(product.cols / (128 if product.element_bits == 16 else 256))
    for tile in TILES.values():
        if tile.is_sm90:
            plans = list(dispatch_sm90.plans(product, tile, multiprocessors))
            assert plans[0][1:] == (1, plans[0].tiles, 1) and len(set(plans)) == len(plans)
            assert all(ceil(stages / ceil(stages / plan.splits)) == plan.splits for plan in plans)


@pytest.mark.parametrize(
    ("tokens", "rows", "cols", "tile", "splits", "cluster"),
    [
        # few tokens: the narrowest tile, and as many splits as keep all 132 multiprocessors reading
        (1, 3584, 3584, "sm90_128x8", 4, 1),
        (8, 4096, 4096, "sm90_128x8", 4, 1),
        (9, 4096, 4096, "sm90_128x16", 4, 1),
        (16, 3584, 18944, "sm90_128x16", 9, 1),
        # few8 would be done a little sooner, if the weight came any sooner
        (1, 37888, 3584, "sm90_128x8", 1, 1),
        (16, 8192, 8192, "sm90_128x16", 2, 1),
        (64, 3584, 3584, "sm90_128x64", 4, 2),
        (128, 3584, 3584, "sm90_128x64", 2, 2),
        (128, 8192, 8192, "sm90_128x128", 2, 2),
        (256, 8192, 8192, "sm90_128x128", 1, 2),
        (1024, 3584, 3584, "sm90_128x256", 1, 2),
        (8192, 8192, 8192, "sm90_128x256", 1, 2),
        # ends of tiles and rounds decide
        (8192, 37888, 3584, "sm90_192x192", 1, 2),
        # one tile of features has nobody to share with
        (10**5, 64, 576, "sm90_128x256", 1, 1),
        # too little to do for tiles of 128 features
        (1, 264, 704, "few8", 1, 1),
    ],
)
def test_the_rule(tokens, rows, cols, tile, splits, cluster):
    plan = dispatch.plan("op", Product(tokens, rows, cols), H100, MATRIX_TILES)
    assert (plan.tile.name, plan.splits, plan.cluster) == (tile, splits, cluster)


@pytest.mark.parametrize(
    ("tile", "cluster", "bits", "clocks"),
    [
        # tensor cores 1024; shared memory (2 * 18432 + 65536 + 2 * 65536) / 128; L2 (18432 + 32768) / 35
        ("sm90_128x256", 2, 16, 1824),
        ("sm90_128x256", 1, 16, 83968 / 35),
        ("sm90_256x128", 2, 16, 1856),
        ("sm90_192x192", 2, 16, 1968),
        # x alone: 65536 + 2 * 65536, and of 128 tokens 32768 + 4 * 32768
        ("sm90_rs_128x256", 2, 16, 1536),
        ("sm90_rs_256x128", 2, 16, (36864 + 16384) / 35),
        ("sm90_128x8", 1, 16, 20480 / 35),
        # twice the metadata
        ("sm90_128x256", 2, 8, (2 * 20480 + 3 * 65536) / 128),
        ("sm90_128x64", 1, 8, (20480 + 16384) / 35),
        # 0.62 of 2048 multiply-adds
        ("large", 1, 16, 128**3 / (0.62 * 2048)),
        ("few8", 1, 16, (32 * 144 + 8 * 256) / 35),
    ],
)
def test_clocks_of_a_stage(tile, cluster, bits, clocks):
    found = dispatch_sm90.stage_clocks(TILES[tile], cluster, Product(1, 1, 128, element_bits=bits))
    assert found == pytest.approx(clocks)


def test_the_tensor_cores_are_not_outdone(monkeypatch):
    for resource in ("_SHARED_BYTES", "_L2_BYTES"):
        monkeypatch.setattr(dispatch_sm90, resource, 10**6)
    for tile in TILES.values():
        if tile.is_sm90:
            clocks = dispatch_sm90.stage_clocks(tile, 1, Product(1, 1, 128))
            assert clocks == tile.features * tile.tokens * 128 / 4096


def test_clocks_of_a_plan():
    tile, stage = TILES["sm90_128x64"], 26624 / 35
    product = Product(64, 5 * 128, 1280)

    def busy(splits, cluster, multiprocessors):
        return dispatch_sm90.busy_clocks(product, Plan(tile, splits, 5, cluster), multiprocessors)

    out, sums = 128 * 64 * 2 / 32, 128 * 64 * 4 / 35
    assert busy(1, 2, 6) == pytest.approx(10 * stage + out), "the third pair has one block with nothing to do"
    assert busy(1, 2, 5) == pytest.approx(2 * (10 * stage + out)), "an odd block is left over"
    assert busy(5, 2, 30) == pytest.approx(2 * stage + out + (1 + 5) * sums)
    assert busy(5, 2, 20) == pytest.approx(2 * 2 * stage + out + (2 + 5) * sums)


def test_memory():
    assert dispatch_sm90.memory_clocks(Product(1, 1000, 3200), H100) == 3_200_000 * 1.125 / (13 * 132)
    assert dispatch_sm90.memory_clocks(Product(1, 1000, 3200, element_bits=8), H100) == (
        3_200_000 * 0.625 / (13 * 132)
    )


def test_mma_where_sm90_is_not_allowed_goes_by_the_other_rule():
    for product in (Product(1, 4096, 4096), Product(100, 4096, 4096), Product(64, 96, 512, groups=3)):
        plan = dispatch.plan("op", product, H100, MMA_TILES)
        assert plan == dispatch._split(product, TILES[plan.tile.name], H100)
    assert dispatch.plan("op", Product(1, 4096, 4096), H100, MMA_TILES).tile.name == "few8"


@pytest.mark.parametrize("impl", [name for name in MATRIX_TILES if name not in MMA_TILES])
def test_a_forced_tile(impl, monkeypatch):
    monkeypatch.setattr(_native, "impl", impl)
    for tokens in (1, 1000):
        assert dispatch.plan("op", Product(tokens, 512, 640), H100, MATRIX_TILES).tile.name == impl
    with pytest.raises(ValueError) as refused:
        dispatch.plan("nm24_linear", Product(1, 64, 64), H100, MMA_TILES)
    assert str(refused.value) == (
        "nm24_linear: SPARSEOPS_IMPL must be auto, dense or one of few8, few16, small, large for this call, "
        f"got {impl!r}"
    )


def test_which_tiles_an_op_has():
    wide = ("sm90_128x64", "sm90_128x128", "sm90_128x256", "sm90_256x128", "sm90_192x192")
    assert MATRIX_TILES == tuple(TILES), "in the order of csrc/ops.h"
    assert BYTE_TILES == CONV_TILES == ("small", "large", *wide)
    assert {name for name, tile in TILES.items() if tile.from_registers} == set(SM90_RS_TILES)
