"""The list of ops, and what every op needs to get onto it: registration with torch, the fast-path guard.

An op's file defines its schema, implementation, fake, gradient, reference, ``supports`` and test cases, and
adds an ``Op`` here. Tests, benchmarks, ``convert`` and ``doctor`` find it in ``REGISTRY``.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sparseops import _native, env

LIBRARY = torch.library.Library("sparseops", "DEF")

KERNEL_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""The dtypes the kernels compute in, with their codes in csrc/ops.h."""


@dataclass(frozen=True)
class Case:
    """A named test case: ``make(dtype)`` returns the public function's arguments and keyword arguments."""

    name: str
    make: Callable[[torch.dtype], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Op:
    """One op.

    Attributes:
        name: its name, also in ``torch.ops.sparseops``.
        fn: the public function.
        reference: plain torch with the signature of ``fn``; runs on any device in any floating dtype.
        supports: called with the tensors of ``fn``, the reason why no kernel can run on them, or None.
        impls: a note on each kernel by (device type, instruction set or architecture).
        cases: the inputs every implementation is tested with.
        dtype: one of the first argument's that every kernel takes.
        differentiable: whether it has a gradient.
        prepare: called with the tensors of a weight when they have moved or changed.
        no_wgmma: called with the values of a weight, why the CUDA kernels by wgmma.sp cannot take it where
            others can, or None.
        kernel: called as ``supports``, the name of what runs; None for ops that ``cuda.kernel_name`` knows.
    """

    name: str
    fn: Callable[..., Any]
    reference: Callable[..., Any]
    supports: Callable[..., str | None]
    impls: Mapping[tuple[str, str], str]
    cases: tuple[Case, ...] = field(repr=False)
    dtype: torch.dtype = torch.float16
    differentiable: bool = True
    prepare: Callable[..., None] | None = None
    no_wgmma: Callable[..., str | None] | None = None
    kernel: Callable[..., str] | None = None

    def runs_on(self, device: str) -> bool:
        """Whether there is a kernel for this type of device."""
        return any(kind == device for kind, _ in self.impls)


REGISTRY: dict[str, Op] = {}
"""Every op by its name."""


def register(op: Op) -> None:
    """Put an op on the list."""
    if op.name in REGISTRY:
        raise ValueError(f"register: op must have a name of its own, got {op.name!r} again")
    REGISTRY[op.name] = op


def define(
    schema: str,
    *,
    impl: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
    vmap: Callable[..., tuple[Any, Any]],
    autocast: bool,
) -> torch._ops.OpOverload:
    """Register ``sparseops::<schema>`` and return the overload to call.

    ``impl`` serves every device. Without ``backward``, asking for a gradient is an error. With ``autocast``
    the op runs in the lower-precision dtype of the active autocast region, as ``torch.nn.functional.linear``
    does.
    """
    name = schema.partition("(")[0]
    qualified = f"sparseops::{name}"
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    torch.library.register_autograd(
        qualified, backward or partial(_no_gradient, name), setup_context=setup_context, lib=LIBRARY
    )
    torch.library.register_vmap(qualified, vmap, lib=LIBRARY)
    overload = getattr(torch.ops.sparseops, name).default
    if autocast:
        for device in ("cpu", "cuda"):
            LIBRARY.impl(name, _autocast(overload, device), f"Autocast{device.upper()}")
    return overload


def _no_gradient(name: str, *_: Any) -> None:
    raise RuntimeError(
        f"{name}: there is no gradient; call it under torch.no_grad(), or detach what needs one"
    )


def _autocast(overload: torch._ops.OpOverload, device: str) -> Callable[..., Tensor]:
    def cast_and_call(*args: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return overload(*(_cast(arg, dtype) for arg in args))

    return cast_and_call


def _cast(arg: Any, dtype: torch.dtype) -> Any:
    if isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != torch.float64:
        return arg.to(dtype)
    return arg


def autocast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """The arguments in the dtype of the active autocast region, if there is one for the device of ``x``: for
    what is composed of several ops."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return (x, *others)
    dtype = torch.get_autocast_dtype(device)
    return tuple(_cast(arg, dtype) for arg in (x, *others))


def on_gpu(x: Tensor) -> bool:
    """Whether the kernels for GPUs serve ``x``: it lies on one, or on the CPU while that stands for one."""
    return x.is_cuda or ((_native.emulated is not None or _native.interpreted) and x.is_cpu)


def no_kernel_reason(x: Tensor, values: Tensor | None = None) -> str | None:
    """Why no CPU kernel can run on ``x`` and ``values``, None if one can; looks at devices and dtypes alone,
    so that a layer's weight may stand in for the activations."""
    device = x.device.type
    if device != "cpu":
        return f"there is no {device.upper()} kernel"
    for tensor in (x,) if values is None else (x, values):
        if tensor.dtype not in KERNEL_DTYPES:
            return f"there is no kernel for {tensor.dtype}"
    if _native.C is None:
        return _native.error
    return _native.config_error


def cpu_isa() -> str:
    """The instruction set that the CPU kernels use.

    Raises:
        ValueError, RuntimeError: as ``_native.require`` does.
    """
    return str(_native.require("cpu_isa").cpu_isa())


_warned: set[tuple[str, str]] = set()


def fall_back(op: str, reason: str) -> None:
    """Say once per op and reason that the plain torch reference runs.

    Raises:
        ValueError: the reason is a bad ``SPARSEOPS_*`` variable.
    """
    if reason == _native.config_error:
        raise ValueError(reason)
    if (op, reason) not in _warned:
        _warned.add((op, reason))
        warnings.warn(f"{op}: {reason}; its plain torch reference runs instead", stacklevel=3)


def transform_reason() -> str | None:
    """Why the reference has to serve a derivative that ``register_autograd`` does not, None without one.

    Through the dispatcher torch.func's derivatives are an error and forward-mode tangents are lost.
    """
    if _compiling() or not _KNOWS_TRANSFORMS:
        return None
    if _forward_ad._current_level >= 0:
        return "there is no forward-mode derivative"
    if _functorch() is not None:
        derivatives = (_TransformType.Grad, _TransformType.Jvp)
        if any(level.key() in derivatives for level in torch._C._functorch.get_interpreter_stack()):
            return "there is no kernel for the derivatives of torch.func"
    return None


def cpu_impls(note: str) -> dict[tuple[str, str], str]:
    """The ``impls`` of an op that has a kernel for every CPU instruction set."""
    return {("cpu", isa): note for isa in env.CPU_ISAS}


FAST_ON_GPU = _native.C is not None and _native.fast_path
"""Whether the public functions may call CUDA kernels without going through torch's dispatcher."""

FAST = FAST_ON_GPU and not (_native.emulated or _native.interpreted)
"""The same for the CPU kernels, which do not run where the CPU stands for a GPU."""

try:
    _dispatch_modes = torch._C._len_torch_dispatch_stack
    _function_mode = torch._C._is_torch_function_mode_enabled
    _functorch = torch._C._functorch.peek_interpreter_stack
    _autocast_enabled = torch._C._is_any_autocast_enabled
    _tracing = torch._C._is_tracing
    _forward_ad = torch.autograd.forward_ad
    _forward_ad._current_level  # noqa: B018
    _TransformType = torch._C._functorch.TransformType
    _KNOWS_TRANSFORMS = True
except AttributeError:  # another torch has moved these private names: the dispatcher serves every call
    FAST = FAST_ON_GPU = _KNOWS_TRANSFORMS = False

_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled


def is_watched() -> bool:
    """Whether torch.compile, torch.jit.trace, a mode or functorch looks on, for whom a tensor may have no
    numbers to read."""
    return not _KNOWS_TRANSFORMS or bool(
        _compiling() or _dispatch_modes() or _functorch() is not None or _tracing()
    )


def fast(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None, index: Tensor | None = None) -> bool:
    """Whether a call may go straight to the CPU kernel, because the dispatcher would only have passed it on.

    It may not while torch.compile, torch.jit.trace or a mode watches, under functorch, autocast or
    forward-mode AD, for tensor subclasses, other devices, lazily negated tensors, and when a gradient is
    needed. Written out per argument, since the whole call takes a few microseconds.
    """
    return (
        FAST
        and not _compiling()
        and type(x) is Tensor
        and (type(values) is Parameter or type(values) is Tensor)
        and type(meta) is Tensor
        and x.is_cpu
        and values.is_cpu
        and meta.is_cpu
        and x.dtype in KERNEL_DTYPES
        and not (x.is_neg() or values.is_neg())
        and not (_grad_enabled() and (x.requires_grad or values.requires_grad))
        and (bias is None or _fast_bias(bias))
        and (index is None or (type(index) is Tensor and index.is_cpu))
        and not _dispatch_modes()
        and not _function_mode()
        and _functorch() is None
        and not _autocast_enabled()
        and not _tracing()
        and _forward_ad._current_level < 0
    )


def fast_on_gpu(x: Tensor, *others: Tensor | None) -> bool:
    """The same for a CUDA kernel, by the same rules."""
    return (
        FAST_ON_GPU
        and on_gpu(x)
        and not _compiling()
        and all(_is_plain(tensor) for tensor in (x, *others) if tensor is not None)
        and not _dispatch_modes()
        and not _function_mode()
        and _functorch() is None
        and not _autocast_enabled()
        and not _tracing()
        and _forward_ad._current_level < 0
    )


def _is_plain(tensor: Tensor) -> bool:
    return (
        (type(tensor) is Tensor or type(tensor) is Parameter)
        and on_gpu(tensor)
        and not tensor.is_neg()
        and not (tensor.requires_grad and _grad_enabled())
    )


def _fast_bias(bias: Tensor) -> bool:
    return (
        (type(bias) is Parameter or type(bias) is Tensor)
        and bias.is_cpu
        and not bias.is_neg()
        and not (bias.requires_grad and _grad_enabled())
    )
