"""``python -m benchmarks.gpu_small_set``: every op's small cases once on the GPU, with other plans, and a few
gradients.

For tools that watch a program and make it slow: compute-sanitizer. Results are compared with the reference on
the CPU, and a wrong one is an error.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_check import off
from benchmarks.gpu_contenders import forced, plans, text
from benchmarks.gpu_time import Call
from sparseops.ops import REGISTRY
from sparseops.ops.registry import Op
from sparseops.testing import expect

GRADIENTS = ("gt_tile", "tail")  # cases whose gradients are taken too
ENOUGH = 3  # other plans of a case


def calls(op: Op, args: Sequence[Any], kwargs: dict[str, Any], turn: int) -> Iterator[tuple[str, Call]]:
    """The op as it is, then with some other plans, which are different ones in each turn."""

    def call() -> Tensor:
        return op.fn(*args, **kwargs)

    yield "", call
    others = plans(call, wide=True)[1:]
    for i in range(min(ENOUGH, len(others))):
        plan = others[(turn * ENOUGH + i) % len(others)]
        yield text(plan), forced(call, plan)


def moved(args: Sequence[Any], device: torch.device) -> list[Any]:
    return [arg.to(device) if isinstance(arg, Tensor) else arg for arg in args]


def run_case(op: Op, name: str, dtype: torch.dtype, device: torch.device, turn: int) -> Iterator[str]:
    """Runs a case in some ways; gives what is wrong."""
    args, kwargs = next(case for case in op.cases if case.name == name).make(dtype)
    on_gpu = moved(args, device)
    for plan, call in calls(op, on_gpu, kwargs, turn):
        if fault := difference(op, args, kwargs, call()):
            yield f"{plan or 'plain'}: {fault}"
    if name in GRADIENTS and on_gpu[0].is_floating_point():
        leaves = [
            arg.detach().requires_grad_() if isinstance(arg, Tensor) and arg.is_floating_point() else arg
            for arg in on_gpu
        ]
        y = op.fn(*leaves, **kwargs)
        if isinstance(y, Tensor) and y.requires_grad:
            y.sum().backward()


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def difference(op: Op, args: Sequence[Any], kwargs: dict[str, Any], y: Any) -> str | None:
    """What is wrong with a result, None if nothing is."""
    if not isinstance(y, Tensor):  # pruning: bit for bit
        same = (bits(a.cpu()).equal(bits(b)) for a, b in zip(y, op.reference(*args, **kwargs), strict=True))
        return None if all(same) else "other bits than the reference's"
    return off(y.cpu(), expect(op, args, kwargs))


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status is 1 when a result was wrong."""
    what = "Every op's small cases on the GPU."
    options = argparse.ArgumentParser("python -m benchmarks.gpu_small_set", description=what)
    options.add_argument("--until", type=float, metavar="SECONDS", help="stop at this time (since 1970)")
    options.add_argument("--dry-run", action="store_true", help="on the CPU, and only a few")
    chosen = options.parse_args(argv)
    until = chosen.until or time.time() + 60
    device = torch.device("cpu" if chosen.dry_run else "cuda")
    torch.manual_seed(0)
    todo = [
        (op, case.name, dtype)
        for dtype in (torch.float16, torch.bfloat16)
        for op in REGISTRY.values()
        for case in op.cases[: 2 if chosen.dry_run else None]
    ]
    done, wrong = 0, list[str]()
    for op, name, dtype in todo:
        if time.time() > until:
            break
        args, _ = next(case for case in op.cases if case.name == name).make(dtype)
        if op.supports(*moved([arg for arg in args[:2] if isinstance(arg, Tensor)], device)):
            continue
        wrong += [f"{op.name} {name} {dtype}: {fault}" for fault in run_case(op, name, dtype, device, done)]
        done += 1
    if not chosen.dry_run:
        torch.cuda.synchronize()
    print("\n".join(wrong))
    print(f"{done} of {len(todo)} cases ran a kernel, {len(wrong)} wrong")
    return 1 if wrong or not done else 0


if __name__ == "__main__":
    sys.exit(main())
