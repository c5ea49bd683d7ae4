"""``channel_linear``: y[..., o] = act(sum over k of x[..., k] * w[o, k] + bias[o] + residual[..., o]) with a
weight w [O, K] of which whole rows and columns are zero.

``sparseops.formats.channel_pruned`` draws the layout of values [O', K'], in_index [K'] and out_index [O'];
with ``meta`` the compact weight is 2:4 as ``nm24_linear`` takes it. On the CPU the kept features are
gathered, torch multiplies them densely, and the kept outputs are scattered into y, which is written once.
Each of these rounds as plain torch does.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseops import triton
from sparseops.formats.channel_pruned import expand_channels
from sparseops.formats.nm24 import expand, packed_cols
from sparseops.ops import channel_grads, channel_plain, cuda, onednn, registry
from sparseops.ops.channels import (
    Channels,
    channels_of,
    check_lists,
    gather_rows,
    is_composed,
    kernel_name,
    no_kernel_reason,
    read_lists,
    scatter_rows,
)
from sparseops.ops.common import (
    Kept,
    activate,
    activation_grad,
    behind_one,
    beside_nan,
    blocks,
    check_devices,
    check_dtypes,
    check_epilogue,
    check_residual,
    check_weight,
    finish,
    layer_vmap,
    make_bias,
    make_pruned,
    saved_epilogue,
)
from sparseops.ops.nm24_linear import nm24_linear

NAME = "channel_linear"


def channel_linear_reference(
    x: Tensor,
    values: Tensor,
    in_index: Tensor,
    out_index: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    outputs: int,
    meta: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """Plain torch: expand the weight and call ``F.linear``."""
    if meta is not None:
        values = expand(values, meta)[:, : in_index.shape[0]]
    weight = expand_channels(values, in_index, out_index, (outputs, x.shape[-1]))
    return finish(F.linear(x, weight, bias), residual, activation)


def supports(x: Tensor, values: Tensor | None = None, *_: Any, **__: Any) -> str | None:
    """Why no kernel can run on ``x`` and ``values``, None if one can; looks at devices and dtypes alone."""
    return no_kernel_reason(x, values)


def _check(
    x: Tensor,
    values: Tensor,
    in_index: Tensor,
    out_index: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    outputs: int,
    activation: str,
) -> None:
    """Check every argument but the devices and the contents of the lists."""
    check_dtypes(NAME, x, values)
    if x.ndim == 0:
        raise ValueError(f"{NAME}: x must have at least one dimension, got a scalar")
    if values.ndim != 2:
        raise ValueError(f"{NAME}: values must have shape [O', K'], got {tuple(values.shape)}")
    check_lists(NAME, values.shape[0], in_index, out_index, x.shape[-1], outputs)
    check_epilogue(NAME, x, bias, outputs, activation)
    check_residual(NAME, x, residual, (*x.shape[:-1], outputs))


def _impl(x: Tensor, values: Tensor, in_index: Tensor, out_index: Tensor, *rest: Any) -> Tensor:
    bias, residual, outputs, activation = rest
    _check(x, values, in_index, out_index, *rest)
    tensors = {"values": values, "in_index": in_index, "out_index": out_index}
    check_devices(NAME, "x", x=x, **tensors, bias=bias, residual=residual)
    reason = supports(x, values)
    if reason is None and not triton.serves(x):
        return _kernel(x, values, in_index, out_index, *rest)
    lists = channels_of(NAME, in_index, out_index, x.shape[-1], outputs, values.shape[1])
    if reason is not None:
        registry.fall_back(NAME, reason)
    elif x.numel() and outputs and not is_composed(lists, x.numel() // x.shape[-1]):
        return _in_triton(lists, x, values, bias, residual, activation)
    return channel_plain.linear(x, values, in_index, out_index, *rest).contiguous()


def _kernel(
    x: Tensor,
    values: Tensor,
    in_index: Tensor,
    out_index: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    outputs: int,
    activation: str,
) -> Tensor:
    """Run on checked tensors on the CPU."""
    *lead, features = x.shape
    lists = channels_of(NAME, in_index, out_index, features, outputs, values.shape[1])
    tokens = prod(lead)
    if not (tokens and outputs):
        return x.new_empty(*lead, outputs)
    rows = gather_rows(lists, _as_rows(x))
    offset = bias
    if bias is not None and lists.scatter is not None:
        offset = bias.index_select(0, out_index)
    inner = activation if residual is None else "none"
    z = activate(onednn.linear(rows, values.contiguous(), offset, values), inner)
    y = scatter_rows(lists, z, None if bias is None else activate(bias, inner)).view(*lead, outputs)
    return y if residual is None else activate(y.add_(residual), activation)


def _in_triton(
    lists: Channels,
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """Run the kernel in Triton on checked tensors."""
    from sparseops.triton.channel_linear import linear

    y = linear(
        cuda.unit_rows(_as_rows(x)),
        values if 1 in values.stride() else values.contiguous(),
        None if bias is None else bias.contiguous(),
        None if residual is None else cuda.unit_rows(_as_rows(residual)),
        lists.inputs.for_kernels(),
        lists.outputs.for_kernels(),
        activation,
    )
    return y.view(*x.shape[:-1], lists.outputs.total)


def _fake(x: Tensor, values: Tensor, in_index: Tensor, out_index: Tensor, *rest: Any) -> Tensor:
    bias, residual, outputs, _ = rest
    _check(x, values, in_index, out_index, *rest)
    tensors = {"values": values, "in_index": in_index, "out_index": out_index}
    check_devices(NAME, "x", x=x, **tensors, bias=bias, residual=residual)
    return x.new_empty((*x.shape[:-1], outputs))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, in_index, out_index, bias, residual, ctx.outputs, ctx.activation = inputs
    ctx.save_for_backward(
        x,
        values,
        in_index,
        out_index,
        *saved_epilogue(ctx.activation, bias, residual, output),
    )
    onednn.forget(values)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, values, in_index, out_index, bias, residual, y = ctx.saved_tensors
    at = y
    if ctx.activation in ("silu", "gelu"):
        at = _op(x, values, in_index, out_index, bias, residual, ctx.outputs, "none")
    grad = activation_grad(grad, at, ctx.activation)
    grad_x = grad_values = grad_bias = None
    needs = ctx.needs_input_grad
    if needs[0]:  # the same op with the lists changed over
        grad_x = _op(grad, values.t(), out_index, in_index, None, None, x.shape[-1], "none")
    if needs[1]:
        grad_values = channel_grads.linear_grad_values(_as_rows(grad), _as_rows(x), in_index, out_index)
    if needs[4]:
        grad_bias = _as_rows(grad).sum(0)
    return grad_x, grad_values, None, None, grad_bias, grad if needs[5] else None, None, None


def _as_rows(t: Tensor) -> Tensor:
    return t.reshape(prod(t.shape[:-1]), t.shape[-1])


def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
    return layer_vmap(_op, info, in_dims, args, residual=5, images=False)


_op = registry.define(
    f"{NAME}(Tensor x, Tensor values, Tensor in_index, Tensor out_index, Tensor? bias, Tensor? residual, "
    "SymInt outputs, str activation) -> Tensor",
    impl=_impl,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    vmap=_vmap,
    autocast=True,
)


def channel_linear(
    x: Tensor,
    values: Tensor,
    in_index: Tensor,
    out_index: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    outputs: int,
    meta: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """Linear layer that reads only some features and computes only some outputs; the others are what a dense
    layer with zeros in its weight has there, the activation of bias and residual.

    Where no kernel can run (``supports`` says why) the same is done in plain torch, and a warning says so
    once.

    Args:
        x: activations [..., K], float16, bfloat16, float32 or float64.
        values: compact weight [O', K'] in the dtype of x; with ``meta`` its 2:4 form [O', P/2].
        in_index: the features that are kept [K'], int32, ascending. A feature that is not kept may be NaN.
        out_index: the outputs that are kept [O'], int32, ascending.
        bias: [O] in the dtype of x, or None.
        residual: what is added before the activation, [..., O] in the dtype of x, or None.
        outputs: O.
        meta: the metadata [O', P/8] of the compact weight's 2:4 form, or None.
        activation: ``"none"``, ``"relu"``, ``"silu"`` or ``"gelu"`` (the exact one).

    Returns:
        [..., O], contiguous; differentiable in x, values, bias and residual.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape, a device, a list or the activation is wrong, or a ``SPARSEOPS_*`` variable is.
    """
    if meta is not None:
        return _of_24(x, values, in_index, out_index, bias, residual, outputs, meta, activation)
    args = (x, values, in_index, out_index, bias, residual)
    if residual is None and registry.fast(x, values, in_index, bias, out_index):
        _check(*args, outputs, activation)
        return _kernel(*args, outputs, activation)
    if registry.fast_on_gpu(*args):
        return _impl(*args, outputs, activation)
    if reason := registry.transform_reason():
        registry.fall_back(NAME, reason)
        return channel_linear_reference(*args, outputs=outputs, activation=activation)
    return _op(*args, outputs, activation)


def _of_24(
    x: Tensor,
    values: Tensor,
    in_index: Tensor,
    out_index: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    outputs: int,
    meta: Tensor,
    activation: str,
) -> Tensor:
    """The layer whose compact weight is 2:4, of calls that each have a gradient."""
    x, values, bias, residual = registry.autocast(x, values, bias, residual)
    if x.ndim == 0:
        raise ValueError(f"{NAME}: x must have at least one dimension, got a scalar")
    rows, packed = check_weight(NAME, x, values, meta, None, "none")
    kept = in_index.shape[0]
    if packed != packed_cols((rows, kept)):
        raise ValueError(
            f"{NAME}: values must have {packed_cols((rows, kept))} packed columns for the {kept} channels "
            f"of in_index, got {packed}"
        )
    check_lists(NAME, rows, in_index, out_index, x.shape[-1], outputs)
    check_epilogue(NAME, x, bias, outputs, activation)
    check_residual(NAME, x, residual, (*x.shape[:-1], outputs))
    tensors = {"values": values, "in_index": in_index, "out_index": out_index, "meta": meta}
    check_devices(NAME, "x", x=x, **tensors, bias=bias, residual=residual)
    read_lists(NAME, in_index, out_index, x.shape[-1], outputs, kept)
    offset = None if bias is None else channel_plain.select(bias, 0, out_index)
    if residual is None and registry.fast(x, values, meta, bias, out_index) and x.numel():
        lists = channels_of(NAME, in_index, out_index, x.shape[-1], outputs, kept)
        z = nm24_linear(gather_rows(lists, _as_rows(x)), values, meta, offset, activation=activation)
        constants = None if bias is None else activate(bias, activation)
        return scatter_rows(lists, z, constants).view(*x.shape[:-1], outputs)
    z = nm24_linear(channel_plain.select(x, -1, in_index), values, meta, offset)
    return finish(channel_plain.spread(z, -1, out_index, bias, outputs), residual, activation)


def prepare(
    values: Tensor,
    in_index: Tensor,
    out_index: Tensor,
    *,
    outputs: int,
    channels: int | None = None,
    meta: Tensor | None = None,
) -> None:
    """Read the lists of a weight that has just come to a device or changed there."""
    if channels is not None and meta is None:
        read_lists(NAME, in_index, out_index, channels, outputs, values.shape[1])


def _inputs(
    tokens: int | tuple[int, ...],
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    *,
    inputs: Kept = None,
    outputs: Kept = None,
    bias: bool = True,
    residual: Callable[[Tensor], Tensor] | None = None,
    activation: str = "none",
    view: Callable[[Tensor], Tensor] | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    lead = (tokens,) if isinstance(tokens, int) else tokens
    generator = torch.Generator().manual_seed(in_features * out_features)
    x = torch.randn((*lead, in_features), generator=generator).to(dtype)
    weight = make_pruned((out_features, in_features), dtype, generator, inputs, outputs)
    offset = make_bias(out_features, dtype, generator) if bias else None
    args: tuple[Any, ...] = (view(x) if view else x, weight.values, weight.in_index, weight.out_index, offset)
    if residual:
        args += (residual(torch.randn((*lead, out_features), generator=generator).to(dtype)),)
    return args, {"outputs": out_features, "activation": activation}


def _case(name: str, *sizes: Any, **options: Any) -> registry.Case:
    return registry.Case(name, partial(_inputs, *sizes, **options))


_EIGHTS = {"inputs": blocks(8, 0, 2, 3), "outputs": blocks(8, 1, 2)}  # of 8 channels, these are kept

CASES = (
    _case("one_token", 1, 64, 48, **_EIGHTS),
    _case("lt_tile", 2, 8, 3, inputs=[0, 5], outputs=[1]),
    _case("eq_tile", 16, 64, 32, inputs=blocks(16, 0, 2), outputs=blocks(16, 1)),
    _case("gt_tile", 33, 160, 80, inputs=blocks(16, 0, 3, 4, 7), outputs=blocks(16, 0, 2, 3)),
    _case("tail", 7, 37, 19, inputs=blocks(8, 1, 4), outputs=blocks(8, 0, 2)),
    _case("single", 5, 40, 30, inputs=[0, 1, 7, 8, 9, 20, 33, 39], outputs=[2, 3, 5, 29]),
    _case("inputs_only", 9, 48, 21, inputs=blocks(8, 0, 5)),
    _case("outputs_only", 9, 21, 48, outputs=blocks(8, 1, 5)),
    _case("all", 4, 24, 16),
    _case("one_block", 6, 64, 64, inputs=blocks(8, 7), outputs=blocks(8, 0)),
    _case("one_channel", 3, 5, 7, inputs=[4], outputs=[6]),
    _case("one_feature", 3, 1, 16, outputs=blocks(8, 1)),
    _case("no_features", 3, 0, 16, outputs=blocks(8, 1)),
    _case("deep", 9, 1100, 33, inputs=blocks(8, *range(0, 137, 2)), outputs=blocks(8, 0, 4)),
    _case("wide", 4, 64, 517, inputs=blocks(8, 0, 2, 3), outputs=blocks(8, *range(0, 65, 3))),
    _case("many_tokens", 203, 72, 40, inputs=blocks(8, 0, 2, 8), outputs=blocks(8, 1, 2)),
    _case("no_bias", 5, 64, 24, bias=False, **_EIGHTS),
    _case("relu", 6, 64, 24, activation="relu", **_EIGHTS),
    _case("silu", 6, 64, 24, activation="silu", **_EIGHTS),
    _case("gelu", 6, 64, 24, activation="gelu", **_EIGHTS),
    _case("batched", (2, 3, 5), 64, 24, **_EIGHTS),
    _case("vector", (), 40, 20, **_EIGHTS),
    _case("strided", 6, 40, 24, view=beside_nan, **_EIGHTS),
    _case("misaligned", 6, 64, 24, view=behind_one, **_EIGHTS),
    _case("transposed", 6, 64, 24, view=lambda x: x.t().contiguous().t(), **_EIGHTS),
    _case("expanded", 1, 64, 24, view=lambda x: x.expand(5, -1), **_EIGHTS),
    _case("negated", 6, 64, 24, view=torch._neg_view, **_EIGHTS),
    _case("residual", 6, 64, 24, residual=torch.clone, **_EIGHTS),
    _case("residual_tail", (2, 5), 37, 19, residual=beside_nan, bias=False, inputs=[0, 36], outputs=[3, 18]),
    _case("residual_relu", 2, 64, 20, residual=behind_one, activation="relu", **_EIGHTS),
    _case("residual_gelu", 40, 64, 70, residual=behind_one, activation="gelu", **_EIGHTS),
    _case("empty", 0, 64, 24, **_EIGHTS),
    _case("batched_empty", (2, 0), 64, 24, activation="gelu", **_EIGHTS),
    _case("no_rows", 4, 64, 0, inputs=blocks(8, 1)),
)

registry.register(
    registry.Op(
        name=NAME,
        fn=channel_linear,
        reference=channel_linear_reference,
        supports=supports,
        impls=registry.cpu_impls("any floating dtype, any shape; torch's own product between two copies")
        | {("cuda", "triton"): "f32, f16 and bf16, any shape"},
        cases=CASES,
        prepare=prepare,
        kernel=kernel_name,
    )
)
