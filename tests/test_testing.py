"""The tolerance rule must reject what a kernel can get wrong, and accept another order of summation."""

import dataclasses
import math

import pytest
import torch

from sparseops.ops import REGISTRY
from sparseops.ops.common import make_weight
from sparseops.testing import Expected, assert_close, expect, expect_grads, grads

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LINEAR = REGISTRY["nm24_linear"]


def make(dtype, tokens=256, in_features=512, out_features=256, activation="none"):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, in_features, generator=generator).to(dtype)
    weight = make_weight((out_features, in_features), dtype, generator)
    args, kwargs = (x, weight.values, weight.meta, None), {"activation": activation}
    return args, kwargs, expect(LINEAR, args, kwargs)


@pytest.fixture(params=DTYPES, ids=str, scope="module")
def expected(request):
    return make(request.param)[2]


def test_accepts_plain_torch(expected):
    assert_close(expected.plain, expected)


@pytest.mark.parametrize("activation", ["none", "relu", "silu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accepts_another_order_of_summation(dtype, activation):
    (x, values, meta, _), kwargs, expected = make(dtype, activation=activation)
    order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(2))
    weight = LINEAR.reference(torch.eye(x.shape[1]), values.float(), meta).t()
    z = torch.zeros(x.shape[0], weight.shape[0])
    for column in order:
        z += x[:, column, None].float() * weight[:, column]
    activate = {"relu": torch.relu, "silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}
    assert_close(activate.get(activation, lambda z: z)(z).to(dtype), expected)


def test_float8_may_be_summed_in_fewer_bits():
    op = REGISTRY["nm24_linear_f8"]
    args, kwargs = next(case for case in op.cases if case.name == "gt_tile").make(torch.float32)
    expected = expect(op, args, kwargs)
    for part, fits in ((4.0, True), (20.0, False)):
        y = (expected.exact + expected.summed * part * 2.0**-14).float()
        for rule, accepts in ((expected, fits), (dataclasses.replace(expected, sum_eps=None), False)):
            if accepts:
                assert_close(y, rule)
            else:
                with pytest.raises(AssertionError, match="elements are off"):
                    assert_close(y, rule)


def test_rejects_a_zeroed_tile(expected):
    y = expected.plain.clone()
    y[64:80, 32:48] = 0
    with pytest.raises(AssertionError, match=r"of 65536 elements are off, all within \[64-79, 32-47\]"):
        assert_close(y, expected)


def test_rejects_a_tile_of_its_neighbour(expected):
    y = expected.plain.clone()
    y[64:80, 32:48] = y[64:80, 48:64].clone()
    with pytest.raises(AssertionError, match=r"all within \[64-79, 32-47\]"):
        assert_close(y, expected)


def test_rejects_a_zeroed_row(expected):
    y = expected.plain.clone()
    y[255] = 0
    with pytest.raises(AssertionError, match=r"all within \[255-255, 0-255\]"):
        assert_close(y, expected)


def test_rejects_one_element_2_percent_off(expected):
    y = expected.plain.clone()
    at = (expected.exact.abs() - 1).abs().argmin()
    y.view(-1)[at] *= 1.02
    with pytest.raises(AssertionError, match="1 of 65536 elements are off"):
        assert_close(y, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rejects_one_missing_product(dtype):
    (x, values, meta, _), _, expected = make(dtype)
    weight = LINEAR.reference(torch.eye(x.shape[1]), values.float(), meta).t()
    missing = x[3].float() * weight[7]
    y = expected.plain.clone()
    y[3, 7] -= missing[missing.abs().argmax()].to(dtype)
    with pytest.raises(AssertionError, match=r"1 of 65536 elements are off.* \(3, 7\)"):
        assert_close(y, expected)


def test_rejects_f16_accumulation():
    (x, values, meta, _), _, expected = make(torch.float16)
    weight = LINEAR.reference(torch.eye(x.shape[1]), values.float(), meta).t().half()
    y = torch.zeros_like(expected.plain)
    for column in range(x.shape[1]):
        y += x[:, column, None] * weight[:, column]
    with pytest.raises(AssertionError, match="elements are off"):
        assert_close(y, expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rejects_one_element_not_finite(expected, value):
    y = expected.plain.clone()
    y[200, 100] = value
    with pytest.raises(AssertionError, match=r"1 of 65536 elements are off.*\(200, 100\)"):
        assert_close(y, expected)


def test_nan_and_infinity_must_be_where_they_belong():
    exact = torch.tensor([1.0, math.nan, 1e30, -1e30]).double()
    plain = exact.half()
    expected = Expected(exact, plain, exact.abs(), exact.abs())
    assert_close(torch.tensor([1.0, math.nan, math.inf, -math.inf]).half(), expected)
    for wrong in (
        [1.0, 0.0, math.inf, -math.inf],
        [1.0, math.nan, -math.inf, -math.inf],
        [1, math.nan, 6e4, -6e4],
    ):
        with pytest.raises(AssertionError, match="elements are off"):
            assert_close(torch.tensor(wrong).half(), expected)


def test_rejects_another_shape_and_dtype(expected):
    with pytest.raises(AssertionError, match="actual must have shape"):
        assert_close(expected.plain[:-1], expected)
    with pytest.raises(AssertionError, match="actual must have shape"):
        assert_close(expected.plain.double(), expected)


def test_refuses_a_bad_yardstick(expected):
    with pytest.raises(ValueError, match="plain must be within 32 units of exact"):
        assert_close(expected.plain, dataclasses.replace(expected, plain=expected.plain * 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rejects_a_wrong_gradient(dtype):
    args, kwargs, expected = make(dtype, tokens=40, in_features=64, out_features=48, activation="silu")
    cotangent = torch.randn_like(expected.plain)
    judged = expect_grads(LINEAR, args, kwargs, cotangent)
    found = grads(LINEAR.reference, args, kwargs, cotangent)
    assert set(judged) == set(found) == {0, 1}
    for position, grad in found.items():
        assert_close(grad, judged[position])
        with pytest.raises(AssertionError, match="elements are off"):
            assert_close(grad.roll(1, 0), judged[position])


def test_new_memory_is_poisoned():
    assert torch.zeros(3).new_empty(2, 5).isnan().all()
    assert torch.zeros(3).new_empty((2, 5)).isnan().all()
    assert torch.empty((1, 4, 2, 2), memory_format=torch.channels_last).isnan().all()
