"""How a product is cut for the CUDA kernels: what the rule promises, the forced tile, and the workspace."""

from math import ceil

import pytest
import torch
from conftest import TILES
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseops import _native, env
from sparseops.ops import cuda, dispatch
from sparseops.ops.dispatch import MATRIX_TILES, MMA_TILES, WIDE_TILES, Plan, Product

A100, H100 = 108, 132


@pytest.fixture(autouse=True, scope="module")
def tiles():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "built_tiles", lambda: TILES)
        patch.setattr(_native, "impl", "auto")
        yield


products = st.builds(
    lambda tokens, rows, pitches, groups: Product(tokens, rows * groups, 32 * pitches, groups),
    st.one_of(st.integers(1, 200), st.integers(1, 10**6)),
    st.integers(1, 5000),
    st.integers(1, 2000),
    st.sampled_from([1, 1, 1, 2, 32]),
)


@given(
    products,
    st.integers(1, 200),
    st.sampled_from([MMA_TILES, WIDE_TILES, ("small",)]),
    st.sampled_from(["auto", *MMA_TILES]),
)
@settings(max_examples=300)
def test_every_plan(product, multiprocessors, allowed, forced):
    forced = forced if forced in allowed else "auto"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "impl", forced)
        plan = dispatch.plan("op", product, multiprocessors, allowed)
    tile, splits, tiles, cluster = plan
    assert cluster == 1
    assert tile is TILES[tile.name] and tile.name in allowed
    assert forced in ("auto", tile.name)
    if forced == "auto" and tile.name in ("few8", "few16"):
        assert product.tokens <= tile.tokens
    per_group = ceil(product.rows / product.groups / tile.features)
    assert tiles == per_group * product.groups * ceil(product.tokens / tile.tokens)
    assert 1 <= splits <= 16
    slabs = ceil(product.cols / 128)
    if splits > 1:
        assert tiles < multiprocessors and tiles * splits <= 2 * multiprocessors
        each = ceil(slabs / splits)
        assert (splits - 1) * each < slabs, "every split has columns"
        assert each * 128 >= 4 * 64, "and at least four steps"
        if tile.name in ("few8", "few16"):
            assert each >= 8, "a slab for each warp"
        assert plan.partials == tiles * splits * tile.features * tile.tokens
    else:
        assert plan.partials == 0


@pytest.mark.parametrize(
    ("tokens", "rows", "cols", "multiprocessors", "tile", "splits"),
    [
        # one token of a 4096 x 4096 layer: 128 blocks are enough for 108 multiprocessors, not for 132
        (1, 4096, 4096, A100, "few8", 1),
        (1, 4096, 4096, H100, "few8", 2),
        (8, 1024, 4096, A100, "few8", 4),
        (9, 4096, 4096, A100, "few16", 1),
        (16, 4096, 14336, A100, "few16", 1),
        (17, 4096, 4096, A100, "small", 3),
        (64, 4096, 4096, A100, "small", 3),
        (4096, 4096, 4096, A100, "large", 1),
        (1024, 4096, 4096, H100, "large", 1),
        # half of a large tile would be wasted
        (10**6, 64, 576, A100, "small", 1),
        (64, 11008, 4096, A100, "small", 1),
        # one tile, and few columns: splits of 256
        (20, 32, 1024, A100, "small", 4),
        (20, 32, 8192, A100, "small", 16),
        (20, 32, 32, A100, "small", 1),
    ],
)
def test_the_rule(tokens, rows, cols, multiprocessors, tile, splits):
    plan = dispatch.plan("op", Product(tokens, rows, cols), multiprocessors, MMA_TILES)
    assert (plan.tile.name, plan.splits) == (tile, splits)


def test_no_tile_for_few_tokens_where_it_is_not_allowed():
    assert dispatch.plan("op", Product(1, 4096, 4096), A100, WIDE_TILES).tile.name == "small"


def test_groups_do_not_share_tiles():
    plan = dispatch.plan("op", Product(64, 96, 512, groups=3), A100, ("small",))
    assert plan.tiles == 3


@pytest.mark.parametrize("impl", MMA_TILES)
def test_a_forced_tile(impl, monkeypatch):
    monkeypatch.setattr(_native, "impl", impl)
    for tokens in (1, 100):
        assert dispatch.plan("op", Product(tokens, 64, 64), A100, MMA_TILES).tile.name == impl
        assert dispatch.plan("op", Product(tokens, 64, 64), H100, MATRIX_TILES).tile.name == impl
    if impl not in WIDE_TILES:
        with pytest.raises(ValueError) as refused:
            dispatch.plan("nm24_conv", Product(1, 64, 64), A100, WIDE_TILES)
        assert str(refused.value) == (
            "nm24_conv: SPARSEOPS_IMPL must be auto, dense or one of small, large for this call, "
            f"got {impl!r}"
        )


def test_the_variable_names_the_tiles():
    assert env.IMPLS == ("auto", *MATRIX_TILES, "triton", "dense")


def test_the_built_module_has_the_tiles(monkeypatch):
    monkeypatch.undo()
    built = {name: tuple(sizes) for name, *sizes in _native.require("tests").cuda_tiles()}
    assert not built or list(built.items()) == [(name, tile[2:]) for name, tile in TILES.items()]


@pytest.mark.parametrize(
    ("tile", "consumers"), [("small", 1), ("sm90_128x8", 2), ("sm90_256x128", 2), ("sm90_192x192", 3)]
)
@pytest.mark.parametrize("splits", [1, 3])
def test_workspace(splits, tile, consumers):
    plan = Plan(TILES[tile], splits, 5)
    partials, counters = cuda.workspace(plan, torch.device("cpu"))
    if splits == 1:
        assert partials is None and counters is None
        return
    elements = TILES[tile].features * TILES[tile].tokens
    assert partials.dtype is torch.float32 and partials.numel() == 5 * 3 * elements
    assert counters.dtype is torch.int32 and counters.tolist() == [0] * 5 * consumers
