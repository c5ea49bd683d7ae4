"""The CUDA kernels for sm_90a from Python: every tile, splits, clusters, blocks that take several tiles.

On such a GPU, or on the CPU under SPARSEOPS_EMULATE=9.0 (``tests/test_emulated_ops.py`` runs this file so).
"""

import pytest
import torch
from conftest import (
    CASES,
    CONV,
    DTYPES,
    F8,
    GPU,
    INT8,
    LINEAR,
    PRODUCTS,
    RUNS_SM90,
    assert_gpu_result,
    byte_inputs,
    call_on_gpu,
    case_of,
    cut,
    every_half,
    linear_inputs,
    moved,
)

from sparseops import SparseLinear, _native
from sparseops.ops import cuda, derived, dispatch, registry
from sparseops.ops.common import make_bias, make_weight

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.usefixtures("whole_f32"),
    pytest.mark.skipif(not RUNS_SM90, reason="there is no GPU with wgmma.sp"),
]


# rows that end inside of a tile, and of a pair of them; blocks that take several tiles or splits
@pytest.mark.parametrize(("splits", "blocks"), [(1, 2), (3, 4), (6, 2)])
@pytest.mark.parametrize(
    ("tile", "tokens", "cluster", "dtype"),
    [
        ("sm90_128x8", 11, 1, torch.float16),
        ("sm90_128x16", 13, 1, torch.bfloat16),
        ("sm90_128x32", 40, 1, torch.float16),
        ("sm90_128x64", 70, 2, torch.bfloat16),
        ("sm90_128x128", 131, 1, torch.float16),
        ("sm90_128x128", 131, 2, torch.float16),
        ("sm90_128x256", 70, 2, torch.float16),
        ("sm90_256x128", 131, 1, torch.bfloat16),
        ("sm90_256x128", 131, 2, torch.float16),
        ("sm90_192x192", 195, 1, torch.float16),
        ("sm90_192x192", 100, 2, torch.bfloat16),
        ("sm90_rs_128x256", 70, 2, torch.float16),
        ("sm90_rs_256x128", 131, 1, torch.bfloat16),
    ],
)
def test_tiles_of_nm24_linear(tile, tokens, cluster, dtype, splits, blocks, monkeypatch):
    plans = cut(monkeypatch, tile, splits, cluster, blocks)
    args, kwargs = linear_inputs(264, tokens, dtype), {"activation": "gelu"}
    assert_gpu_result(LINEAR, call_on_gpu(LINEAR, args, kwargs), args, kwargs)
    assert [plan.tile.name for plan in plans] == [tile]


@pytest.mark.parametrize("op", [INT8, F8], ids=lambda op: op.name)
@pytest.mark.parametrize("out_dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("tile", "splits", "cluster"),
    [
        ("sm90_128x64", 1, 2),
        ("sm90_128x128", 3, 1),
        ("sm90_128x256", 2, 2),
        ("sm90_256x128", 1, 1),
        ("sm90_192x192", 3, 2),
    ],
)
def test_tiles_of_8_bit_products(tile, splits, cluster, out_dtype, op, monkeypatch):
    plans = cut(monkeypatch, tile, splits, cluster, 2)
    args = byte_inputs(264, 70, op.dtype, out_dtype)
    kwargs = {"out_dtype": out_dtype, "activation": "silu"}
    assert_gpu_result(op, call_on_gpu(op, args, kwargs), args, kwargs)
    assert len(plans) == 1


def test_rows_that_float8_cannot_have(monkeypatch, native):
    monkeypatch.setattr(registry, "_warned", set())
    args, kwargs = byte_inputs(260, 5, F8.dtype, torch.float16), {"out_dtype": torch.float16}
    native.taken()
    reason = "wgmma.sp needs rows of y of whole 16 bytes, got 260 of torch.float16"
    with pytest.warns(UserWarning, match=f"^nm24_linear_f8: {reason}; its plain torch reference runs"):
        assert_gpu_result(F8, call_on_gpu(F8, args, kwargs), args, kwargs)
    assert native.taken() == ["nm24_to_dense_cuda"]
    args, kwargs = byte_inputs(260, 5, F8.dtype, torch.float32), {"out_dtype": torch.float32}
    native.taken()
    assert_gpu_result(F8, call_on_gpu(F8, args, kwargs), args, kwargs)
    assert native.taken() == ["nm24_linear_cuda"]
    monkeypatch.setattr(_native, "impl", "small")
    with pytest.raises(
        ValueError, match="^nm24_linear_f8: SPARSEOPS_IMPL must be .* one of sm90_128x64, sm90"
    ):
        call_on_gpu(F8, args, kwargs)


@every_half
@pytest.mark.parametrize(
    ("tile", "channels", "splits", "cluster"),
    [
        ("sm90_128x64", 64, 1, 2),
        ("sm90_128x64", 128, 3, 1),
        ("sm90_128x128", 64, 5, 2),
        ("sm90_128x256", 128, 1, 1),
        ("sm90_256x128", 64, 1, 2),
        ("sm90_192x192", 64, 5, 1),
    ],
)
def test_tiles_of_nm24_conv(tile, channels, splits, cluster, dtype, monkeypatch):
    plans = cut(monkeypatch, tile, splits, cluster, 2)
    generator = torch.Generator().manual_seed(channels)
    weight = make_weight((136, channels, 3, 3), dtype, generator)
    x = torch.randn((2, channels, 9, 11), generator=generator).to(dtype)
    residual = torch.randn((2, 136, 9, 6), generator=generator).to(dtype)
    args = (x, weight.values, weight.meta, make_bias(136, dtype, generator), residual)
    kwargs = {"kernel_size": 3, "padding": 1, "stride": (1, 2), "activation": "relu"}
    assert_gpu_result(CONV, call_on_gpu(CONV, args, kwargs), args, kwargs)
    assert [plan.tile.name for plan in plans] == [tile]


def test_tiles_are_what_the_rule_takes(monkeypatch):
    plans, rule = [], dispatch.plan
    monkeypatch.setattr(dispatch, "plan", lambda *args: plans.append(rule(*args)) or plans[-1])
    for tokens in (70, 700):
        args = linear_inputs(264, tokens, torch.float16)
        assert_gpu_result(LINEAR, call_on_gpu(LINEAR, args, {}), args, {})
    generator = torch.Generator().manual_seed(0)
    weight = make_weight((264, 64, 3, 3), torch.float16, generator)
    args = (torch.randn((1, 64, 33, 100), generator=generator).half(), weight.values, weight.meta)
    kwargs = {"kernel_size": 3, "padding": 1}
    assert_gpu_result(CONV, call_on_gpu(CONV, args, kwargs), args, kwargs)
    assert [plan.tile.is_sm90 for plan in plans] == [True] * 3
    assert {plan.cluster for plan in plans} == {1, 2}


@pytest.mark.filterwarnings("ignore:.*plain torch reference")
@pytest.mark.parametrize(
    ("tile", "least"),
    [("sm90_128x8", 15), ("sm90_128x128", 25), ("sm90_192x192", 25), ("sm90_rs_128x256", 15)],
)
def test_tiles_in_every_case_that_can_take_them(tile, least, monkeypatch):
    taken, rule = [], dispatch.plan

    def plan(op, product, multiprocessors, allowed):
        monkeypatch.setattr(_native, "impl", tile if tile in allowed else "auto")
        taken.append(rule(op, product, multiprocessors, allowed).tile.name)
        return rule(op, product, multiprocessors, allowed)

    monkeypatch.setattr(dispatch, "plan", plan)
    for op, case in (case.values for case in CASES if case.values[0] in PRODUCTS):
        args, kwargs = case.make(torch.float16)
        assert_gpu_result(op, call_on_gpu(op, args, kwargs), args, kwargs)
    assert taken.count(tile) >= least


@pytest.mark.parametrize("impl", ["sm90_192x192", "sm90_256x128", "sm90_rs_128x256"])
def test_tiles_can_be_asked_for(impl, monkeypatch):
    monkeypatch.setattr(_native, "impl", impl)
    for tokens in (3, 200):
        args = linear_inputs(264, tokens, torch.float16)
        assert_gpu_result(LINEAR, call_on_gpu(LINEAR, args, {}), args, {})
    with pytest.raises(ValueError) as refused:
        args = linear_inputs(265, 3, torch.float16)
        call_on_gpu(LINEAR, args, {})
    assert str(refused.value) == (
        "nm24_linear: SPARSEOPS_IMPL must be auto, dense or one of few8, few16, small, large for this call, "
        f"got {impl!r}"
    )
    args, kwargs = case_of(CONV).make(torch.float16)
    with pytest.raises(ValueError, match="^nm24_conv: SPARSEOPS_IMPL must be auto, dense or one of small, l"):
        call_on_gpu(CONV, args, kwargs)


def test_fragments_are_made_once_and_again_when_the_weight_changes(monkeypatch):
    monkeypatch.setattr(_native, "impl", "sm90_rs_128x256")
    layer = SparseLinear(40, 24).half().to(GPU)
    fragments = derived._entries[layer.values][cuda.FRAGMENTS].tensor
    x = torch.randn(3, 40).half()
    with torch.no_grad():
        for _ in range(2):
            expected = layer.to_dense()(x.to(GPU))
            torch.testing.assert_close(layer(x.to(GPU)), expected, rtol=1e-2, atol=1e-2)
            assert derived._entries[layer.values][cuda.FRAGMENTS].tensor is fragments, "at the same address"
            layer.values.mul_(-2)
    layer(x.to(GPU)).sum().backward()
    assert derived._entries[layer.values][cuda.FRAGMENTS].stamp is None, "it may be trained"
    monkeypatch.setattr(_native, "impl", "auto")
    assert cuda.FRAGMENTS not in (derived._entries.get(SparseLinear(40, 24).half().to(GPU).values) or {})


def test_kernels_do_not_see_rows_that_overlap():
    args = list(linear_inputs(264, 9, torch.float16)[:3])
    args[0] = args[0].flatten().as_strided((5, 700), (16, 1))
    assert_gpu_result(LINEAR, call_on_gpu(LINEAR, args, {}), args, {})


class Told:
    """The built module, with a note of what products are told of their tile, splits, cluster and blocks."""

    FIRST = {"nm24_linear_cuda": 18, "nm24_conv_cuda": 27}

    def __init__(self, module):
        self.module, self.plans = module, []

    def __getattr__(self, name):
        kernel, first = getattr(self.module, name), self.FIRST.get(name)

        def call(*args):
            self.plans.append(args[first : first + 4])
            return kernel(*args)

        return call if first else kernel


@pytest.mark.parametrize("op", PRODUCTS, ids=lambda op: op.name)
def test_what_a_kernel_is_told(op, monkeypatch):
    if op is CONV:
        weight = make_weight((264, 64, 3, 3), torch.float16, torch.Generator().manual_seed(0))
        args, kwargs = (torch.ones(1, 64, 9, 9).half(), weight.values, weight.meta), {"kernel_size": 3}
    elif op is LINEAR:
        args, kwargs = linear_inputs(264, 70, torch.float16), {}
    else:
        args, kwargs = byte_inputs(264, 70, op.dtype, torch.float16), {"out_dtype": torch.float16}
    args = [moved(arg, GPU) for arg in args]
    told, products = Told(_native.C), []
    monkeypatch.setattr(_native, "C", told)
    (tile, splits, cluster), blocks = ("sm90_192x192", 2, 2), 6
    cut(monkeypatch, tile, splits, cluster, blocks)
    planned = dispatch.plan
    monkeypatch.setattr(dispatch, "plan", lambda *given: products.append(given[1]) or planned(*given))
    op.fn(*args, **kwargs)
    assert told.plans == [(dispatch.built_tiles()[tile].code, splits, cluster, blocks)]
    assert [product.element_bits for product in products] == [8 * args[0].element_size()]
