"""Why a GPU, real or imagined, cannot run a kernel: one sentence for warnings, reports and doctor."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sparseops
from sparseops import _native
from sparseops.formats import NM24
from sparseops.ops import REGISTRY, cuda, nm24_linear, registry

UNCACHED = cuda.gpu_reason.__wrapped__


def test_another_device_has_no_kernel():
    for op in REGISTRY.values():
        with FakeTensorMode():
            x = torch.empty(2, 32, device="xpu", dtype=op.dtype)
            assert op.supports(x) == "there is no XPU kernel"


@pytest.fixture
def gpu(monkeypatch):
    """Sets what was built, and which GPU there is to run it."""

    def set_gpu(module=None, capability=(9, 0)):
        monkeypatch.setattr(_native, "C", module and SimpleNamespace(**module))
        monkeypatch.setattr(_native, "error", "the reason")
        monkeypatch.setattr(cuda, "gpu_reason", UNCACHED)
        monkeypatch.setattr(cuda.torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(cuda.torch.cuda, "get_device_capability", lambda index: capability)

    return set_gpu


def built(cuda=True, archs="80+PTX;90a", error=None):
    return {
        "build_info": lambda: {"cuda": cuda, "cuda_archs": archs},
        "cuda_probe": lambda: {"error": error},
    }


@pytest.mark.parametrize(
    ("module", "capability", "reason"),
    [
        (None, (9, 0), "the reason"),
        (
            built(cuda=False),
            (9, 0),
            "sparseops was built without CUDA: reinstall it with SPARSEOPS_CUDA=1",
        ),
        (built(error="the driver is too old"), (9, 0), "the driver is too old"),
        (built(), None, "torch sees no GPU: install a torch that was built with CUDA"),
        (built(), (7, 5), "the GPU has compute capability 7.5, and the kernels need 8.0"),
        (
            built(archs="90a;100a"),
            (8, 6),
            "sparseops was built for GPU architectures 90a;100a, none of which this GPU (8.6) runs: "
            "build again with its architecture in TORCH_CUDA_ARCH_LIST",
        ),
        (built(), (9, 0), None),
    ],
)
def test_why_a_gpu_has_no_kernel(module, capability, reason, gpu):
    gpu(module, capability)
    for op in REGISTRY.values():
        with FakeTensorMode():
            x = torch.empty(2, 32, device="cuda", dtype=op.dtype)
            assert op.supports(x) == reason
            if op.dtype.is_floating_point:
                assert op.supports(x.double()) == "there is no CUDA kernel for torch.float64"


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        ("80", (8, 0), True),
        ("80", (8, 9), True),
        ("86", (8, 0), False),
        ("80", (9, 0), False),
        ("80+PTX", (9, 0), True),
        ("80+PTX;90a", (12, 1), True),
        ("90a", (9, 0), True),
        ("90a+PTX", (10, 0), False),
        ("100a;120", (10, 3), False),
        ("100f", (10, 3), True),
        ("100a;120", (12, 1), True),
        ("120+PTX", (10, 0), False),
    ],
)
def test_what_runs_on_a_gpu(archs, capability, runs):
    assert cuda.runs_on(archs, capability) is runs


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("op", [REGISTRY["nm24_linear"], REGISTRY["nm24_conv"]], ids=lambda op: op.name)
def test_f32_on_a_gpu_is_a_choice(op, precision, gpu, monkeypatch):
    gpu(built())
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    with FakeTensorMode():
        reason = op.supports(torch.empty(2, 32, 5, 5, device="cuda"))
    if precision == "medium":
        assert reason is None
    else:
        assert reason == (
            "no tensor core multiplies a float32 weight of 2:4, and torch.get_float32_matmul_precision() is "
            'not "medium", which would let the bfloat16 kernel run'
        )


def test_torch_may_refuse_to_name_its_precision(monkeypatch):
    def refuse():
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    assert cuda.takes_bf16() is False


def test_narrow_groups_on_a_gpu(gpu):
    gpu(built())
    supports = REGISTRY["nm24_conv"].supports
    with FakeTensorMode():
        x = torch.empty(2, 30, 5, 5, device="cuda", dtype=torch.float16)
        assert supports(x, groups=1) is supports(x, groups=1, channels=3) is None
        assert supports(x, groups=2) == "the CUDA kernel needs 16 channels in each group, got 15"
        assert supports(x, groups=2, channels=32) is None


def test_a_gpu_without_kernels_is_said_once(gpu, monkeypatch):
    """The CPU stands for a GPU that is too old: the weight is expanded, and multiplied densely."""
    weight = NM24.from_dense(torch.randn(6, 40), prune="magnitude")
    args = torch.randn(3, 40), weight.values, weight.meta
    y = nm24_linear(*args)
    gpu(built(archs="80"), (7, 5))
    monkeypatch.setattr(registry, "_warned", set())
    monkeypatch.setattr(registry, "FAST", False)
    monkeypatch.setattr(registry, "on_gpu", lambda x: True)
    reason = "the GPU has compute capability 7.5, and the kernels need 8.0"
    with pytest.warns(UserWarning) as said:
        torch.testing.assert_close(nm24_linear(*args), y)
        nm24_linear(*args)
    assert [str(w.message) for w in said] == [
        f"nm24_linear: {reason}; its plain torch reference runs instead"
    ]
    assert sparseops.SparseLinear(40, 6).kernel == f"reference: {reason}"
