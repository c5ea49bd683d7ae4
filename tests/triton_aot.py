"""Triton kernels compiled without a GPU, and what their machine code says of itself.

Every module of ``sparseops.triton`` that has ``AOT`` is found. Triton must not be in interpreter mode.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

TREE = Path(__file__).resolve().parent.parent
CACHE = TREE / "build" / "triton"


class Arch(NamedTuple):
    """What a GPU has: shared memory of a block in bytes, the instruction that matrices are multiplied by."""

    shared: int
    product: str


ARCHS = {
    80: Arch(163 * 1024, "mma.sync"),
    90: Arch(227 * 1024, "wgmma.mma_async"),
    100: Arch(227 * 1024, "tcgen05.mma"),
}
TENSOR_COLUMNS = 512
"""Of tensor memory. Triton up to 3.8 does not refuse a kernel that wants more: it makes it one ``trap``."""


class Compiled(NamedTuple):
    """A kernel as the driver would load it. ``stack``: bytes, which without calls are spilled registers.
    ``shared`` in bytes, ``tensor_columns`` of tensor memory. ``products``: the instructions on matrices."""

    registers: int
    stack: int
    shared: int
    tensor_columns: int
    products: tuple[str, ...]
    stores: bool


def signatures() -> dict[str, Any]:
    """Every ``Signature`` by ``module/name``."""
    package = importlib.import_module("sparseops.triton")
    found = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(package.__path__)):
        for signature in getattr(importlib.import_module(f"sparseops.triton.{module}"), "AOT", ()):
            name = f"{module}/{signature.name}"
            assert name not in found, f"{name} is there twice"
            found[name] = signature
    return found


def kernels() -> dict[str, Any]:
    """Every kernel of the package that is launched, by ``module.function``."""
    package = importlib.import_module("sparseops.triton")
    found = {}
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"sparseops.triton.{info.name}")
        for name, value in vars(module).items():
            is_kernel = hasattr(value, "arg_names") and name.endswith("_kernel")
            if is_kernel and value.fn.__module__ == module.__name__:
                found[f"{info.name}.{name}"] = value
    return found


def keep_cache() -> None:
    """Let Triton keep what it compiles below build/: what has not changed costs nothing the next time."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE))


def compile_signature(name: str, arch: int, aligned: bool) -> Compiled:
    """Compile one; ``aligned``: pointers and numbers are multiples of 16 where the signature allows it."""
    return compile_kernel(signatures()[name], arch, aligned)


def compile_kernel(signature: Any, arch: int, aligned: bool) -> Compiled:
    triton = importlib.import_module("triton")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", arch, 32)
    config = dict(signature.config)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    constants = {**signature.constants, **config}
    constants |= {name: None for name, kind in signature.arguments.items() if kind is None}
    names = signature.kernel.arg_names
    given = {name: kind for name, kind in signature.arguments.items() if kind is not None}
    assert {*given, *constants} == set(names), f"{signature.name}: {({*given, *constants}) ^ {*names}}"
    sure = {*given} - {*signature.unaligned} if aligned else {*signature.aligned}
    even = [i for i, name in enumerate(names) if name in sure]
    source = importlib.import_module("triton.compiler").ASTSource(
        fn=signature.kernel,
        signature={name: given.get(name, "constexpr") for name in names},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in even},
    )
    made = triton.compile(source, target=target, options=options)
    registers, stack = usage(made.asm["cubin"])
    ptx = made.asm["ptx"]
    products = re.findall(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx)
    return Compiled(
        registers,
        stack,
        made.metadata.shared,
        getattr(made.metadata, "tmem_size", None) or 0,
        tuple(sorted(set(products))),
        "st.global" in ptx,
    )


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack."""
    triton = importlib.import_module("triton")
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", said)
    return int(registers), int(stack)


def refusals(signature: Any, arch: int, made: Compiled) -> list[str]:
    """Why a compiled kernel must not be shipped, nothing if it may."""
    limits = ARCHS[arch]
    found = []
    if made.stack:
        found.append(f"spills: a stack of {made.stack} bytes")
    if made.shared > limits.shared:
        found.append(f"{made.shared} bytes of shared memory, and there are {limits.shared}")
    if made.tensor_columns > TENSOR_COLUMNS:
        found.append(f"{made.tensor_columns} columns of tensor memory, and there are {TENSOR_COLUMNS}")
    if not made.stores:
        found.append("stores nothing")
    product = signature.instructions.get(arch, limits.product) if signature.product else None
    if product is not None and product not in made.products:
        found.append(f"no {product}")
    if not signature.product and made.products:
        found.append(f"{', '.join(made.products)} where there is to be no product")
    return found
