"""What the ops share of their CUDA kernels: why none can run, whether one in Triton takes their place, the
weight as they take it, and the launch of a product.

Under ``SPARSEOPS_EMULATE`` the CPU takes the place of the GPU, here as in the kernels.
"""

import re
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseops import _native, triton
from sparseops.formats.nm24_fragments import pack_fragments
from sparseops.formats.nm24_slabs import pack_slabs, slab_rows
from sparseops.ops import dispatch, registry
from sparseops.ops.common import ACTIVATIONS
from sparseops.ops.derived import derive, forget

OLDEST = (8, 0)
"""The least compute capability that has mma.sp."""
HOPPER = (9, 0)
"""The only one that has wgmma.sp."""

DTYPES = {**registry.KERNEL_DTYPES, torch.int8: 3, torch.float8_e4m3fn: 4}
"""The dtypes of the kernels, with their codes in csrc/ops.h."""

F32_REASON = (
    "no tensor core multiplies a float32 weight of 2:4, and torch.get_float32_matmul_precision() is not "
    '"medium", which would let the bfloat16 kernel run'
)

DENSE_REASON = "SPARSEOPS_IMPL=dense asks for the dense expansion"

INTERPRETED_REASON = "the CPU stands for a GPU whose only kernels are in Triton"

FRAGMENTS = "fragments"
"""The key of the values in fragment order among what is derived from values."""


def impls(note: str, in_triton: str | None = None) -> dict[tuple[str, str], str]:
    """The ``impls`` of an op that has a CUDA kernel, and perhaps one in Triton."""
    found = {("cuda", "sm_80+"): note}
    return found if in_triton is None else {**found, ("cuda", "triton"): in_triton}


def no_product_reason(x: Tensor, values: Tensor | None = None) -> str | None:
    """Why no kernel can multiply ``x`` with ``values``, None if one can; looks at devices and dtypes alone,
    so that a layer's weight may stand in for the activations."""
    if not registry.on_gpu(x):
        return registry.no_kernel_reason(x, values)
    for tensor in (x,) if values is None else (x, values):
        if tensor.dtype not in registry.KERNEL_DTYPES:
            return f"there is no CUDA kernel for {tensor.dtype}"
    if reason := no_device_reason(x):
        return reason
    if _native.impl == "dense":
        return DENSE_REASON
    return F32_REASON if x.dtype is torch.float32 and not takes_bf16() else None


def no_device_reason(x: Tensor) -> str | None:
    """Why no CUDA kernel can run on the GPU of ``x``, None if they can."""
    if not registry.on_gpu(x):
        return f"there is no {x.device.type.upper()} kernel"
    if _native.C is None:
        return _native.error
    if _is_interpreted(x):
        return INTERPRETED_REASON
    return _native.config_error or gpu_reason(x.device.index or 0)


def _is_interpreted(x: Tensor) -> bool:
    """Whether the GPU of ``x`` is the CPU, and knows kernels in Triton alone."""
    return _native.interpreted and x.is_cpu and _native.emulated is None


def by_triton(x: Tensor) -> bool:
    """Whether it falls to a kernel in Triton, where there is one, to serve ``x``: ``SPARSEOPS_IMPL`` asks for
    it, or no CUDA kernel of this build can run on the GPU of ``x`` and Triton's can."""
    if not registry.on_gpu(x):
        return False
    if _native.impl == "triton":
        return True
    return no_device_reason(x) is not None and triton.no_triton_reason(x) is None


def no_triton_reason(*tensors: Tensor | None) -> str | None:
    """Where it falls to Triton: why none of its kernels can run on ``tensors``, None if one can."""
    assert tensors[0] is not None
    return triton.no_triton_reason(tensors[0]) or triton.no_dtype_reason(*tensors)


@lru_cache
def gpu_reason(index: int) -> str | None:
    """Why this build cannot run on GPU ``index``, None if it can."""
    build = _native.C.build_info()
    if not build["cuda"]:
        return "sparseops was built without CUDA: reinstall it with SPARSEOPS_CUDA=1"
    if reason := _native.C.cuda_probe()["error"]:
        return str(reason)
    if _native.emulated:
        return None
    if not torch.cuda.is_available():
        return "torch sees no GPU: install a torch that was built with CUDA"
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST:
        return "the GPU has compute capability {}.{}, and the kernels need 8.0".format(*capability)
    if not runs_on(build["cuda_archs"], capability):
        return (
            f"sparseops was built for GPU architectures {build['cuda_archs']}, none of which this GPU "
            "({}.{}) runs: build again with its architecture in TORCH_CUDA_ARCH_LIST".format(*capability)
        )
    return None


def runs_on(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code for one of ``archs``, such as "80+PTX;90a", runs on a GPU of this compute capability:
    machine code on later ones of the same generation, PTX on all later ones, what is made for one GPU ("a")
    on that."""
    number = capability[0] * 10 + capability[1]
    for digits, suffix, ptx in re.findall(r"(\d+)([af]?)(\+PTX)?", archs):
        built = int(digits)
        same = built // 10 == capability[0]
        if built == number or (suffix != "a" and same and built < number):
            return True
        if ptx and not suffix and built < number:
            return True
    return False


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of the GPU."""
    return _native.emulated or torch.cuda.get_device_capability(device)


def is_hopper(x: Tensor) -> bool:
    """Whether ``x`` lies on a GPU that has wgmma.sp."""
    return registry.on_gpu(x) and not _is_interpreted(x) and capability(x.device) == HOPPER


@lru_cache
def no_sm90_reason(device: torch.device) -> str | None:
    """Why the kernels for sm_90a cannot run on this GPU, which runs others, None if they can."""
    found = capability(device)
    if found != HOPPER:
        return "the GPU has compute capability {}.{}, and wgmma.sp needs 9.0".format(*found)
    if not _native.emulated and not has_sm90(_native.C.build_info()["cuda_archs"]):
        return "sparseops was built without sm_90a: build again with 9.0a in TORCH_CUDA_ARCH_LIST"
    return None


def has_sm90(archs: str) -> bool:
    """Whether ``archs``, such as "80+PTX;90a", has the kernels for sm_90a."""
    return re.search(r"\b90a", archs) is not None


def no_wgmma_reason(like: Tensor, rows: int, dtype: torch.dtype) -> str | None:
    """Why no kernel by wgmma.sp can compute a y of ``rows`` features in ``dtype`` on the GPU of ``like``,
    None if one can."""
    if reason := no_sm90_reason(like.device):
        return reason
    if rows * dtype.itemsize % 16:
        return f"wgmma.sp needs rows of y of whole 16 bytes, got {rows} of {dtype}"
    return None


def tiles_of(dtype: torch.dtype) -> tuple[str, ...]:
    """The tiles that there are for products of matrices of ``dtype``."""
    if dtype is torch.float8_e4m3fn:
        return dispatch.F8_TILES
    return dispatch.BYTE_TILES if dtype is torch.int8 else dispatch.MATRIX_TILES


def no_tile_reason(x: Tensor, rows: int, dtype: torch.dtype) -> str | None:
    """Why no kernel can compute a y of ``rows`` features in ``dtype`` from ``x``, where ``supports`` finds
    nothing against it; None if one can."""
    no_wgmma = no_wgmma_reason(x, rows, dtype)
    return None if allowed(tiles_of(x.dtype), no_wgmma) else no_wgmma


def allowed(tiles: tuple[str, ...], no_wgmma: str | None) -> tuple[str, ...]:
    """Of ``tiles`` those that a call can take, ``no_wgmma`` being why it cannot take those of sm90."""
    return tiles if no_wgmma is None else _without_sm90(tiles)


@lru_cache
def _without_sm90(tiles: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in tiles if name in dispatch.MMA_TILES)


def takes_bf16() -> bool:
    """Whether float32 products may be computed from bfloat16 factors: torch's own switch says so."""
    try:
        return torch.get_float32_matmul_precision() == "medium"
    except RuntimeError:  # torch refuses to answer where its newer switches are set too
        return False


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the GPU has; those of an A100 or an H100 when it is emulated."""
    if _native.emulated:
        return 132 if _native.emulated == HOPPER else 108
    return torch.cuda.get_device_properties(device).multi_processor_count


def unit_rows(x: Tensor) -> Tensor:
    """``x`` [rows, columns] with the elements of a row next to each other; a copy where they are not."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def place(x: Tensor) -> tuple[int, int]:
    """Where a kernel is launched: the index of the GPU of ``x``, and torch's current stream there."""
    if not x.is_cuda:
        return 0, 0
    device = x.get_device()
    return device, torch.cuda.current_stream(device).cuda_stream


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def aligned(tensor: Tensor) -> Tensor:
    """``tensor``, contiguous and beginning at a multiple of 16 bytes; a copy where it is not so."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def aligned_rows(x: Tensor) -> Tensor:
    """``x`` [rows, K] with rows that begin at and are multiples of 16 bytes, zeros behind K where those are
    missing, and that do not overlap; a copy where it is not so."""
    rows, columns = x.shape
    chunk = 16 // x.element_size()
    if columns % chunk:
        return F.pad(x, (0, -columns % chunk)).contiguous()
    apart = rows == 1 or (x.stride(0) % chunk == 0 and x.stride(0) >= columns)
    if x.stride(1) != 1 or not apart or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def row_stride(x: Tensor) -> int:
    """Elements between the rows of ``aligned_rows``; that of a single one may be anything."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


def kernel_name(values: Tensor, no_wgmma: str | None = None) -> str:
    """The kernel that runs for ``values``, where ``no_product_reason`` finds nothing against it and
    ``no_wgmma`` says why it is none by wgmma.sp."""
    if not registry.on_gpu(values):
        return registry.cpu_isa()
    name = "cuda mma.sp" if no_wgmma is not None or _native.impl in dispatch.MMA_TILES else "cuda wgmma.sp"
    if values.dtype is torch.float32:
        name += ", in bfloat16"
    return f"{name} (emulated)" if _native.emulated else name


def triton_name(how: str) -> str:
    """What a kernel in Triton that does its work like this is called."""
    return f"triton, {how}{' (interpreted)' if _native.interpreted else ''}"


class Weight(NamedTuple):
    """A 2:4 weight as the kernels take it."""

    values: Tensor
    slabs: Tensor
    slab_rows: int


def weight(values: Tensor, meta: Tensor, groups: int = 1) -> Weight:
    """Metadata in slabs, and values aligned, and in bfloat16 where they are float32; made once."""
    bits = 8 if values.element_size() == 1 else 16
    slabs = derive(meta, (bits, groups), lambda: pack_slabs(meta, groups, element_bits=bits))
    if values.dtype is torch.float32:
        values = derive(values, torch.bfloat16, lambda: values.to(torch.bfloat16).contiguous())
    return Weight(aligned(values), slabs, slab_rows(meta.shape[0], groups))


def fragments(values: Tensor, stored: Weight) -> Tensor:
    """The values of the weight that ``weight`` made of ``values``, in fragment order; made once."""
    return derive(values, FRAGMENTS, lambda: pack_fragments(stored.values))


def prepare(values: Tensor, meta: Tensor, *, groups: int = 1, **_: Any) -> None:
    """Make now what the kernels want of a weight that has just come to a GPU or changed there. The first call
    would make it as well, but a captured CUDA graph never comes to one."""
    if registry.on_gpu(meta) and type(meta) is Tensor and meta.numel() and no_product_reason(values) is None:
        stored = weight(values, meta, groups)
        if _native.impl in dispatch.SM90_RS_TILES and no_sm90_reason(meta.device) is None:
            fragments(values, stored)


def forget_values(values: Tensor) -> None:
    """The values are being trained, perhaps by writes that leave no trace: take no copy for theirs."""
    if registry.on_gpu(values):
        forget(values, torch.bfloat16)
        forget(values, FRAGMENTS)


def workspace(plan: dispatch.Plan, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Memory for the partial sums of splits, and their counters."""
    if plan.splits == 1:
        return None, None
    partials = torch.empty(plan.partials, dtype=torch.float32, device=device)
    return partials, torch.zeros(plan.counters, dtype=torch.int32, device=device)


def linear(
    op: str,
    x: Tensor,
    values: Tensor,
    meta: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    *,
    x_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
) -> Tensor:
    """The kernel of a product: x [tokens, K], bias and residual [tokens, O] in out_dtype; checked, and none
    of the three sizes 0."""
    tokens, rows, cols = x.shape[0], values.shape[0], values.shape[1] * 2
    x = aligned_rows(x.bfloat16() if x.dtype is torch.float32 else x)
    stored = weight(values, meta)
    product = dispatch.Product(tokens, rows, cols, element_bits=8 * x.element_size())
    blocks = multiprocessors(x.device)
    tiles = allowed(tiles_of(x.dtype), no_wgmma_reason(x, rows, out_dtype))
    plan = dispatch.plan(op, product, blocks, tiles)
    ordered = fragments(values, stored) if plan.tile.from_registers else None
    partials, counters = workspace(plan, x.device)
    bias, residual, x_scale, w_scale = (
        None if tensor is None else aligned(tensor) for tensor in (bias, residual, x_scale, w_scale)
    )
    y = torch.empty((tokens, rows), dtype=out_dtype, device=x.device)
    _native.require(op).nm24_linear_cuda(
        x.data_ptr(),
        row_stride(x),
        stored.values.data_ptr(),
        address(ordered),
        stored.slabs.data_ptr(),
        rows,
        cols,
        stored.slab_rows,
        address(bias),
        address(residual),
        address(x_scale),
        address(w_scale),
        DTYPES[out_dtype],
        ACTIVATIONS[activation],
        y.data_ptr(),
        tokens,
        x.shape[1],
        DTYPES[x.dtype],
        plan.tile.code,
        plan.splits,
        plan.cluster,
        blocks,
        address(partials),
        address(counters),
        *place(x),
    )
    return y
