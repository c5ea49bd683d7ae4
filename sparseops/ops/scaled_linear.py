"""What ``nm24_linear_i8`` and ``nm24_linear_f8`` share: nm24_linear of 8-bit elements, with a scale for each
token and each output feature.

y[..., o] = act(x_scale[...] * w_scale[o] * (sum over k of x[..., k] * w[o, k]) + bias[o])

x [..., K] and the 2:4 weight w [O, K] are of 8 bits, what comes behind the sum is float32, rounded once to
out_dtype. ``sparseops.formats.nm24`` draws the layout of values and meta.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseops.formats.nm24 import PITCH, expand
from sparseops.ops import cuda, registry
from sparseops.ops.common import ACTIVATIONS, activate, check_devices, loop_vmap, make_bias, make_weight
from sparseops.ops.nm24_to_dense import expanded


def reference(
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    activation: str = "none",
) -> Tensor:
    """Plain torch: expand the weight and multiply in float64, where sums of 8-bit products are exact. With
    float64 scales all else is float64 too, the result included."""
    return _dense(expand, x, values, meta, x_scale, w_scale, bias, out_dtype, activation)


def _dense(
    expand: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    activation: str,
) -> Tensor:
    # as bytes, since torch moves those where it does not move every kind of 8-bit elements
    moved = values.view(torch.uint8) if values.element_size() == 1 else values
    columns = expand(moved, meta).view(values.dtype)[:, : x.shape[-1]]
    sums = F.linear(x.double(), columns.double()).to(w_scale.dtype)
    z = sums * x_scale.unsqueeze(-1) * w_scale
    y = activate(z if bias is None else z + bias, activation)
    return y if y.dtype is torch.float64 else y.to(out_dtype)


class ScaledLinear:
    """The op of this kind for one dtype of x and values.

    supports: that of the op, called with x and values. most_features: how many columns of x its sums hold, if
    there is a limit.
    """

    def __init__(
        self,
        name: str,
        dtype: torch.dtype,
        supports: Callable[..., str | None],
        most_features: int | None = None,
    ) -> None:
        self.name, self.dtype, self.supports, self.most_features = name, dtype, supports, most_features
        self.overload = registry.define(
            f"{name}(Tensor x, Tensor values, Tensor meta, Tensor x_scale, Tensor w_scale, Tensor? bias, "
            "ScalarType out_dtype, str activation) -> Tensor",
            impl=self._impl,
            fake=self._fake,
            vmap=self._vmap,
            autocast=False,
        )

    def __call__(
        self,
        x: Tensor,
        values: Tensor,
        meta: Tensor,
        x_scale: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
        activation: str,
    ) -> Tensor:
        """What the public function does."""
        tensors = (x, values, meta, x_scale, w_scale, bias)
        if registry.fast_on_gpu(*tensors):
            return self._impl(*tensors, out_dtype, activation)
        if reason := registry.transform_reason():
            registry.fall_back(self.name, reason)
            return reference(*tensors, out_dtype=out_dtype, activation=activation)
        return self.overload(*tensors, out_dtype, activation)

    def _check(
        self,
        x: Tensor,
        values: Tensor,
        meta: Tensor,
        x_scale: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
        activation: str,
    ) -> tuple[int, ...]:
        """Check every argument, and return the shape of the output."""
        name = self.name
        if out_dtype not in registry.KERNEL_DTYPES:
            names = ", ".join(str(dtype) for dtype in registry.KERNEL_DTYPES)
            raise TypeError(f"{name}: out_dtype must be one of {names}, got {out_dtype}")
        for argument, tensor, dtype in (
            ("x", x, self.dtype),
            ("values", values, self.dtype),
            ("meta", meta, torch.uint8),
            ("x_scale", x_scale, torch.float32),
            ("w_scale", w_scale, torch.float32),
            ("bias", bias, out_dtype),
        ):
            if tensor is not None and tensor.dtype is not dtype:
                raise TypeError(f"{name}: {argument} must have dtype {dtype}, got {tensor.dtype}")
        if x.ndim == 0:
            raise ValueError(f"{name}: x must have at least one dimension, got a scalar")
        if values.ndim != 2 or values.shape[1] % (PITCH // 2):
            raise ValueError(
                f"{name}: values must have shape [O, P/2], P divisible by 32, got {tuple(values.shape)}"
            )
        rows, features = values.shape[0], x.shape[-1]
        packed = values.shape[1] * 2
        most = self.most_features
        if not packed - PITCH < features <= packed or (most is not None and features > most):
            limit = "" if most is None else f", and at most {most}"
            raise ValueError(
                f"{name}: x must have {max(packed - PITCH + 1, 0)} to {packed} features to match values of "
                f"{packed} packed columns{limit}, got {features}"
            )
        tokens = (*x.shape[:-1],)
        if x_scale.shape not in (tokens, (1,)):
            raise ValueError(f"{name}: x_scale must have shape {tokens} or (1,), got {tuple(x_scale.shape)}")
        for argument, tensor, shape in (
            ("meta", meta, (rows, packed // 8)),
            ("w_scale", w_scale, (rows,)),
            ("bias", bias, (rows,)),
        ):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"{name}: {argument} must have shape {shape}, got {tuple(tensor.shape)}")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"{name}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        tensors = {"values": values, "meta": meta, "x_scale": x_scale, "w_scale": w_scale, "bias": bias}
        check_devices(name, "x", x=x, **tensors)
        return (*tokens, rows)

    def _impl(
        self,
        x: Tensor,
        values: Tensor,
        meta: Tensor,
        x_scale: Tensor,
        w_scale: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
        activation: str,
    ) -> Tensor:
        shape = self._check(x, values, meta, x_scale, w_scale, bias, out_dtype, activation)
        reason = self.supports(x, values) or cuda.no_tile_reason(x, shape[-1], out_dtype)
        if reason is not None:
            registry.fall_back(self.name, reason)
        if reason is not None or not values.numel():
            dense = _dense(expanded, x, values, meta, x_scale, w_scale, bias, out_dtype, activation)
            return dense.contiguous()
        tokens = prod(shape[:-1])
        if not tokens:
            return x.new_empty(shape, dtype=out_dtype)
        rows = x.reshape(tokens, x.shape[-1])
        scales = {"x_scale": x_scale.reshape(-1).expand(tokens), "w_scale": w_scale}
        return cuda.linear(self.name, rows, values, meta, bias, None, activation, out_dtype, **scales).view(
            shape
        )

    def _fake(self, x: Tensor, *rest: Any) -> Tensor:
        shape = self._check(x, *rest)
        return x.new_empty(shape, dtype=rest[-2])

    def _vmap(self, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return loop_vmap(self.overload, info, in_dims, args), 0


def _inputs(
    quantize: Callable[[Tensor], Tensor],
    tokens: int | tuple[int, ...],
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    per_token: bool = True,
    activation: str = "none",
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    lead = (tokens,) if isinstance(tokens, int) else tokens
    generator = torch.Generator().manual_seed(in_features * out_features)

    def quantized(shape: tuple[int, ...]) -> Tensor:
        return torch.randint(-127, 128, shape, generator=generator)

    weight = make_weight((out_features, in_features), torch.float32, generator)
    values = torch.where(weight.values != 0, quantized(tuple(weight.values.shape)), 0)
    x_scale = torch.rand(lead if per_token else (1,), generator=generator) / 64
    w_scale = torch.rand(out_features, generator=generator) / max(1, in_features)
    offset = make_bias(out_features, dtype, generator) if bias else None
    x = quantize(quantized((*lead, in_features)))
    args = (x, quantize(values), weight.meta, x_scale, w_scale, offset)
    return args, {"out_dtype": dtype, "activation": activation}


def cases(quantize: Callable[[Tensor], Tensor]) -> tuple[registry.Case, ...]:
    """Test cases, of integers from -127 to 127 that ``quantize`` makes elements of."""
    return tuple(
        registry.Case(name, partial(_inputs, quantize, *sizes, **options))
        for name, sizes, options in (
            ("one_token", (1, 64, 48), {}),
            ("lt_tile", (2, 8, 3), {}),
            ("eq_tile", (64, 128, 64), {}),
            ("gt_tile", (65, 160, 80), {}),
            ("tail", (7, 37, 19), {}),
            ("deep", (9, 1100, 33), {"activation": "gelu"}),
            ("one_scale", (5, 64, 24), {"per_token": False}),
            ("no_bias", (5, 64, 24), {"bias": False, "activation": "relu"}),
            ("batched", ((2, 3, 5), 70, 24), {"activation": "silu"}),
            ("vector", ((), 40, 12), {}),
            ("no_features", (3, 0, 5), {}),
            ("empty", (0, 64, 24), {}),
            ("no_rows", (4, 64, 0), {}),
        )
    )
