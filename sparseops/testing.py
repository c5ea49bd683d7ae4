"""The tolerance rule: a result is judged element by element, by how well plain torch does on the same inputs.

Every bound is measured. ``expect`` computes what an op should return in float64, what plain torch returns
in the dtype of the inputs, and the sum of the sizes that each element adds up. ``assert_close`` measures how
many units of rounding plain torch is off and allows twice that. No whole-tensor norm is taken: it would let a
missing tile of a large output pass.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from sparseops.ops.registry import Op

_ACCUMULATED_ULPS = 4
_F8_SUM_EPS = 2.0**-13  # the 14 bits that nm24_linear_f8 tells of
_MOST_UNITS = 32


@dataclass(frozen=True)
class Expected:
    """What a result is judged by, all of its shape.

    Attributes:
        exact: the result in float64.
        plain: what plain torch returns in the dtype under test.
        rounded: the size, in float64, of what is rounded to that dtype: of a result, ``|exact|``, and with a
            residual its size too, since torch adds it to a rounded product; of a gradient the sum of the
            sizes of its terms, since torch rounds 16-bit gradients on the way.
        summed: the size of what is summed up in the accumulator: the sum of the sizes of the terms.
        sum_eps: the accumulator's eps, by default that of float32, and of float64 for float64.
    """

    exact: Tensor
    plain: Tensor
    rounded: Tensor
    summed: Tensor
    sum_eps: float | None = None


def expect(op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Expected:
    """What ``op.fn(*args, **kwargs)`` is judged by."""
    exact = op.reference(*_double(args), **kwargs).detach()
    plain = op.reference(*_contiguous(args), **kwargs).detach()
    rounded = exact.abs()
    named = dict(zip(signature(op.fn).parameters, args, strict=False))
    if (residual := named.get("residual")) is not None:
        rounded = rounded + residual.double().abs()
    sum_eps = _F8_SUM_EPS if op.dtype is torch.float8_e4m3fn else None
    return Expected(exact, plain, rounded, _summed(op, args, kwargs), sum_eps)


def expect_grads(
    op: Op, args: Sequence[Any], kwargs: Mapping[str, Any], cotangent: Tensor
) -> dict[int, Expected]:
    """What the gradients of ``op.fn(*args, **kwargs)`` are judged by, by position in ``args``.

    ``cotangent`` has the shape of the result. Every floating-point argument gets a gradient.
    """
    exact = grads(op.reference, _double(args), kwargs, cotangent.double())
    plain = grads(op.reference, _contiguous(args), kwargs, cotangent)
    sizes, linear = _sizes(args), _without_activation(kwargs)
    terms = cotangent.double().abs()
    rounded = grads(op.reference, sizes, linear, terms)
    if kwargs.get("activation", "none") != "none":
        # the slope of the activation is as uncertain as its input is, and its curvature is at most 1
        terms = terms * (1 + _summed(op, args, kwargs))
    summed = grads(op.reference, sizes, linear, terms)
    return {i: Expected(exact[i], plain[i], rounded[i], summed[i]) for i in exact}


def _summed(op: Op, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    return op.reference(*_sizes(args), **_without_activation(kwargs)).detach()


def _double(args: Sequence[Any]) -> list[Any]:
    return [arg.double() if _is_floating(arg) else arg for arg in args]


def _sizes(args: Sequence[Any]) -> list[Any]:
    return [arg.double().abs() if _is_floating(arg) else arg.abs() if _is_int8(arg) else arg for arg in args]


def _contiguous(args: Sequence[Any]) -> list[Any]:
    """Torch is more exact on contiguous tensors: a strided product adds its bias after a rounding."""
    return [arg.contiguous() if _is_floating(arg) else arg for arg in args]


def _without_activation(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: "none" if name == "activation" else value for name, value in kwargs.items()}


def grads(
    fn: Callable[..., Tensor], args: Sequence[Any], kwargs: Mapping[str, Any], cotangent: Tensor
) -> dict[int, Tensor]:
    """Gradients of ``(fn(*args, **kwargs) * cotangent).sum()``, by position in ``args``."""
    leaves = [arg.detach().requires_grad_() if _is_floating(arg) else arg for arg in args]
    positions = [i for i, leaf in enumerate(leaves) if _is_floating(leaf)]
    y = fn(*leaves, **kwargs)
    return dict(
        zip(positions, torch.autograd.grad(y, [leaves[i] for i in positions], cotangent), strict=True)
    )


def _is_floating(arg: Any) -> bool:
    return isinstance(arg, Tensor) and arg.is_floating_point()


def _is_int8(arg: Any) -> bool:
    return isinstance(arg, Tensor) and arg.dtype is torch.int8


def assert_close(actual: Tensor, expected: Expected) -> None:
    """Fail unless every element of ``actual`` is as close to the exact result as plain torch is, times two.

    The unit of an element is one rounding to the dtype, ``eps(dtype) * rounded``, plus a few in the
    accumulator, ``4 * sum_eps * summed``: 16-bit kernels have to sum in float32. Every element is allowed
    twice the units of plain torch's worst element, and at least one. Where the exact result is NaN or rounds
    to infinity, ``actual`` must say the same.

    Raises:
        AssertionError: an element is off; the text says how many, which is the worst, and where they lie.
        ValueError: plain torch itself is more than 32 units off, so that it cannot serve as a yardstick.
    """
    exact, plain = expected.exact, expected.plain
    if actual.shape != exact.shape or actual.dtype != plain.dtype:
        raise AssertionError(
            f"assert_close: actual must have shape {tuple(exact.shape)} and dtype {plain.dtype}, "
            f"got {tuple(actual.shape)} and {actual.dtype}"
        )
    if not exact.numel():
        return
    info = torch.finfo(plain.dtype)
    sum_eps = expected.sum_eps or torch.finfo(torch.promote_types(plain.dtype, torch.float32)).eps
    unit = (
        info.eps * expected.rounded
        + _ACCUMULATED_ULPS * sum_eps * expected.summed
        + info.smallest_normal * info.eps
    )
    nearest = exact.to(plain.dtype)
    regular = nearest.isfinite()
    plain_off = ((plain.double() - exact).abs() / unit)[regular & plain.isfinite()]
    units = float(plain_off.max()) if plain_off.numel() else 0.0
    if units > _MOST_UNITS:
        raise ValueError(
            f"assert_close: plain must be within {_MOST_UNITS} units of exact, got {units:.3g} units"
        )
    error = (actual.double() - exact).abs()
    bound = max(1.0, 2 * units) * unit
    same = (actual == nearest) | (actual.isnan() & nearest.isnan())
    wrong = ~torch.where(regular, error <= bound, same)
    if wrong.any():
        raise AssertionError(_describe(wrong, actual, exact, error, bound))


def _describe(wrong: Tensor, actual: Tensor, exact: Tensor, error: Tensor, bound: Tensor) -> str:
    where = wrong.nonzero()
    excess = torch.where(wrong, (error / bound).nan_to_num(torch.inf), -1.0)
    worst = torch.unravel_index(excess.argmax(), excess.shape)
    at = tuple(int(i) for i in worst)
    box = ", ".join(
        f"{low}-{high}" for low, high in zip(where.amin(0).tolist(), where.amax(0).tolist(), strict=True)
    )
    return (
        f"assert_close: {len(where)} of {wrong.numel()} elements are off, all within [{box}]; the worst is "
        f"{at}: {float(actual[worst])} for {float(exact[worst])}, "
        f"an error of {float(error[worst]):.3g} where {float(bound[worst]):.3g} is allowed"
    )
