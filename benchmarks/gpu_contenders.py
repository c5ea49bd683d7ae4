"""Who competes at a layer on a GPU: our kernels, with the plan of the rule table and with others, and what
torch offers.

The dense baseline multiplies a weight without zeros, as the model before pruning has it: a GPU that
multiplies zeros draws less power and clocks higher. The other peers get the pruned weight.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.compare import kept_blocks
from benchmarks.gpu_results import BASELINES, COMPACT, OURS
from benchmarks.gpu_shapes import GpuWork
from benchmarks.gpu_time import Call
from benchmarks.shapes import Linear, Pruned
from sparseops import _native
from sparseops.formats import NM24
from sparseops.formats.channel_pruned import ChannelPruned, Keep
from sparseops.ops import REGISTRY, dispatch
from sparseops.ops.tiles import ceil_div

SPARSE_BYTES, DENSE_BYTES = 1.125, 2.0  # of a 16-bit weight, per element of the dense one
SPARSE_8_BIT_BYTES = 0.625
WIDEST_FEW = 4  # a tile for few tokens is tried up to this many times its tokens
WIDEST_SM90 = 4  # one of sm90 only for tokens that fill this part of it, or with the fewest tokens there are
MOST_SPLITS = 16
MOST_BLOCKS = 4  # splits make no more blocks than this many times the multiprocessors
PAIRED_TOKENS = 64  # tiles of sm90 from here on may form clusters of two


@dataclass(frozen=True)
class Contender:
    """A way to compute a layer. ``make`` prepares it and gives the call to time; both may fail.

    pruned: whether it multiplies the pruned weight, and so can be held against the reference.
    """

    name: str
    make: Callable[[], Call]
    plan: str = ""
    picked: bool = False
    pruned: bool = True
    weight_bytes: float = SPARSE_BYTES

    @property
    def ours(self) -> bool:
        return self.name == OURS


@dataclass(frozen=True)
class Inputs:
    """A layer's random data: what the op is called with, the weight before pruning, and that after it."""

    args: tuple[Any, ...]
    options: dict[str, Any]
    dense: Tensor
    pruned: Callable[[], Tensor]

    @property
    def x(self) -> Tensor:
        return self.args[0]


def inputs(work: GpuWork, device: torch.device) -> Inputs:
    """Normally distributed, none of it zero but what pruning removes."""
    layer, dtype = work.layer.layer if isinstance(work.layer, Pruned) else work.layer, work.dtype
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    if isinstance(layer, Linear):
        if dtype.itemsize == 1:
            return _byte_inputs(layer, dtype, normal)
        shape: tuple[int, ...] = (layer.outputs, layer.inputs)
        x, options = normal(layer.tokens, layer.inputs).to(dtype), {}
    else:
        shape = (layer.outputs, layer.channels, layer.kernel, layer.kernel)
        x = normal(layer.batch, layer.channels, layer.side, layer.side).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        options = {"kernel_size": layer.kernel, "padding": layer.kernel // 2, "stride": layer.stride}
    fan_in = torch.Size(shape[1:]).numel()
    dense = (normal(*shape) * (2 / fan_in) ** 0.5).to(dtype)
    if isinstance(work.layer, Pruned):
        keep = Keep(
            kept_blocks(work.layer.inputs, work.layer.kept_inputs, work.layer.block, generator),
            kept_blocks(layer.outputs, work.layer.kept_outputs, work.layer.block, generator),
        )
        small = ChannelPruned.from_dense(dense, prune=keep)
        args = (x, small.values, small.in_index, small.out_index)
        return Inputs(args, {**options, "outputs": layer.outputs}, dense, small.to_dense)
    packed = NM24.from_dense(dense, prune="magnitude")
    return Inputs((x, packed.values, packed.meta), options, dense, packed.to_dense)


def _byte_inputs(layer: Linear, dtype: torch.dtype, normal: Callable[..., Tensor]) -> Inputs:
    def quantized(*shape: int) -> Tensor:
        steps = (normal(*shape) * 32).clamp(-127, 127)
        steps = steps.round() if dtype is torch.int8 else steps.to(dtype).float()
        return torch.where(steps == 0, 1, steps)

    x, dense = quantized(layer.tokens, layer.inputs).to(dtype), quantized(layer.outputs, layer.inputs)
    packed = NM24.from_dense(dense, prune="magnitude")
    scales = normal(1).abs() / 64, normal(layer.outputs).abs() / layer.inputs
    return Inputs(
        (x, packed.values.to(dtype), packed.meta, *scales),
        {"out_dtype": torch.bfloat16},
        dense.to(dtype),
        lambda: packed.to_dense().to(dtype),
    )


def peers(work: GpuWork, data: Inputs) -> list[Contender]:
    """What torch offers, the dense baseline first."""
    if isinstance(work.layer, Pruned):
        return _channel_peers(work.layer, data, BASELINES[work.op])
    if not isinstance(work.layer, Linear):
        return [Contender("cudnn", lambda: _cudnn(data), pruned=False, weight_bytes=DENSE_BYTES)]
    if work.dtype is torch.int8:  # sums that are not scaled, so not what the op gives
        sparse = SPARSE_8_BIT_BYTES
        return [
            Contender("cublas int8", lambda: _int_mm(data), pruned=False, weight_bytes=1.0),
            Contender("cusparselt int8", lambda: _semi_structured(data, False), "", False, False, sparse),
        ]
    if work.dtype is torch.float8_e4m3fn:  # with one scale for all
        sparse = SPARSE_8_BIT_BYTES
        return [
            Contender("cublas fp8", lambda: _scaled_mm(data), pruned=False, weight_bytes=1.0),
            Contender("cusparselt fp8", lambda: _sparse_mm_f8(data), "", False, False, sparse),
        ]
    found = [Contender("cublas", lambda: _linear(data.x, data.dense), pruned=False, weight_bytes=DENSE_BYTES)]
    if work.source == "square":
        pruned = Contender(
            "cublas, pruned weight", lambda: _linear(data.x, data.pruned()), weight_bytes=DENSE_BYTES
        )
        found.append(pruned)
    return [
        *found,
        Contender("cusparselt", lambda: _semi_structured(data, cutlass=False)),
        Contender("cusparselt, searched", lambda: _searched(data)),
        Contender("torch cutlass", lambda: _semi_structured(data, cutlass=True)),
    ]


def _channel_peers(layer: Pruned, data: Inputs, dense: str) -> list[Contender]:
    """The dense layer, and a dense layer of the kept channels alone, which has less to give."""
    is_linear = isinstance(layer.layer, Linear)

    def compact() -> Call:
        x, values, in_index, _ = data.args
        kept = x.index_select(1, in_index)
        if is_linear:
            return _linear(kept, values)
        return _conv(kept, values.permute(0, 3, 1, 2), data.options)

    return [
        Contender(
            dense,
            lambda: _linear(data.x, data.dense) if is_linear else _cudnn(data),
            pruned=False,
            weight_bytes=DENSE_BYTES,
        ),
        Contender(dense + COMPACT, compact, pruned=False, weight_bytes=DENSE_BYTES * layer.kept_macs),
    ]


def _linear(x: Tensor, weight: Tensor) -> Call:
    return lambda: F.linear(x, weight)


def _int_mm(data: Inputs) -> Call:
    x, weight = data.x, data.dense.t()
    return lambda: torch._int_mm(x, weight)


def _scaled_mm(data: Inputs) -> Call:
    x, weight, one = data.x, data.dense.t(), torch.ones((), device=data.x.device)
    return lambda: torch._scaled_mm(x, weight, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def _sparse_mm_f8(data: Inputs) -> Call:
    x, weight = data.x.t(), torch._cslt_compress(data.pruned())
    return lambda: torch._cslt_sparse_mm(weight, x, out_dtype=torch.bfloat16, transpose_result=True)


def _sparse_weight(data: Inputs, cutlass: bool) -> Any:
    from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

    SparseSemiStructuredTensor._FORCE_CUTLASS = cutlass
    return to_sparse_semi_structured(data.pruned())


def _semi_structured(data: Inputs, cutlass: bool) -> Call:
    return _linear(data.x, _sparse_weight(data, cutlass))


def _searched(data: Inputs) -> Call:
    """cuSPARSELt with the fastest of its algorithms, where torch lets us ask for it."""
    weight = _sparse_weight(data, cutlass=False)
    weight.alg_id_cusparselt = torch._cslt_sparse_mm_search(weight.packed, data.x.t())
    return _linear(data.x, weight)


def _cudnn(data: Inputs) -> Call:
    return _conv(data.x, data.dense, data.options)


def _conv(x: Tensor, weight: Tensor, options: dict[str, Any]) -> Call:
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    padding, stride = options["padding"], options["stride"]
    return lambda: F.conv2d(x, weight, padding=padding, stride=stride)


# ---- our own


def plain(work: GpuWork, data: Inputs) -> Call:
    """The op as a user calls it."""
    op = REGISTRY[work.op]
    return lambda: op.fn(*data.args, **data.options)


def refusal(work: GpuWork, data: Inputs) -> str | None:
    """Why a call of the op would not run a kernel."""
    return REGISTRY[work.op].supports(*data.args[:2])


@contextmanager
def planned(replacement: Callable[..., dispatch.Plan]) -> Iterator[None]:
    """Calls in this block are cut as ``replacement`` says."""
    before = dispatch.plan
    dispatch.plan = replacement
    try:
        yield
    finally:
        dispatch.plan = before


@contextmanager
def _tile(name: str) -> Iterator[None]:
    before, _native.impl = _native.impl, name
    try:
        yield
    finally:
        _native.impl = before


def text(plan: dispatch.Plan) -> str:
    """``tile/splits``, and ``/cluster`` where that is more than one."""
    return f"{plan.tile.name}/{plan.splits}" + (f"/{plan.cluster}" if plan.cluster > 1 else "")


def plans(call: Call, wide: bool = False) -> list[dispatch.Plan]:
    """The plan that a call takes, then others that could be better. None when it takes none: a CPU kernel.

    wide: splits and clusters are varied for every tile, else for the one that the rule picked alone.
    """
    asked: list[tuple[inspect.BoundArguments, dispatch.Plan]] = []
    rule = dispatch.plan

    def record(*args: Any, **kwargs: Any) -> dispatch.Plan:
        found = rule(*args, **kwargs)
        asked.append((inspect.signature(rule).bind(*args, **kwargs), found))
        return found

    with planned(record):
        call()
    if not asked:
        return []
    bound, picked = asked[0]
    bound.apply_defaults()
    product, allowed = bound.arguments["product"], bound.arguments["allowed"]
    most_blocks = MOST_BLOCKS * bound.arguments["multiprocessors"]
    found = {text(picked): picked}
    for name in allowed:
        tile = dispatch.built_tiles()[name]
        if not fits(tile, product.tokens):
            continue
        with _tile(name):
            alone = rule(*bound.args, **bound.kwargs)
        if alone.tile.name != name:
            raise RuntimeError(f"the plan for {name} took {alone.tile.name}")
        others = variants(alone, product, most_blocks) if wide or name == picked.tile.name else [alone]
        for plan in others:
            found.setdefault(text(plan), plan)
    return list(found.values())


def fits(tile: dispatch.Tile, tokens: int) -> bool:
    """Whether a tile is worth trying."""
    few = tile.name.startswith("few") or (tile.is_sm90 and tile.tokens < PAIRED_TOKENS)
    if few and tokens > WIDEST_FEW * tile.tokens:
        return False
    return not tile.is_sm90 or tile.tokens <= max(8, WIDEST_SM90 * tokens)


def variants(plan: dispatch.Plan, product: dispatch.Product, most_blocks: int) -> list[dispatch.Plan]:
    """A tile's plan, and those with neighbouring numbers of splits, each with and without clusters."""
    columns = 128 * 16 // product.element_bits if plan.tile.is_sm90 else 128
    stages = max(1, ceil_div(product.cols, columns))
    splits = [plan.splits]
    for tried in (1, plan.splits // 2, plan.splits * 2):
        if 1 <= tried <= min(stages, MOST_SPLITS) and (tried == 1 or tried * plan.tiles <= most_blocks):
            splits.append(ceil_div(stages, ceil_div(stages, tried)))  # none without columns
    clusters = [plan.cluster]
    if plan.tile.is_sm90 and plan.tile.tokens >= PAIRED_TOKENS:
        clusters.append(3 - plan.cluster)
    return [plan._replace(splits=s, cluster=c) for s in dict.fromkeys(splits) for c in clusters]


def forced(call: Call, plan: dispatch.Plan) -> Call:
    """``call``, cut as ``plan`` says."""

    def run() -> Tensor:
        with planned(lambda *_, **__: plan):
            return call()

    return run


def channels_alone(work: GpuWork, data: Inputs, on_gpu: bool) -> list[Contender]:
    """Our kernel for pruned channels, which has one way alone to run a layer."""
    assert isinstance(work.layer, Pruned)
    call, weight_bytes = plain(work, data), DENSE_BYTES * work.layer.kept_macs
    plan = "triton" if on_gpu else ""
    return [Contender(OURS, lambda: call, plan, picked=True, weight_bytes=weight_bytes)]


def ours(call: Call, weight_bytes: float, on_gpu: bool, wide: bool = False) -> list[Contender]:
    """Our kernels: as a plain call runs them, then each other plan. Runs the call."""
    found = plans(call, wide)
    if not found and on_gpu:
        raise RuntimeError("the call ran no kernel of ours")
    plain_call = Contender(OURS, lambda: call, text(found[0]) if found else "", picked=True)
    others = [Contender(OURS, partial(forced, call, plan), text(plan)) for plan in found[1:]]
    return [replace(c, weight_bytes=weight_bytes) for c in (plain_call, *others)]
