"""The inputs that every implementation of ``channel_conv`` is tested with."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparseops.ops.common import Kept, blocks, cropped, make_bias, make_pruned, to_channels_last
from sparseops.ops.conv_geometry import Pair, pair
from sparseops.ops.registry import Case


def _inputs(
    reference: Callable[..., Tensor],
    image: tuple[int, ...],
    out_channels: int,
    kernel_size: Pair,
    dtype: torch.dtype,
    *,
    inputs: Kept = None,
    outputs: Kept = None,
    groups: int = 1,
    bias: bool = True,
    residual: Callable[[Tensor], Tensor] | None = None,
    view: Callable[[Tensor], Tensor] | None = None,
    **options: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    taps = tuple(pair("channel_conv", "kernel_size", kernel_size))
    generator = torch.Generator().manual_seed(out_channels * image[-1])
    x = torch.randn(image, generator=generator).to(dtype)
    shape = (out_channels, image[-3] // groups, *taps)
    weight = make_pruned(shape, dtype, generator, inputs, outputs, groups)
    offset = make_bias(out_channels, dtype, generator) if bias else None
    options |= {"outputs": out_channels, "kernel_size": kernel_size, "groups": groups}
    lists = (weight.in_index, weight.out_index)
    args: tuple[Any, ...] = (view(x) if view else x, weight.values, *lists, offset)
    if residual:
        y = reference(x, weight.values, *lists, **options)
        args += (residual(torch.randn(y.shape, generator=generator).to(dtype)),)
    return args, options


_EIGHTS = {"inputs": blocks(8, 0, 2, 3), "outputs": blocks(8, 1, 2)}  # of 8 channels, these are kept


def cases(reference: Callable[..., Tensor]) -> tuple[Case, ...]:
    """The cases; ``reference`` gives the shape of a residual."""

    def _case(name: str, *sizes: Any, **options: Any) -> Case:
        return Case(name, partial(_inputs, reference, *sizes, **options))

    return (
        _case("pointwise", (2, 32, 5, 7), 24, 1, **_EIGHTS),
        _case("lt_tile", (1, 4, 3, 3), 2, 3, inputs=[0, 3], outputs=[1]),
        _case("eq_tile", (1, 32, 8, 8), 32, 3, padding=1, inputs=blocks(16, 1), outputs=blocks(16, 0)),
        _case("gt_tile", (2, 48, 9, 17), 40, 3, padding=1, inputs=blocks(16, 0, 2), outputs=blocks(16, 0, 2)),
        _case("tail", (2, 13, 6, 11), 19, 3, padding=1, inputs=blocks(8, 1), outputs=blocks(8, 0, 2)),
        _case(
            "single", (2, 21, 6, 5), 18, 3, padding=1, inputs=[0, 1, 6, 7, 8, 19, 20], outputs=[0, 3, 4, 17]
        ),
        _case("inputs_only", (2, 24, 6, 5), 18, 3, padding=1, inputs=blocks(8, 0, 2)),
        _case("outputs_only", (2, 7, 6, 5), 24, 3, padding=1, outputs=blocks(8, 1)),
        _case("all", (2, 16, 6, 5), 16, 3, padding=1),
        _case("one_block", (1, 64, 5, 5), 64, 3, padding=1, inputs=blocks(8, 7), outputs=blocks(8, 0)),
        _case("one_channel", (2, 5, 7, 6), 5, 3, padding=1, inputs=[4], outputs=[2]),
        _case("one_channel_in", (2, 1, 7, 6), 16, 3, padding=1, outputs=blocks(8, 1)),
        _case("rgb_7x7_stride_2", (1, 3, 30, 29), 16, 7, stride=2, padding=3, outputs=blocks(8, 1)),
        _case("wide_image", (1, 16, 2, 133), 9, 3, padding=1, inputs=blocks(8, 1), outputs=blocks(8, 0)),
        _case("one_pixel", (3, 32, 1, 1), 24, 1, **_EIGHTS),
        _case("kernel_is_image", (2, 32, 4, 5), 24, (4, 5), **_EIGHTS),
        _case("one_dimensional", (2, 32, 1, 31), 24, (1, 5), padding=(0, 2), **_EIGHTS),
        _case("column_kernel", (2, 32, 9, 4), 24, (5, 1), padding=(2, 0), **_EIGHTS),
        _case("stride", (1, 32, 11, 10), 24, 3, stride=(2, 3), padding=(0, 2), **_EIGHTS),
        _case("pointwise_stride", (2, 32, 7, 7), 24, 1, stride=2, **_EIGHTS),
        _case("dilation", (1, 32, 11, 12), 24, 3, dilation=(2, 3), padding=(2, 3), **_EIGHTS),
        _case(
            "same_even_kernel", (1, 13, 7, 8), 12, (2, 4), padding="same", dilation=(1, 3), inputs=[2, 3, 9]
        ),
        _case("valid", (1, 32, 7, 8), 24, 3, padding="valid", **_EIGHTS),
        _case(
            "groups",
            (2, 24, 6, 5),
            18,
            3,
            groups=3,
            padding=1,
            inputs=[0, 1, 9, 12, 17, 23],
            outputs=[1, 8, 12],
        ),
        _case(
            "groups_tail", (2, 10, 6, 5), 4, 3, groups=2, padding=1, inputs=[1, 2, 4, 7], outputs=[0, 2, 3]
        ),
        _case(
            "groups_vanish", (2, 12, 6, 5), 8, 3, groups=4, padding=1, inputs=[0, 4, 9, 11], outputs=[0, 2, 3]
        ),
        _case(
            "groups_blocks", (2, 32, 6, 5), 32, 3, groups=2, inputs=blocks(8, 1, 2), outputs=blocks(8, 0, 2)
        ),
        _case("depthwise", (2, 9, 6, 5), 9, 3, groups=9, padding=1, inputs=[0, 2, 8], outputs=[0, 2, 8]),
        _case("depthwise_ragged", (2, 6, 6, 5), 12, 3, groups=6, inputs=[0, 5], outputs=[1, 4, 10, 11]),
        _case("no_bias", (1, 32, 5, 6), 24, 3, bias=False, **_EIGHTS),
        _case("relu", (1, 32, 5, 6), 24, 3, padding=1, activation="relu", **_EIGHTS),
        _case("silu", (1, 32, 5, 6), 24, 3, padding=1, activation="silu", **_EIGHTS),
        _case("gelu", (2, 32, 5, 6), 24, 3, padding=1, activation="gelu", **_EIGHTS),
        _case("residual", (2, 32, 5, 6), 24, 3, padding=1, residual=torch.clone, **_EIGHTS),
        _case(
            "residual_relu",
            (1, 32, 5, 6),
            24,
            3,
            stride=2,
            activation="relu",
            bias=False,
            residual=torch.clone,
            **_EIGHTS,
        ),
        _case(
            "residual_silu",
            (2, 32, 5, 6),
            70,
            1,
            activation="silu",
            view=to_channels_last,
            residual=cropped,
            **_EIGHTS,
        ),
        _case(
            "residual_unbatched",
            (32, 5, 6),
            24,
            3,
            activation="gelu",
            residual=lambda y: y.mT.contiguous().mT,
            **_EIGHTS,
        ),
        _case("unbatched", (32, 5, 6), 24, 3, padding=1, **_EIGHTS),
        _case("channels_last", (2, 32, 7, 9), 24, 3, padding=1, view=to_channels_last, **_EIGHTS),
        _case(
            "channels_last_tail",
            (2, 13, 6, 11),
            19,
            3,
            padding=1,
            stride=2,
            view=to_channels_last,
            activation="relu",
            inputs=blocks(8, 1),
            outputs=blocks(8, 0, 2),
        ),
        _case(
            "channels_last_groups",
            (2, 24, 6, 5),
            18,
            3,
            groups=3,
            padding=1,
            view=to_channels_last,
            inputs=[0, 1, 9, 12, 17],
            outputs=[1, 2, 8],
        ),
        _case("channels_last_inputs", (2, 32, 5, 7), 24, 1, view=to_channels_last, inputs=blocks(8, 0, 2)),
        _case("channels_last_outputs", (2, 5, 5, 7), 24, 3, view=to_channels_last, outputs=blocks(8, 0, 2)),
        _case(
            "channels_last_same_even",
            (1, 8, 7, 8),
            12,
            (2, 4),
            padding="same",
            view=to_channels_last,
            inputs=[3],
        ),
        _case("cropped", (2, 32, 6, 7), 24, 3, padding=1, view=cropped, **_EIGHTS),
        _case(
            "cropped_channels_last",
            (2, 32, 6, 7),
            24,
            3,
            padding=1,
            view=lambda x: cropped(to_channels_last(x)),
            **_EIGHTS,
        ),
        _case("transposed", (2, 32, 6, 7), 24, 3, padding=1, view=lambda x: x.mT.contiguous().mT, **_EIGHTS),
        _case("expanded", (1, 32, 6, 7), 24, 3, padding=1, view=lambda x: x.expand(3, -1, -1, -1), **_EIGHTS),
        _case("negated", (1, 32, 6, 7), 24, 3, padding=1, view=torch._neg_view, **_EIGHTS),
        _case("empty", (0, 32, 5, 6), 24, 3, padding=1, **_EIGHTS),
        _case(
            "empty_channels_last", (0, 32, 5, 6), 24, 3, view=to_channels_last, activation="silu", **_EIGHTS
        ),
    )
