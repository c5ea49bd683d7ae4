"""Kernels in Triton, for GPUs that the CUDA kernels of this build do not run on, and for what has no CUDA
kernel.

This module says whether they can run, and knows nothing of them; it does not import Triton before it has seen
a GPU. Each other module holds one kernel: a pure ``triton.jit`` function, the configurations it is shipped in
as plain dicts, a function that launches it on checked tensors, and ``AOT``, the signatures that it is
compiled for where its machine code is checked without a GPU (``sparseops.triton.common.Signature``). Import
those inside functions: they import Triton.

Under ``SPARSEOPS_IMPL=triton`` and ``TRITON_INTERPRET=1`` the CPU stands for a GPU: Triton's interpreter
serves tensors that lie there.
"""

import importlib
import re
import shutil
from functools import lru_cache
from importlib import metadata
from types import ModuleType

import torch
from torch import Tensor

from sparseops import _native, env

OLDEST = (8, 0)
"""The least compute capability that the kernels are compiled for."""

VERSIONS = ((3, 6), (3, 9))
"""The first and the last version of Triton that the kernels are tested with."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that the kernels compute in."""


def serves(x: Tensor) -> bool:
    """Whether ``x`` lies where Triton kernels run, if they can: on a GPU, or on the CPU in the
    interpreter."""
    return x.is_cuda or (_native.interpreted and x.is_cpu)


def no_triton_reason(x: Tensor) -> str | None:
    """Why no Triton kernel can run on the device of ``x``, None if one can; looks at nothing but the
    device."""
    if _native.config_error is not None:
        return _native.config_error
    if not serves(x):
        return f"there is no {x.device.type.upper()} kernel"
    return _install_reason() if _native.interpreted else _gpu_reason(x.device.index or 0)


def no_dtype_reason(*tensors: Tensor | None) -> str | None:
    """Why no Triton kernel computes in the dtypes of ``tensors``, None if there is one."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"there is no Triton kernel for {tensor.dtype}"
    return None


def precision(dtype: torch.dtype, *, conv: bool = False) -> str:
    """``input_precision`` of a product of ``dtype``: of float32 ``"tf32"`` where torch's own switch allows
    it, else ``"ieee"``. That is ``torch.set_float32_matmul_precision`` or ``torch.backends.cuda.matmul``, and
    ``torch.backends.cudnn`` for a convolution, which allows it unless told otherwise."""
    if dtype is not torch.float32:
        return "ieee"
    if conv:
        cudnn = torch.backends.cudnn
        newer = getattr(cudnn, "conv", None)  # of torch 2.9; where it is set, the older one may not answer
        allowed = cudnn.allow_tf32 if newer is None else newer.fp32_precision == "tf32"
        return "tf32" if allowed else "ieee"
    try:
        whole = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch refuses to answer where its newer switches are set too
        whole = getattr(torch.backends.cuda.matmul, "fp32_precision", "ieee") != "tf32"
    return "ieee" if whole else "tf32"


def installed_version() -> str | None:
    """The version of Triton that is installed, None if none is; does not import it."""
    for name in ("triton", "pytorch-triton"):  # the second comes with torch's nightly builds
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


@lru_cache
def _gpu_reason(index: int) -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no GPU: install a torch that was built with CUDA"
    if torch.version.hip is not None:
        return "the Triton kernels are for NVIDIA's GPUs"
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST:
        return "the GPU has compute capability {}.{}, and the kernels need 8.0".format(*capability)
    return _install_reason() or _compiler_reason(_triton())


@lru_cache
def _install_reason() -> str | None:
    first, last = (".".join(map(str, version)) for version in VERSIONS)
    cure = f'pip install "triton>={first},<{VERSIONS[1][0]}.{VERSIONS[1][1] + 1}"'
    try:
        version = _triton().__version__
    except ImportError as exc:
        return f"Triton cannot be imported ({exc}): {cure}"
    if not VERSIONS[0] <= _numbers(version) <= VERSIONS[1]:
        return f"Triton is of version {version}, and the kernels need {first} to {last}: {cure}"
    return None


def _compiler_reason(triton: ModuleType) -> str | None:
    """Triton up to 3.7 compiles a launcher in C where a kernel is first run."""
    if (
        _numbers(triton.__version__) >= (3, 8)
        or env.c_compiler()
        or shutil.which("gcc")
        or shutil.which("clang")
    ):
        return None
    return f"Triton {triton.__version__} compiles its launchers with a C compiler: install gcc, or set CC"


def _triton() -> ModuleType:
    return importlib.import_module("triton")


def _numbers(version: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)
