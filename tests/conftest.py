"""What tests share: poisoned memory, a seed, a run per instruction set, hypothesis' profile, calls of ops,
and what a failed conversion must leave alone."""

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparseops import _measure, _native, env
from sparseops.ops import REGISTRY, cuda, dispatch
from sparseops.ops.common import make_bias, make_weight
from sparseops.ops.dispatch import Tile
from sparseops.testing import assert_close, expect

# no example database and no clock: every run tries the same examples
hypothesis.settings.register_profile("sparseops", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("sparseops")

# where tensors lie that CUDA kernels serve, None where none does
GPU = "cuda" if torch.cuda.is_available() else "cpu" if _native.emulated else None
# the kind of device whose kernels tensors on the CPU are served by
DEVICE = "cuda" if _native.emulated else "cpu"
# whether that GPU takes the kernels for sm_90a
RUNS_SM90 = GPU is not None and cuda.no_sm90_reason(torch.device(GPU)) is None
# a dtype that they take
KERNEL_DTYPE = torch.float16 if _native.emulated else torch.float32
ISAS = [isa for isa in env.CPU_ISAS if _native.C is not None and _native.C.cpu_supports(isa)]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill every uninitialised tensor with NaN, so that an element that no kernel wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=ISAS or ["missing"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that was built and that this processor has, in use while the test runs."""
    module = _native.require("tests")
    before = module.cpu_isa()
    module.cpu_use_isa(request.param)
    yield request.param
    module.cpu_use_isa(before)


# the tiles of csrc/cuda, as the built module lists them
TILES = {
    name: Tile(code, name, *sizes)
    for code, (name, *sizes) in enumerate(
        [
            ("few8", 32, 8, 128, 1, 80),
            ("few16", 32, 16, 128, 1, 80),
            ("small", 64, 64, 64, 1, 80),
            ("large", 128, 128, 64, 1, 80),
            ("sm90_128x8", 128, 8, 128, 2, 90),
            ("sm90_128x16", 128, 16, 128, 2, 90),
            ("sm90_128x32", 128, 32, 128, 2, 90),
            ("sm90_128x64", 128, 64, 128, 2, 90),
            ("sm90_128x128", 128, 128, 128, 2, 90),
            ("sm90_128x256", 128, 256, 128, 2, 90),
            ("sm90_256x128", 256, 128, 128, 2, 90),
            ("sm90_192x192", 192, 192, 128, 3, 90),
            ("sm90_rs_128x256", 128, 256, 128, 2, 90),
            ("sm90_rs_256x128", 256, 128, 128, 2, 90),
        ]
    )
}

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
CASES = [pytest.param(op, case, id=f"{op.name}-{case.name}") for op in REGISTRY.values() for case in op.cases]
SMOOTH_CASES = [case for case in CASES if case.values[0].differentiable]
LAYERS = [REGISTRY[name] for name in ("nm24_linear", "nm24_conv", "channel_linear", "channel_conv")]
LINEAR, CONV, INT8, F8 = PRODUCTS = [*LAYERS[:2], REGISTRY["nm24_linear_i8"], REGISTRY["nm24_linear_f8"]]
HALVES = {"bf16": torch.bfloat16, "f16": torch.float16}

every_case = pytest.mark.parametrize(("op", "case"), CASES)
every_smooth_case = pytest.mark.parametrize(("op", "case"), SMOOTH_CASES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
every_half = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
every_layer = pytest.mark.parametrize("op", LAYERS, ids=lambda op: op.name)


def layout(y):
    if isinstance(y, tuple):
        return tuple(map(layout, y))
    return y.shape, y.stride(), y.dtype


def bits(t):
    return t.contiguous().view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    )


def is_same(a, b):
    """Whether two results are equal; of the op that only moves numbers, bit for bit."""
    if isinstance(a, tuple):
        return all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b)


def assert_result(op, y, args, kwargs):
    if isinstance(y, tuple):
        assert is_same(y, op.reference(*args, **kwargs))
    else:
        assert_close(y, expect(op, args, kwargs))


def case_of(op, name="tail"):
    return next(case for case in op.cases if case.name == name)


def state(model):
    """Everything about a model that a failed conversion must not touch."""
    return (
        {name: (id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)},
        {name: (id(tensor), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()},
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: sorted(vars(module)) for name, module in model.named_modules()},
    )


def assert_untouched(model, before):
    after = state(model)
    assert after[0] == before[0]
    assert after[1] == before[1]
    assert after[2].keys() == before[2].keys()
    for name, value in after[2].items():
        torch.testing.assert_close(value, before[2][name], rtol=0, atol=0, equal_nan=True)
    assert after[3] == before[3]


def moved(t, device):
    """``t`` on another device with its strides, its place in its storage, and its negative bit."""
    if not isinstance(t, torch.Tensor):
        return t
    with torch.no_grad():
        storage = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(device)
        there = storage.as_strided(t.size(), t.stride(), t.storage_offset())
        return torch._neg_view(there) if t.is_neg() else there


class Native:
    """The built module, with a note of the kernels that were called."""

    def __init__(self, module):
        self.module, self.calls = module, []

    def __getattr__(self, name):
        if name.startswith("nm24_"):
            self.calls.append(name)
        return getattr(self.module, name)

    def taken(self):
        calls, self.calls = self.calls, []
        return calls


def host(y):
    return tuple(map(host, y)) if isinstance(y, tuple) else y.detach().cpu()


def assert_gpu_result(op, y, args, kwargs):
    """``y``, from a GPU, is what the op gives for ``args``, which lie on the CPU."""
    if isinstance(y, tuple):
        for got, expected in zip(host(y), op.reference(*args, **kwargs), strict=True):
            assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
    else:
        assert_close(host(y), expect(op, args, kwargs))


def call_on_gpu(op, args, kwargs):
    return op.fn(*(moved(arg, GPU) for arg in args), **kwargs)


def cut(monkeypatch, tile, splits, cluster=1, blocks=None):
    """Let every product be cut like this; returns the plans that were made."""
    plans = []

    def plan(op, product, multiprocessors, allowed):
        assert tile in allowed
        shape = dispatch.built_tiles()[tile]
        rows = -(-product.rows // product.groups // shape.features)
        tiles = rows * product.groups * -(-product.tokens // shape.tokens)
        plans.append(dispatch.Plan(shape, splits, tiles, cluster))
        return plans[-1]

    monkeypatch.setattr(dispatch, "plan", plan)
    if blocks is not None:
        monkeypatch.setattr(cuda, "multiprocessors", lambda device: blocks)
    return plans


def linear_inputs(rows, tokens, dtype):
    """Arguments with a bias and a residual, of 700 features."""
    generator = torch.Generator().manual_seed(tokens)
    weight = make_weight((rows, 700), dtype, generator)
    x = torch.randn((tokens, 700), generator=generator).to(dtype)
    residual = torch.randn((tokens, rows), generator=generator).to(dtype)
    return x, weight.values, weight.meta, make_bias(rows, dtype, generator), residual


def byte_inputs(rows, tokens, dtype, out_dtype):
    """The same of a product of 8-bit elements, without a residual."""
    generator = torch.Generator().manual_seed(tokens)
    weight = make_weight((rows, 700), torch.float32, generator)
    values = (weight.values * 1000).clamp(-128, 127).to(dtype)
    x = torch.randint(-128, 128, (tokens, 700), generator=generator).to(dtype)
    scales = [torch.rand(n, generator=generator) / 100 for n in (tokens, rows)]
    return x, values, weight.meta, *scales, make_bias(rows, out_dtype, generator)


class Dispatched(TorchDispatchMode):
    """Records the calls of our ops that come through the dispatcher."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sparseops":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


class Wrapper(torch.nn.Module):
    """An op with all but its first argument as state."""

    def __init__(self, op, args, kwargs):
        super().__init__()
        self.op, self.kwargs = op, kwargs
        self.names = [f"argument_{i}" for i in range(1, len(args))]
        for name, arg in zip(self.names, args[1:], strict=True):
            if arg is not None and arg.is_floating_point():
                self.register_parameter(name, torch.nn.Parameter(arg))
            else:
                self.register_buffer(name, arg)

    def forward(self, x):
        return self.op.fn(x, *(getattr(self, name) for name in self.names), **self.kwargs)


def program(folder: Path, name: str, text: str) -> Path:
    """A program that stands for another on PATH: a bash script of one text."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)
    return file


@pytest.fixture
def whole_f32():
    """No TF32 in torch's convolutions, which serve float32 here."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def always_faster(monkeypatch):
    """Pretend that sparse layers take half the time: no test may depend on how busy the machine is."""
    monkeypatch.setattr(_measure, "_alternate", lambda dense, sparse, device: (2.0, 1.0))


@pytest.fixture
def native(monkeypatch):
    module = Native(_native.C)
    monkeypatch.setattr(_native, "C", module)
    return module
