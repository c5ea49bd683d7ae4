"""Running a model on example inputs: which layers win, are the sparse ones right, who reads their weights."""

from __future__ import annotations

import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from sparseops.nn import SparseModule

T = TypeVar("T")

Replacements = Mapping[int, SparseModule]
"""Sparse layers by the id of the dense layer each would replace."""

MIN_RUNS, MAX_RUNS = 3, 50
SECONDS_PER_LAYER = 0.25

# Layers of which an output is a sum of products and the bias.
_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d)

# A sparse and a dense sum of the same products differ by rounding alone. Whole outputs are compared against
# their largest element, because later layers mix the elements.
_MODEL_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-6}
_MODEL_TOLERANCE_F32 = 1e-3


@dataclass(frozen=True)
class Timing:
    """Median times of one layer on the input it got in the model."""

    ms_before: float
    ms_after: float
    input_shape: tuple[int, ...]


@dataclass(frozen=True)
class Inputs:
    """Arguments of one call of the model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, example: Any, caller: str = "convert") -> Inputs:
        """A tensor is the one argument, a tuple the arguments, a dict the keyword arguments. caller: the
        function that a user called, which errors begin with.

        Raises:
            TypeError: ``example`` is none of these.
        """
        if isinstance(example, Tensor):
            return cls((example,), {})
        if isinstance(example, tuple):
            return cls(example, {})
        if isinstance(example, dict) and all(isinstance(key, str) for key in example):
            return cls((), example)
        raise TypeError(
            f"{caller}: example_inputs must be a tensor, a tuple of arguments or a dict of keyword "
            f"arguments, got {type(example).__name__}"
        )


def trial(
    model: nn.Module, replacements: Mapping[int, nn.Module], caller: str = "convert"
) -> tuple[nn.Module, dict[int, nn.Module]]:
    """A copy of ``model`` in eval mode, with layers replaced, to try things on; its modules by original id.

    The copy shares the parameters, which a forward does not change, and has buffers of its own, which it may.
    """
    memo: dict[int, Any] = {id(p): p for p in model.parameters()}
    memo |= replacements
    twin = copy_model(model, memo, caller).eval()
    return twin, {id(module): memo[id(module)] for module in model.modules() if id(module) in memo}


def copy_model(model: T, memo: dict[int, Any], caller: str = "convert") -> T:
    """``copy.deepcopy`` of a model or of what it holds.

    Raises:
        RuntimeError: the model cannot be copied.
    """
    try:
        return copy.deepcopy(model, memo)
    except Exception as exc:
        cure = " (inplace=True without example_inputs needs no copy)" if caller == "convert" else ""
        raise RuntimeError(
            f"{caller}: model must survive copy.deepcopy, got {type(exc).__name__}: {exc}{cure}"
        ) from exc


def run(model: nn.Module, inputs: Inputs) -> Any:
    """One eager forward on copies of the inputs.

    Random numbers are the same at each call, since the generators are put back as they were.
    """
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in tensors((inputs.args, inputs.kwargs))}
    args, kwargs = copy.deepcopy((inputs.args, inputs.kwargs), memo)
    # Hooks on layers are not called inside a compiled part. (set_stance would import the compiler.)
    eager = "torch._dynamo" in sys.modules
    stance = torch.compiler.set_stance("force_eager") if eager else nullcontext()
    with torch.random.fork_rng(), stance:
        return model(*args, **kwargs)


def weight_readers(model: nn.Module, layers: Collection[int], inputs: Inputs) -> dict[int, str]:
    """Of ``layers`` (ids) those whose weight is used outside their own forward, with what used it."""
    twin, twins = trial(model, {})
    watch = _WeightWatch(
        {id(p): key for key in layers for p in twins[key].parameters(recurse=False) if p.dim() >= 2}
    )
    for key in layers:
        twins[key].register_forward_pre_hook(watch.enter(key))
        twins[key].register_forward_hook(watch.leave, always_call=True)
    with watch:
        run(twin, inputs)
    return watch.found


def output_layers(model: nn.Module, layers: Collection[int], inputs: Inputs) -> set[int]:
    """Of ``layers`` (ids) those whose output is, or lies in the memory of, an output of the model; where
    there is none, because something computes the model's outputs from it, the one that was called last."""
    twin, twins = trial(model, {})
    made: dict[StorageWeakRef, int] = {}
    last: list[int] = []

    def note(key: int) -> Callable[..., None]:
        def after_forward(layer: nn.Module, args: Any, output: Any) -> None:
            last[:] = [key]
            # Weak, so that no activation is kept, and the memory of one that is gone is not taken for it.
            made.update(dict.fromkeys(_storages(output), key))

        return after_forward

    for key in layers:
        twins[key].register_forward_hook(note(key))
    outputs = run(twin, inputs)
    stored = set(_storages(outputs))
    return {key for storage, key in made.items() if storage in stored} or set(last)


def _storages(tree: Any) -> list[StorageWeakRef]:
    return [StorageWeakRef(t.untyped_storage()) for t in tensors(tree) if t.layout == torch.strided]


class _WeightWatch(TorchFunctionMode):
    """Notices calls of torch functions that turn a watched weight into another tensor."""

    def __init__(self, owners: dict[int, int]) -> None:
        super().__init__()
        self.owners = owners
        self.inside: list[int] = []
        self.found: dict[int, str] = {}

    def enter(self, key: int) -> Callable[..., None]:
        return lambda *_: self.inside.append(key)

    def leave(self, *_: Any) -> None:
        self.inside.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for arg in tensors((args, kwargs)):
            key = self.owners.get(id(arg))
            # Reading weight.dtype or weight.shape does not need its elements.
            if key is not None and key not in self.inside and any(True for _ in tensors(result)):
                self.found.setdefault(key, getattr(func, "__name__", str(func)))
        return result


def measure(
    model: nn.Module, replacements: Replacements, inputs: Inputs, advance: Callable[[], None]
) -> dict[int, Timing]:
    """Time each dense layer of ``model`` against its replacement on the input it gets, and check the result.

    Layers are timed where they stand in one forward of the dense model, so that no activation is kept; a
    layer that is called several times is timed at its first call, one that is not called is missing from the
    answer.

    Raises:
        RuntimeError: a sparse layer differs from the dense layer with the same weight by more than rounding.
    """
    twin, twins = trial(model, {})
    timings: dict[int, Timing] = {}
    names = {id(module): name for name, module in model.named_modules()}

    def timer(key: int) -> Callable[..., None]:
        def before_forward(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if key in timings:
                return
            sparse = replacements[key]
            x = next(tensors((args, kwargs)))
            if isinstance(layer, _LINEAR):
                check_layer(names[key], sparse, x)
            else:
                check_outputs(names[key], sparse, Inputs(args, kwargs))
            before, after = _alternate(
                lambda: layer.forward(*args, **kwargs), lambda: sparse.forward(*args, **kwargs), x.device
            )
            timings[key] = Timing(before, after, tuple(x.shape))
            advance()

        return before_forward

    for key in replacements:
        twins[key].register_forward_pre_hook(timer(key), with_kwargs=True)
    run(twin, inputs)
    return timings


def check_layer(name: str, sparse: SparseModule, x: Tensor) -> None:
    """Compare a sparse layer with the dense layer of the same weight, element by element.

    Bound: 2 eps(output) |y| + 2 sqrt(n) eps(float32) (|w| * |x| + |b|) with n products per output: the
    expected growth of rounding errors in a float32 sum (Higham and Mary 2019, "A new approach to
    probabilistic rounding error analysis"), and one more eps(output) for inputs that autocast rounds.

    Raises:
        RuntimeError: an element differs by more; the text says by how much and where.
    """
    found = sparse.forward(x)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        dense = sparse.to_dense().to(wide)
        expected = dense.forward(x.to(wide))
        for parameter in dense.parameters():
            parameter.data.abs_()
        products = dense.forward(x.to(wide).abs())
    if found.shape != expected.shape:
        raise RuntimeError(
            f"convert: output of layer {name!r} must have shape {tuple(expected.shape)}, "
            f"got {tuple(found.shape)}"
        )
    eps_out, eps_sum = torch.finfo(found.dtype).eps, torch.finfo(wide).eps
    depth = math.prod(sparse.weight_shape[1:])
    rounded_inputs = eps_out if found.dtype != x.dtype else 0.0
    bound = 2 * eps_out * expected.abs() + (2 * depth**0.5 * eps_sum + rounded_inputs) * products
    _compare(f"convert: output of layer {name!r}", found, expected, bound)


def check_outputs(name: str, sparse: SparseModule, inputs: Inputs) -> None:
    """Compare a sparse layer whose output is no sum of products with the dense layer of the same weights, as
    ``check_model`` compares models.

    Raises:
        RuntimeError: they differ.
    """
    masked = sparse.to_dense()
    results = (module.forward(*inputs.args, **inputs.kwargs) for module in (masked, sparse))
    _compare_all("convert", f"layer {name!r}", *results)


def check_model(sparse: nn.Module, masked: nn.Module, inputs: Inputs, caller: str = "convert") -> None:
    """Compare the floating-point outputs of the sparse model with those of the masked dense model.

    Raises:
        RuntimeError: they differ in number or shape, or an element by more than the dtype's tolerance times
            the largest element.
    """
    _compare_all(caller, "the sparse model", run(masked, inputs), run(sparse, inputs))


def _compare_all(caller: str, what: str, masked: Any, sparse: Any) -> None:
    """Compare all tensors in the outputs of ``what`` with those of its masked dense form."""
    expected, found = list(tensors(masked)), list(tensors(sparse))
    shapes = [[tuple(t.shape) for t in outputs] for outputs in (expected, found)]
    if shapes[0] != shapes[1]:
        raise RuntimeError(f"{caller}: outputs of {what} must have shapes {shapes[0]}, got {shapes[1]}")
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if theirs.layout != torch.strided:
            ours, theirs = ours.to_dense(), theirs.to_dense()
        if not theirs.is_floating_point() or not theirs.numel():
            continue
        largest = theirs.detach().abs().nan_to_num(0.0, 0.0, 0.0).amax()
        bound = _MODEL_TOLERANCE.get(theirs.dtype, _MODEL_TOLERANCE_F32) * largest.to(torch.float32)
        _compare(f"{caller}: output {number} of {what}", ours, theirs, bound)


def _compare(what: str, found: Tensor, expected: Tensor, bound: Tensor) -> None:
    rounded = expected.to(found.dtype)
    difference = (found.double() - rounded.double()).abs()
    # Where the expected value is infinite or NaN (the weights may hold such), a finite answer is wrong.
    wrong = torch.where(rounded.isfinite(), ~(difference <= bound), found.isfinite())
    if wrong.any():
        worst = wrong.nonzero()[0].tolist()
        raise RuntimeError(
            f"{what} must equal that of the masked dense one within rounding, "
            f"got {int(wrong.sum())} wrong elements, the first at {worst}: "
            f"{float(found[tuple(worst)])} for {float(rounded[tuple(worst)])}"
        )


def _alternate(
    dense: Callable[[], Any], sparse: Callable[[], Any], device: torch.device
) -> tuple[float, float]:
    """Median milliseconds of both, run in turn so that a busy machine is equally unfair to them."""
    times: tuple[list[float], list[float]] = ([], [])
    for fn in (dense, sparse):
        fn()
    deadline = time.perf_counter() + SECONDS_PER_LAYER
    for done in range(MAX_RUNS):
        if done >= MIN_RUNS and time.perf_counter() > deadline:
            break
        for fn, its in zip((dense, sparse), times, strict=True):
            _synchronize(device)
            start = time.perf_counter()
            fn()
            _synchronize(device)
            its.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[0]), statistics.median(times[1])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples, dicts and objects with fields (dataclasses, model outputs)."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors(item)
    elif hasattr(tree, "__dataclass_fields__") and not isinstance(tree, type):
        for name in tree.__dataclass_fields__:
            yield from tensors(getattr(tree, name))


_shown: ContextVar[bool] = ContextVar("_shown", default=False)


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Callable[[], None]]:
    """A progress bar on standard error when that is a terminal; yields what moves it on by one. Of a bar
    within another one nothing is shown."""
    if not sys.stderr.isatty() or _shown.get():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    token = _shown.set(True)
    try:
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(description, total=total)
            yield lambda: bar.advance(task)
    finally:
        _shown.reset(token)
