"""The fast path: it gives what the dispatcher gives, it is taken, and it steps aside for all that watches."""

import warnings
from collections.abc import Callable

import pytest
import torch
from conftest import (
    LAYERS,
    Dispatched,
    Wrapper,
    case_of,
    every_case,
    every_dtype,
    every_layer,
    is_same,
    layout,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from sparseops.ops import REGISTRY, registry


@pytest.fixture
def fast_calls(monkeypatch):
    """What the fast-path guard answered, call by call."""
    answers = []
    guard = registry.fast

    def spy(*args):
        answers.append(guard(*args))
        return answers[-1]

    monkeypatch.setattr(registry, "fast", spy)
    return answers


@pytest.fixture
def no_fast_path(monkeypatch):
    monkeypatch.setattr(registry, "FAST", False)


@every_dtype
@every_case
def test_fast_path_and_dispatcher_agree(op, case, dtype, fast_calls, monkeypatch):
    args, kwargs = case.make(dtype)
    fast = op.fn(*args, **kwargs)
    assert fast_calls in ([], [case.name != "negated"])
    monkeypatch.setattr(registry, "FAST", False)
    slow = op.fn(*args, **kwargs)
    assert is_same(fast, slow)
    assert layout(fast) == layout(slow)


@every_layer
def test_jit_trace_records_the_op(op):
    args, kwargs = case_of(op).make(torch.float32)
    layer = Wrapper(op, args, kwargs).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(layer, args[0])
    other = args[0] * -2 + 1
    torch.testing.assert_close(traced(other), layer(other))


@every_layer
def test_fast_path_is_taken(op, fast_calls):
    args, kwargs = case_of(op).make(torch.float32)
    op.fn(*args, **kwargs)
    layer = Wrapper(op, args, kwargs)
    with torch.no_grad():
        layer(args[0])
    assert fast_calls == [True, True]


class Subclass(torch.Tensor):
    pass


class SeenFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


@every_layer
def test_fast_path_steps_aside(op, fast_calls):
    given, kwargs = case_of(op).make(torch.float32)
    x, *rest = given
    y = op.fn(x, *rest, **kwargs)
    assert fast_calls.pop() is True

    def same(call: Callable[[], torch.Tensor]) -> torch.Tensor:
        result = call()
        assert fast_calls.pop() is False
        assert torch.equal(torch.Tensor(result.detach()), y)
        return result

    for position in (i for i, arg in enumerate(given) if arg.is_floating_point()):
        args = list(given)
        args[position] = args[position].clone().requires_grad_()
        assert same(lambda args=args: op.fn(*args, **kwargs)).requires_grad
        args[position] = torch._neg_view(-args[position].detach())
        same(lambda args=args: op.fn(*args, **kwargs))
        args[position] = torch.nn.Parameter(args[position], requires_grad=False)
        same(lambda args=args: op.fn(*args, **kwargs))
    for position in range(len(given)):
        args = list(given)
        args[position] = args[position].as_subclass(Subclass)
        assert type(same(lambda args=args: op.fn(*args, **kwargs))) is Subclass
    with Dispatched() as record:
        same(lambda: op.fn(x, *rest, **kwargs))
    assert len(record.calls) == 1
    with SeenFunctions() as seen:
        same(lambda: op.fn(x, *rest, **kwargs))
    assert any(op.name in name for name in seen.names)
    with FlopCounterMode(display=False):
        same(lambda: op.fn(x, *rest, **kwargs))
    graph = make_fx(lambda x: op.fn(x, *rest, **kwargs))(x)
    assert fast_calls.pop() is False
    assert f"sparseops.{op.name}" in graph.code


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@every_layer
def test_transforms_that_autograd_does_not_serve_run_the_reference(op, monkeypatch):
    monkeypatch.setattr(registry, "_warned", set())
    (x, *rest), kwargs = case_of(op, "gelu").make(torch.float32)

    def total(fn):
        return lambda x: fn(x, *rest, **kwargs).square().sum()

    def tangent(fn):
        return torch.func.jvp(lambda x: fn(x, *rest, **kwargs), (x,), (torch.ones_like(x),))[1]

    with pytest.warns(UserWarning, match=f"^{op.name}: there is no kernel for the derivatives of torch.func"):
        found = torch.func.grad(total(op.fn))(x)
    torch.testing.assert_close(found, torch.func.grad(total(op.reference))(x))
    each = torch.stack([x, -x])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*plain torch reference")
        found = torch.vmap(torch.func.grad(total(op.fn)))(each)
        torch.testing.assert_close(found[1], torch.func.grad(total(op.reference))(-x))
        found = torch.func.grad(lambda each: torch.vmap(total(op.fn))(each).sum())(each)
        torch.testing.assert_close(found[1], torch.func.grad(total(op.reference))(-x))
    with pytest.warns(UserWarning, match=f"^{op.name}: there is no forward-mode derivative"):
        found = tangent(op.fn)
    torch.testing.assert_close(found, tangent(op.reference))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        y = torch.autograd.forward_ad.unpack_dual(op.fn(dual, *rest, **kwargs))
        torch.testing.assert_close(y.tangent, found)


@pytest.mark.filterwarnings("ignore:.*plain torch reference")
def test_transforms_of_expanding():
    op = REGISTRY["nm24_to_dense"]
    (values, meta), _ = case_of(op).make(torch.float32)
    slope = torch.func.grad(lambda values: op.fn(values, meta).square().sum())(values)
    torch.testing.assert_close(slope, 2 * values)
    _, tangent = torch.func.jvp(lambda values: op.fn(values, meta), (values,), (values,))
    torch.testing.assert_close(tangent, op.fn(values, meta))


def test_fast_path_can_be_turned_off(no_fast_path, fast_calls):
    for op in LAYERS:
        args, kwargs = case_of(op).make(torch.float32)
        op.fn(*args, **kwargs)
    assert fast_calls == [False] * len(LAYERS)
