"""What ``triton_interpreter`` makes of the interpreter: bfloat16 and TF32 as on a GPU, and bugs that it sees.

``test_in_the_interpreter`` runs this file in a process of its own.
"""

import numpy as np
import pytest
import torch
from triton_interpreter import Access, as_tf32, narrowed, run_tests, widened

from sparseops import _native

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = triton.language

interpreted = pytest.mark.skipif(not _native.interpreted, reason="this is not the interpreter")


@pytest.mark.skipif(_native.interpreted, reason="this is the interpreter")
def test_in_the_interpreter():
    passed, said = run_tests("tests/test_triton_interpreter.py")
    assert passed > 20 and "1 skipped" in said


# ---- numbers


def bits_of(values):
    return torch.tensor(values, dtype=torch.float32).bfloat16().view(torch.int16).numpy().view(np.uint16)


EDGES = [0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-9, 3e38, 3.4e38, -3.4e38, 1e-39, 1e-45, 65536.0]
EDGES += [float("inf"), -float("inf"), float("nan")]


def test_bfloat16_rounds_as_torch_does():
    values = np.array(EDGES, np.float32)
    assert np.array_equal(narrowed(values)[:-1], bits_of(EDGES)[:-1])
    assert np.isnan(widened(narrowed(values))[-1])
    every = np.arange(2**16, dtype=np.uint16)
    wide = torch.from_numpy(every.view(np.int16).copy()).view(torch.bfloat16).float().numpy()
    assert np.array_equal(widened(every), wide, equal_nan=True)


def test_tf32_has_ten_bits():
    values = np.array([1 + 2**-10, 1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-12, np.inf, -np.inf], np.float32)
    assert as_tf32(values).tolist() == [1 + 2**-10, 1, 1 + 2**-9, 1, np.inf, -np.inf]
    assert np.isnan(as_tf32(np.array([np.nan], np.float32)))


@triton.jit
def arithmetic_kernel(a_ptr, b_ptr, out_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(a_ptr + i, mask=i < n, other=0.0)
    b = tl.load(b_ptr + i, mask=i < n, other=0.0)
    tl.store(out_ptr + i, a + b, mask=i < n)
    tl.store(out_ptr + n + i, a * b, mask=i < n)
    tl.store(out_ptr + 2 * n + i, tl.where(a > b, a, b), mask=i < n)
    tl.store(out_ptr + 3 * n + i, (a.to(tl.float32) * 1.001).to(out_ptr.dtype.element_ty), mask=i < n)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_arithmetic(dtype):
    a, b = torch.randn(2, 50).to(dtype)
    out = torch.empty(200, dtype=dtype)
    arithmetic_kernel[(1,)](a, b, out, 50, N=64)
    expected = torch.cat([a + b, a * b, torch.maximum(a, b), (a.float() * 1.001).to(dtype)])
    assert torch.equal(out, expected)


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, k, PRECISION: tl.constexpr, N: tl.constexpr, BK: tl.constexpr):
    i = tl.arange(0, N)
    j = tl.arange(0, BK)
    sums = tl.zeros((N, N), tl.float32)
    for first in range(0, k, BK):
        at = first + j
        a = tl.load(a_ptr + i[:, None] * k + at[None, :], mask=(at < k)[None, :], other=0.0)
        b = tl.load(b_ptr + i[None, :] * k + at[:, None], mask=(at < k)[:, None], other=0.0)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
    tl.store(out_ptr + i[:, None] * N + i[None, :], sums)


def product(a, b, precision="ieee"):
    out = torch.empty(16, 16)
    product_kernel[(1,)](a, b, out, a.shape[1], PRECISION=precision, N=16, BK=16)
    return out


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_products(dtype):
    """In a loop of a length that only the launch knows."""
    a, b = torch.randn(2, 16, 40).to(dtype)
    torch.testing.assert_close(product(a, b), a.float() @ b.float().t(), rtol=1e-5, atol=1e-5)


@interpreted
def test_products_in_tf32():
    a, b = torch.randn(2, 16, 40)
    exact = a.double() @ b.double().t()
    assert 1e-4 < (product(a, b, "tf32") - exact).abs().max() < 1e-2
    assert (product(a, b) - exact).abs().max() < 1e-5


@triton.jit
def erf_kernel(x_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(x_ptr + i, tl.math.erf(tl.load(x_ptr + i)))


@interpreted
def test_erf():
    x = torch.randn(64)
    expected = torch.erf(x)
    erf_kernel[(1,)](x, N=64)
    assert torch.equal(x, expected)


@triton.jit
def extremes_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, tl.maximum(x, 0.0))
    tl.store(out_ptr + N + i, tl.minimum(x, 0.0))
    tl.store(out_ptr + 2 * N + i, tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL))


@interpreted
def test_nan_is_passed_over():
    out = torch.empty(6)
    extremes_kernel[(1,)](torch.tensor([torch.nan, -1.0]), out, N=2)
    assert out[[0, 1, 2, 3, 5]].tolist() == [0, 0, 0, -1, 0] and out[4].isnan()


# ---- accesses


@triton.jit
def copy_kernel(
    x_ptr, y_ptr, n, STEP: tl.constexpr, LOAD: tl.constexpr, STORE: tl.constexpr, B: tl.constexpr
):
    """Blocks of B, STEP apart; LOAD and STORE are how far masks go beyond the end."""
    i = tl.program_id(0) * STEP + tl.arange(0, B)
    x = tl.load(x_ptr + i, mask=i < n + LOAD, other=0.0)
    tl.store(y_ptr + i, x, mask=i < n + STORE)


@triton.jit
def no_other_kernel(x_ptr, y_ptr, n, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def histogram_kernel(x_ptr, counts_ptr, n, SHIFT: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.atomic_add(counts_ptr + SHIFT + tl.load(x_ptr + i, mask=i < n, other=0), 1, mask=i < n)


def copy(n=40, *, step=16, load=0, store=0, room=0):
    x, y = torch.randn(n), torch.full((n + room,), 7.0)
    copy_kernel[(3,)](x, y, n, STEP=step, LOAD=load, STORE=store, B=16)
    assert torch.equal(y[:n], x)
    return y


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_a_right_kernel_is_let_through(dtype):
    copy()
    x, y = torch.arange(40).to(dtype), torch.empty(40, dtype=dtype)
    copy_kernel[(3,)](x, y, 40, STEP=16, LOAD=0, STORE=0, B=16)
    assert torch.equal(x, y)


@interpreted
@pytest.mark.parametrize(
    ("bug", "said"),
    [
        ({"load": 1}, r"program \(2, 0, 0\) loads outside of every tensor, 1 of 9 addresses"),
        ({"load": 8}, r"loads outside of every tensor, 8 of 16"),
        ({"store": 1}, r"program \(2, 0, 0\) stores outside of every tensor, 1 of 9"),
        ({"step": 12}, r"programs \(0, 0, 0\) and \(1, 0, 0\) store to one address \(8 such\)"),
    ],
    ids=str,
)
def test_a_wrong_access_is_seen(bug, said):
    with pytest.raises(Exception, match=said):
        copy(**bug)


@interpreted
def test_a_view_is_the_memory_that_it_spans():
    storage = torch.zeros(100)
    x, y = torch.randn(20), storage[30:50]
    copy_kernel[(2,)](x, y, 20, STEP=16, LOAD=0, STORE=0, B=16)
    assert torch.equal(y, x) and storage.count_nonzero() == 20
    with pytest.raises(Exception, match="stores outside"):
        copy_kernel[(2,)](x, y, 20, STEP=16, LOAD=0, STORE=1, B=16)
    assert torch.equal(storage[50:], torch.zeros(50)), "refused before it is done"


@interpreted
def test_what_one_launch_may_touch_the_next_may_not():
    x, y = torch.randn(16), torch.empty(16)
    copy_kernel[(1,)](x, y, 16, STEP=16, LOAD=0, STORE=0, B=16)
    with pytest.raises(Exception, match="stores outside"):
        copy_kernel[(1,)](x, y[:8], 16, STEP=16, LOAD=0, STORE=0, B=16)


@interpreted
def test_a_masked_load_says_what_it_takes_instead():
    x, y = torch.randn(2, 10)
    no_other_kernel[(1,)](torch.randn(16), torch.empty(16), 16, B=16)
    with pytest.raises(Exception, match="loads with a mask and no `other`"):
        no_other_kernel[(1,)](x, y, 10, B=16)


@interpreted
def test_atomic_updates_may_meet():
    x, counts = torch.randint(0, 4, (40,), dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    histogram_kernel[(3,)](x, counts, 40, SHIFT=0, B=16)
    assert torch.equal(counts, torch.bincount(x, minlength=4).int())
    with pytest.raises(Exception, match="updates outside of every tensor"):
        histogram_kernel[(3,)](x, counts, 40, SHIFT=4, B=16)


@interpreted
def test_programs_may_store_what_they_stored_before():
    x, y = torch.randn(16), torch.empty(16)
    for _ in range(2):
        copy_kernel[(1,)](x, y, 16, STEP=16, LOAD=0, STORE=0, B=16)
    with pytest.raises(Access, match="store to one address"):
        copy_kernel[(2,)](x, y, 16, STEP=0, LOAD=0, STORE=0, B=16)
