"""The ops by their Triton kernels: every case, in every dtype, and who is called when.

In Triton's interpreter, where ``test_in_the_interpreter`` runs this file in a process of its own, or on a GPU
under SPARSEOPS_IMPL=triton.
"""

import warnings

import pytest
import torch
from conftest import (
    DTYPES,
    Dispatched,
    assert_gpu_result,
    bits,
    case_of,
    host,
    layout,
    moved,
)
from triton_interpreter import run_tests

import sparseops
from sparseops import _native, triton
from sparseops.formats import NM24
from sparseops.formats.nm24 import pack_columns
from sparseops.ops import REGISTRY, cuda, nm24_linear, registry
from sparseops.ops.common import make_bias, make_weight
from sparseops.testing import assert_close, expect, expect_grads, grads

pytest.importorskip("triton", reason="Triton is not installed")

# where tensors lie that the kernels serve, None where none does
PLACE = "cpu" if _native.interpreted else "cuda" if torch.cuda.is_available() else None
by_triton = pytest.mark.skipif(
    _native.impl != "triton" or PLACE is None, reason="no kernel of Triton serves this process"
)
OPS = [op for name, op in REGISTRY.items() if name.startswith("nm24") and ("cuda", "triton") in op.impls]
LINEAR, COMPRESS, TO_DENSE, GRAD_VALUES = (
    REGISTRY[f"nm24_{name}"] for name in ("linear", "compress", "to_dense", "grad_values")
)
CASES = [pytest.param(op, case, id=f"{op.name}-{case.name}") for op in OPS for case in op.cases]
# Of test_ops.py what does not depend on how a kernel computes.
GENERIC = (
    "(test_opcheck or test_fake_tensors or test_stored_buffers or test_inference_mode or test_vmap_over or "
    "test_asking) and nm24 and not conv and not i8 and not f8 and not avx and not neon"
)


def call(op, args, kwargs):
    return op.fn(*(moved(arg, PLACE) for arg in args), **kwargs)


@pytest.mark.skipif(_native.interpreted, reason="this is the interpreter")
def test_in_the_interpreter():
    passed, said = run_tests("tests/test_triton_ops.py")
    assert passed > 250 and "2 skipped" in said


@pytest.mark.skipif(_native.interpreted, reason="this is the interpreter")
def test_generic_in_the_interpreter():
    passed, _ = run_tests("tests/test_ops.py", "-k", GENERIC)
    assert passed > 100


@by_triton
def test_there_are_such_ops():
    assert {op.name for op in OPS} == {"nm24_linear", "nm24_compress", "nm24_to_dense", "nm24_grad_values"}


@by_triton
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_forward(op, case, dtype):
    args, kwargs = case.make(dtype)
    assert op.supports(*(moved(arg, PLACE) for arg in args)) is None
    y = call(op, args, kwargs)
    assert_gpu_result(op, y, args, kwargs)
    if not isinstance(y, tuple):
        assert layout(y) == layout(op.fn(*(moved(arg, "meta") for arg in args), **kwargs))


@by_triton
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("op", "case"), [c for c in CASES if c.values[0].differentiable])
def test_gradients(op, case, dtype):
    args, kwargs = case.make(dtype)
    y = op.reference(*args, **kwargs)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = grads(op.fn, [moved(arg, PLACE) for arg in args], kwargs, cotangent.to(PLACE))
    for position, expected in expect_grads(op, args, kwargs, cotangent).items():
        assert_close(found[position].cpu(), expected)


@by_triton
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    ("tokens", "features", "rows"),
    # one more and one less than tiles, and several of them
    [(1, 700, 65), (15, 161, 63), (17, 33, 130), (129, 96, 70), (65, 385, 129)],
)
def test_tiles_of_nm24_linear(tokens, features, rows, dtype):
    generator = torch.Generator().manual_seed(tokens)
    weight = make_weight((rows, features), dtype, generator)
    x = torch.randn((tokens, features), generator=generator).to(dtype)
    residual = torch.randn((tokens, rows), generator=generator).to(dtype)
    args = (x, weight.values, weight.meta, make_bias(rows, dtype, generator), residual)
    assert_gpu_result(LINEAR, call(LINEAR, args, {"activation": "silu"}), args, {"activation": "silu"})


@by_triton
@pytest.mark.parametrize("tokens", [5, 70])
def test_f32_where_torch_allows_tf32(tokens):
    """Operands rounded to 10 bits give other results than whole ones, and near ones."""
    generator = torch.Generator().manual_seed(tokens)
    weight = make_weight((48, 200), torch.float32, generator)
    args = torch.randn((tokens, 200), generator=generator), weight.values, weight.meta
    whole = call(LINEAR, args, {})
    before = torch.get_float32_matmul_precision()
    try:
        for setting in ("high", "medium"):
            torch.set_float32_matmul_precision(setting)
            y = call(LINEAR, args, {})
            assert not torch.equal(host(y), host(whole))
            torch.testing.assert_close(host(y), host(whole), rtol=0, atol=1e-2)
            grad = torch.randn((tokens, 48), generator=generator)
            found = call(GRAD_VALUES, (grad, args[0], weight.meta), {})
            exact = GRAD_VALUES.reference(grad.double(), args[0].double(), weight.meta)
            torch.testing.assert_close(host(found).double(), exact, rtol=0, atol=0.1)
            assert (host(found) - exact).abs().max() > 1e-4
    finally:
        torch.set_float32_matmul_precision(before)


@by_triton
def test_one_rounding():
    """y of f16 is rounded once from the sum in f32, bias, residual and activation included."""
    weight = NM24.from_dense(torch.eye(64)[:32].half())
    x = torch.full((4, 64), 1.0).half()
    bias = torch.full((32,), 2.0**-11).half()
    residual = torch.full((4, 32), 2.0**-11).half()
    y = call(LINEAR, (x, weight.values, weight.meta, bias, residual), {})
    assert (host(y) == 1 + 2.0**-10).all()
    x, residual = torch.randn(40, 64).half(), torch.randn(40, 32).half()
    z = x[:, :32].double() + residual.double()
    for activation, plain in (("silu", torch.nn.functional.silu), ("gelu", torch.nn.functional.gelu)):
        y = call(LINEAR, (x, weight.values, weight.meta, None, residual), {"activation": activation})
        # float32 may fall on the other side of a tie, rarely
        assert (host(y) != plain(z).half()).double().mean() < 0.01


@by_triton
@pytest.mark.parametrize("activation", ["none", "relu", "silu", "gelu"])
def test_nan_stays(activation):
    weight = make_weight((40, 64), torch.float32, torch.Generator().manual_seed(0))
    x = torch.randn(3, 64)
    x[1, 5] = torch.nan
    y = host(call(LINEAR, (x, weight.values, weight.meta), {"activation": activation}))
    assert y[1].isnan().all() and y[[0, 2]].isfinite().all()


@by_triton
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_compress_is_exact_at_the_edges(dtype):
    """Every four of these, in every order: signed zeros, subnormal numbers, equal ones, NaN and infinity."""
    tiny = torch.finfo(dtype).smallest_normal / 4
    values = [0.0, -0.0, tiny, -tiny, 2 * tiny, 1.0, -1.0, torch.inf, -torch.inf, torch.nan]
    groups = torch.cartesian_prod(*[torch.tensor(values)] * 4).to(dtype)
    packed = groups.reshape(250, 160)
    for found, expected in zip(call(COMPRESS, (packed,), {}), COMPRESS.reference(packed), strict=True):
        assert torch.equal(bits(host(found)), bits(expected))


@by_triton
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_to_dense_moves_every_bit(dtype):
    from sparseops.triton.nm24_to_dense import to_dense

    weight = make_weight((70, 160), torch.float32, torch.Generator().manual_seed(0))
    limits = torch.iinfo(dtype)
    values = torch.randint(limits.min, limits.max, weight.values.shape).to(dtype)
    found = to_dense(values.to(PLACE), weight.meta.to(PLACE))
    assert torch.equal(found.cpu(), TO_DENSE.reference(values, weight.meta))


@by_triton
def test_the_harness_sees_a_wrong_result():
    args, kwargs = case_of(LINEAR).make(torch.float16)
    y = host(call(LINEAR, args, kwargs))
    y[3, 4] += 0.1
    with pytest.raises(AssertionError, match="1 of 133 elements are off"):
        assert_close(y, expect(LINEAR, args, kwargs))


@by_triton
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_f64_is_the_reference_and_said(op, monkeypatch):
    monkeypatch.setattr(registry, "_warned", set())
    args, kwargs = case_of(op).make(torch.float64)
    with pytest.warns(
        UserWarning, match=f"^{op.name}: there is no Triton kernel for torch.float64; its plain"
    ):
        call(op, args, kwargs)


@by_triton
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_dispatcher_serves_what_watches(op):
    args, kwargs = case_of(op).make(torch.float16)
    there = [moved(arg, PLACE) for arg in args]
    with Dispatched() as record:
        watched = op.fn(*there, **kwargs)
    assert [overload for overload, _ in record.calls] == [getattr(torch.ops.sparseops, op.name).default]
    for y, again in zip(
        *(y if isinstance(y, tuple) else (y,) for y in (watched, op.fn(*there, **kwargs))), strict=True
    ):
        assert torch.equal(y, again)


@by_triton
def test_a_layer_and_a_weight(monkeypatch):
    monkeypatch.setattr(registry, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = sparseops.SparseLinear(40, 24).to(PLACE)
        assert layer.kernel.startswith("triton, expanded in registers")
        assert layer.kernel_note is None
        assert sparseops.nn.SparseLSTM(40, 32).to(PLACE).kernel == layer.kernel
        x = torch.randn(3, 40, device=PLACE)
        torch.testing.assert_close(layer(x), layer.to_dense()(x))
        layer(x).sum().backward()
    w = torch.randn(40, 20, 3, 3).half()
    there = NM24.from_dense(w.to(PLACE), prune="magnitude")
    values, meta = COMPRESS.reference(pack_columns(w))
    assert torch.equal(there.values.cpu(), values) and torch.equal(there.meta.cpu(), meta)


@pytest.mark.skipif(not _native.interpreted, reason="this is not the interpreter")
def test_the_cpu_stands_for_a_gpu():
    x = torch.empty(2, 32)
    assert triton.serves(x) and triton.no_triton_reason(x) is None
    assert cuda.no_device_reason(x) == cuda.INTERPRETED_REASON
    assert REGISTRY["nm24_conv"].supports(x) == cuda.INTERPRETED_REASON
    assert not registry.FAST
    with pytest.raises(ValueError, match="x must have"):
        nm24_linear(x, torch.empty(4, 48), torch.zeros(4, 12, dtype=torch.uint8))
