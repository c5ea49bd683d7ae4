"""Triton's interpreter, made to compute as a GPU does and to notice what a GPU would not: for tests alone.

As a plugin of pytest (``-p triton_interpreter``) it is installed before anything imports Triton;
``run_tests`` starts a process in which it is. Differences of the interpreter of Triton 3.6 to 3.9 that it
takes away:

- NumPy 2.4 refuses ``int()`` of arrays of one element, which 3.6 does for every number of a kernel.
- bfloat16 is held as its bits: sums and products of them are nonsense, and float32 is cut off, not rounded.
- Products of float32 are exact even where ``input_precision`` asks for TF32.
- The larger of a number and NaN is NaN; on a GPU it is the number, unless ``propagate_nan`` is asked for.
- Every integer operation is checked for overflow, which doubles the time.

What it notices, by raising ``Access``: an address that lies in no tensor of the launch; two programs that
store to one address; a masked load that does not say what it takes instead, which on a GPU is anything.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).resolve().parent


class Access(AssertionError):
    """A program touched memory as it must not."""


def pytest_configure(config: Any) -> None:
    install()


def variables(**others: str) -> dict[str, str]:
    """The environment of a process whose kernels are Triton's, interpreted."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("SPARSEOPS_")}
    paths = [str(TESTS), *filter(None, [ours.get("PYTHONPATH")])]
    return {
        **ours,
        "PYTHONPATH": os.pathsep.join(paths),
        "TRITON_INTERPRET": "1",
        "SPARSEOPS_IMPL": "triton",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        **others,
    }


def run_tests(*arguments: str, timeout: float = 1800, **others: str) -> tuple[int, str]:
    """Run pytest with these arguments in the interpreter: how many tests passed, and what it printed.

    Raises:
        AssertionError: one failed.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "triton_interpreter"]
    done = subprocess.run(
        [*command, *arguments],
        env=variables(**others),
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1]), done.stdout  # type: ignore[index]


def install(*, checks: bool = True) -> None:
    """Change the interpreter of this process, once. ``checks=False`` leaves accesses alone."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "set it before Triton is imported"
    interpreter = importlib.import_module("triton.runtime.interpreter")
    builder = type(interpreter.interpreter_builder)
    if hasattr(builder, "sparseops_installed"):
        return
    builder.sparseops_installed = True
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options
    _take_one_element_arrays(interpreter)
    _compute_as_a_gpu(interpreter, builder)
    if checks:
        _check_accesses(interpreter, builder)


def _take_one_element_arrays(interpreter: Any) -> None:
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).item()))

    interpreter._patch_lang_tensor = patched


# ---- arithmetic


def widened(bits: np.ndarray) -> np.ndarray:
    """The float32 that the bits of bfloat16 stand for."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    """The bits of the bfloat16 that is nearest to float32, of two equally near ones the even one."""
    return np.where(np.isnan(values), np.uint16(0x7FC0), _rounded(values, 16) >> np.uint32(16)).astype(
        np.uint16
    )


def as_tf32(values: np.ndarray) -> np.ndarray:
    """float32 with the mantissa of TF32, 10 bits, rounded to nearest."""
    kept = (_rounded(values, 13) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), kept, values)


def _rounded(values: np.ndarray, dropped: int) -> np.ndarray:
    """The bits of float32, rounded to nearest, ties to even, at the last one before ``dropped``."""
    u = np.ascontiguousarray(values, np.float32).view(np.uint32)
    last = (u >> np.uint32(dropped)) & np.uint32(1)
    return u + np.uint32((1 << (dropped - 1)) - 1) + last


def _compute_as_a_gpu(interpreter: Any, builder: Any) -> None:
    tl = importlib.import_module("triton.language")
    torch = importlib.import_module("torch")
    handle, bf16 = interpreter.TensorHandle, tl.bfloat16
    tf32 = interpreter._ir.INPUT_PRECISION.TF32

    def is_bf16(operand: Any) -> bool:
        return operand.dtype.scalar == bf16

    def through_float32(convert: Any) -> Any:
        def converted(self: Any, source: Any, target: Any, *rest: Any) -> Any:
            if is_bf16(source):
                wide = handle(widened(source.data), tl.float32)
                return wide if target.scalar == tl.float32 else convert(self, wide, target, *rest)
            if target.scalar == bf16 and source.dtype.scalar != bf16:
                return handle(narrowed(source.data.astype(np.float32)), bf16)
            return convert(self, source, target, *rest)

        return converted

    binary, product = builder.binary_op, builder.create_dot

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not is_bf16(left):
            return binary(self, left, right, op)
        result = op(widened(left.data), widened(right.data))
        return handle(result if result.dtype == bool else narrowed(result), bf16)

    def dot(self: Any, a: Any, b: Any, sums: Any, precision: Any, *rest: Any) -> Any:
        if is_bf16(a):
            a, b = (handle(widened(x.data), tl.float32) for x in (a, b))
        elif a.dtype.scalar == tl.float32 and precision == tf32:
            a, b = (handle(as_tf32(x.data), tl.float32) for x in (a, b))
        return product(self, a, b, sums, precision, *rest)

    def erf(self: Any, argument: Any) -> Any:
        data = torch.from_numpy(np.ascontiguousarray(argument.data))
        return handle(torch.erf(data).numpy(), argument.dtype.scalar)

    builder.create_maxnumf = lambda self, left, right: self.binary_op(left, right, np.fmax)
    builder.create_minnumf = lambda self, left, right: self.binary_op(left, right, np.fmin)
    builder.cast_impl = through_float32(builder.cast_impl)
    builder.create_fp_to_fp = through_float32(builder.create_fp_to_fp)
    builder.binary_op, builder.create_dot, builder.create_erf = binary_op, dot, erf


# ---- accesses


class _Launch:
    """The memory that a launch may touch, and what its programs have stored."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, int]] = []
        self.bounds: tuple[np.ndarray, np.ndarray] | None = None
        self.stored: list[tuple[np.ndarray, int]] = []
        self.programs: list[tuple[int, ...]] = []

    def add(self, tensor: Any) -> None:
        if tensor.numel():
            last = sum(
                (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
            )
            start = tensor.data_ptr()
            self.spans.append((start, start + (last + 1) * tensor.element_size()))
            self.bounds = None

    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the memory starts and ends, tensors that touch taken as one."""
        if self.bounds is None:
            merged: list[list[int]] = []
            for start, end in sorted(self.spans):
                if merged and start <= merged[-1][1]:
                    merged[-1][1] = max(merged[-1][1], end)
                else:
                    merged.append([start, end])
            starts, ends = np.array(merged, np.uint64).reshape(-1, 2).T
            self.bounds = starts, ends
        return self.bounds

    def check(self, kind: str, pointers: Any, mask: Any, program: tuple[int, ...]) -> np.ndarray:
        """The addresses behind ``pointers`` where ``mask`` is set, all inside a tensor."""
        where = True if mask is None else mask.data
        addresses = pointers.data[np.broadcast_to(where, pointers.data.shape)]
        if not addresses.size:
            return addresses
        starts, ends = self._bounds()
        size = np.uint64(max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        if not starts.size:
            raise Access(f"program {program} {kind}s, and the launch has no tensor")
        span = np.searchsorted(starts, addresses, side="right").astype(np.int64) - 1
        outside = (span < 0) | (addresses + size > ends[np.maximum(span, 0)])
        if outside.any():
            count = int(outside.sum())
            raise Access(
                f"program {program} {kind}s outside of every tensor, {count} of {addresses.size} addresses"
            )
        return addresses

    def store(self, addresses: np.ndarray, program: tuple[int, ...]) -> None:
        if not self.programs or self.programs[-1] != program:
            self.programs.append(program)
        self.stored.append((np.unique(addresses), len(self.programs) - 1))

    def finish(self) -> None:
        """No address was stored to by two programs."""
        if not self.stored:
            return
        addresses = np.concatenate([a for a, _ in self.stored])
        owners = np.concatenate([np.full(a.size, owner) for a, owner in self.stored])
        order = np.lexsort((owners, addresses))
        addresses, owners = addresses[order], owners[order]
        clash = (addresses[1:] == addresses[:-1]) & (owners[1:] != owners[:-1])
        if clash.any():
            at = int(clash.argmax())
            first, second = (self.programs[owners[i]] for i in (at, at + 1))
            raise Access(f"programs {first} and {second} store to one address ({int(clash.sum())} such)")


def _check_accesses(interpreter: Any, builder: Any) -> None:
    current = _Launch()
    convert, call = interpreter._implicit_cvt, interpreter.GridExecutor.__call__
    masked_load, masked_store = builder.create_masked_load, builder.create_masked_store
    update, exchange = builder.create_atomic_rmw, builder.create_atomic_cas

    def implicit_cvt(argument: Any) -> Any:
        if hasattr(argument, "data_ptr"):
            current.add(argument)
        return convert(argument)

    def launch(self: Any, *arguments: Any, **options: Any) -> None:
        nonlocal current
        current = _Launch()
        call(self, *arguments, **options)
        current.finish()

    def load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any, **options: Any) -> Any:
        current.check("load", pointers, mask, self.grid_idx)
        if other is None and mask is not None and not np.all(mask.data):
            raise Access(f"program {self.grid_idx} loads with a mask and no `other`")
        return masked_load(self, pointers, mask, other, *rest, **options)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        current.store(current.check("store", pointers, mask, self.grid_idx), self.grid_idx)
        return masked_store(self, pointers, value, mask, *rest, **options)

    def atomic(change: Any, mask_at: int | None) -> Any:
        def checked(self: Any, *operands: Any) -> Any:
            pointers = operands[0] if mask_at is None else operands[1]
            current.check("update", pointers, None if mask_at is None else operands[mask_at], self.grid_idx)
            return change(self, *operands)

        return checked

    interpreter._implicit_cvt, interpreter.GridExecutor.__call__ = implicit_cvt, launch
    builder.create_masked_load, builder.create_masked_store = load, store
    builder.create_atomic_rmw, builder.create_atomic_cas = atomic(update, 3), atomic(exchange, None)
