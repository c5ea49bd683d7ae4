"""Every shipped configuration of every Triton kernel, compiled for three generations of GPUs without one.
None spills or wants more memory than there is, and matrices are multiplied on tensor cores.

It needs torch and Triton alone: ``pytest --noconftest tests/test_triton_aot.py``.
"""

from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from types import SimpleNamespace

import pytest
from triton_aot import (
    ARCHS,
    Compiled,
    compile_kernel,
    compile_signature,
    keep_cache,
    kernels,
    refusals,
    signatures,
)

triton = pytest.importorskip("triton")

from sparseops import env  # noqa: E402
from sparseops import triton as ours  # noqa: E402
from sparseops.triton.common import Signature, integers  # noqa: E402

pytestmark = pytest.mark.skipif(env.interpret(), reason="Triton interprets its kernels, and compiles none")

tl = triton.language
WORKERS = 2
ALIGNED = {"aligned": True, "odd": False}
SIGNATURES = signatures()

Job = tuple[str, int, bool]


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[Callable[..., Compiled]]:
    """What became of a job; those of every test that is going to run are begun at once."""
    jobs: dict[Job, Future[Compiled]] = {}
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn"), initializer=keep_cache) as pool:
        for item in request.session.items:
            given = getattr(item, "callspec", SimpleNamespace(params={})).params
            if {"name", "arch", "aligned"} <= given.keys():
                job = (given["name"], given["arch"], given["aligned"])
                jobs[job] = pool.submit(compile_signature, *job)
        yield lambda *job: jobs[job].result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("aligned", ALIGNED.values(), ids=ALIGNED)
@pytest.mark.parametrize("arch", ARCHS, ids=lambda arch: f"sm_{arch}")
@pytest.mark.parametrize("name", SIGNATURES)
def test_machine_code(
    name: str,
    arch: int,
    aligned: bool,
    compiled: Callable[..., Compiled],
    record_property: Callable[..., None],
) -> None:
    made = compiled(name, arch, aligned)
    record_property("registers", made.registers)
    record_property("shared", made.shared)
    print(f"{name} sm_{arch} {'aligned' if aligned else 'odd'}: {made}")
    assert refusals(SIGNATURES[name], arch, made) == []


def test_every_kernel_is_compiled() -> None:
    compiled = {id(signature.kernel) for signature in SIGNATURES.values()}
    assert [name for name, kernel in kernels().items() if id(kernel) not in compiled] == []


def test_every_configuration_is_compiled() -> None:
    compiled = [dict(signature.config) for signature in SIGNATURES.values()]
    for module in {name.split("/")[0] for name in SIGNATURES}:
        shipped = vars(importlib.import_module(f"sparseops.triton.{module}"))
        for config in [shipped["CONFIG"]] if "CONFIG" in shipped else shipped["CONFIGS"].values():
            assert config in compiled, module


def test_this_triton_is_one_that_is_supported() -> None:
    first, last = ours.VERSIONS
    assert first <= tuple(map(int, triton.__version__.split(".")[:2])) <= last


# ---- what the check sees


FINE = Compiled(100, 0, 1000, 0, ("mma.sync", "wgmma.mma_async", "tcgen05.mma"), True)


@pytest.mark.parametrize(
    ("arch", "change", "refusal"),
    [
        (80, {}, None),
        (80, {"stack": 8}, "spills: a stack of 8 bytes"),
        (80, {"shared": 163 * 1024}, None),
        (80, {"shared": 163 * 1024 + 1}, "166913 bytes of shared memory, and there are 166912"),
        (90, {"shared": 227 * 1024 + 1}, "232449 bytes of shared memory, and there are 232448"),
        (100, {"tensor_columns": 512}, None),
        (100, {"tensor_columns": 528}, "528 columns of tensor memory, and there are 512"),
        (90, {"stores": False}, "stores nothing"),
        (80, {"products": ()}, "no mma.sync"),
        (90, {"products": ("mma.sync",)}, "no wgmma.mma_async"),
        (100, {"products": ("mma.sync",)}, "no tcgen05.mma"),
    ],
)
def test_refusals(arch: int, change: dict[str, object], refusal: str | None) -> None:
    signature = Signature("s", None, {}, {}, {})
    found = refusals(signature, arch, FINE._replace(**change))
    assert found == ([] if refusal is None else [refusal])


def test_another_instruction_may_be_expected() -> None:
    made = FINE._replace(products=("mma.sync",))
    assert refusals(Signature("s", None, {}, {}, {}, instructions={100: "mma.sync"}), 100, made) == []
    none = Signature("s", None, {}, {}, {}, product=False)
    assert refusals(none, 90, made) == ["mma.sync where there is to be no product"]
    assert refusals(none, 90, FINE._replace(products=())) == []


@triton.jit
def greedy_kernel(x_ptr, y_ptr, n, N: tl.constexpr):
    """Holds a square of numbers in the registers of one warp."""
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i[:, None] * n + i[None, :])
    tl.store(y_ptr + i[:, None] * n + i[None, :], x + tl.sum(x) + tl.trans(x))


def test_a_spill_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    arguments = {"x_ptr": "*fp32", "y_ptr": "*fp32", **integers("n")}
    config = {"N": 128, "num_warps": 1, "num_stages": 1}
    made = compile_kernel(Signature("greedy", greedy_kernel, arguments, {}, config), 90, True)
    assert made.stack > 0 and made.stores and not made.products
