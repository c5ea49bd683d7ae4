"""Why a GPU, real or imagined, cannot run a kernel: one sentence for warnings, reports and doctor."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sparseops
from sparseops import _native, triton
from sparseops.formats import NM24
from sparseops.nn.base import SparseModule
from sparseops.ops import REGISTRY, cuda, dispatch, nm24_linear, registry
from sparseops.ops.conv_geometry import geometry_of, no_wgmma_reason, output_size

CUDA_OPS = [op for op in REGISTRY.values() if ("cuda", "sm_80+") in op.impls]
UNCACHED = cuda.gpu_reason.__wrapped__
UNCACHED_SM90 = cuda.no_sm90_reason.__wrapped__


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
        monkeypatch.setattr(triton, "no_triton_reason", lambda x: "there is no Triton here")
        monkeypatch.setattr(cuda, "gpu_reason", UNCACHED)
        monkeypatch.setattr(cuda, "no_sm90_reason", UNCACHED_SM90)
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
    for op in CUDA_OPS:
        with FakeTensorMode():
            x = torch.empty(2, 32, device="cuda", dtype=op.dtype)
            assert op.supports(x) == reason
            if op.dtype.itemsize > 1:
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


NO_SM90A = "sparseops was built without sm_90a: build again with 9.0a in TORCH_CUDA_ARCH_LIST"


@pytest.mark.parametrize(
    ("archs", "capability", "reason"),
    [
        ("80+PTX;90a", (9, 0), None),
        ("90a", (9, 0), None),
        ("80+PTX", (9, 0), NO_SM90A),
        ("80+PTX;190a", (9, 0), NO_SM90A),
        ("80+PTX;90a", (8, 0), "the GPU has compute capability 8.0, and wgmma.sp needs 9.0"),
        ("80+PTX;90a", (10, 0), "the GPU has compute capability 10.0, and wgmma.sp needs 9.0"),
        ("80+PTX;90a", (12, 0), "the GPU has compute capability 12.0, and wgmma.sp needs 9.0"),
    ],
)
def test_which_gpu_takes_the_tiles_of_sm90(archs, capability, reason, gpu):
    gpu(built(archs=archs), capability)
    assert cuda.no_sm90_reason(torch.device("cuda", 0)) == reason
    with FakeTensorMode():
        x = torch.empty(2, 32, device="cuda", dtype=torch.float16)
        assert cuda.no_wgmma_reason(x, 64, x.dtype) == reason
        # the one op that has no other tiles
        assert REGISTRY["nm24_linear_f8"].supports(x.to(torch.float8_e4m3fn)) == reason
    tiles = cuda.allowed(dispatch.MATRIX_TILES, reason)
    assert tiles == (dispatch.MATRIX_TILES if reason is None else ("few8", "few16", "small", "large"))


@pytest.mark.parametrize(
    ("rows", "dtype", "fits"),
    [
        (8, torch.float16, True),
        (12, torch.bfloat16, False),
        (7, torch.float16, False),
        (12, torch.float32, True),
        (14, torch.float32, False),
    ],
)
def test_which_outputs_wgmma_can_write(rows, dtype, fits, gpu):
    gpu(built())
    with FakeTensorMode():
        reason = cuda.no_wgmma_reason(torch.empty(2, 32, device="cuda"), rows, dtype)
    assert reason == (None if fits else f"wgmma.sp needs rows of y of whole 16 bytes, got {rows} of {dtype}")


LEAST = {"stride": 1, "padding": 0, "dilation": 1}


def conv_reason(channels=64, groups=1, size=(9, 9), kernel=3, **options):
    stride, padding, dilation = (options.pop(name, least) for name, least in LEAST.items())
    geometry = geometry_of("op", kernel, stride, padding, dilation, 1)
    output = output_size("op", torch.empty(1, 4, *size), geometry)
    return no_wgmma_reason(channels, groups, geometry, size, output)


def test_which_convolutions_wgmma_takes():
    assert conv_reason() is conv_reason(128, stride=(8, 1), padding=(1, 2)) is None
    assert conv_reason(96) == "wgmma.sp needs one group of a multiple of 64 channels, got 1 of 96"
    assert conv_reason(128, 2) == "wgmma.sp needs one group of a multiple of 64 channels, got 2 of 64"
    assert no_wgmma_reason(64, 1) is None and no_wgmma_reason(60, 1).endswith("got 1 of 60")
    limits = "wgmma.sp needs strides up to 8, padding up to 128 and a dilated kernel up to 255"
    for axis in (0, 1):

        def pair(value, other, axis=axis):
            return (value, other) if axis == 0 else (other, value)

        assert conv_reason(size=(300, 300), stride=pair(8, 1)) is None
        assert conv_reason(size=(300, 300), stride=pair(9, 1)) == limits
        assert conv_reason(kernel=pair(129, 1), padding=pair(128, 0)) is None
        assert conv_reason(kernel=pair(129, 1), padding=pair(129, 0)) == limits
        assert conv_reason(size=(300, 300), dilation=pair(127, 1), padding=pair(127, 1)) is None
        assert conv_reason(size=(300, 300), dilation=pair(128, 1), padding=pair(128, 1)) == limits
        # the last output pixel's first tap lies 128 pixels before the image's end, and 127 behind it
        assert conv_reason(size=(300, 300), kernel=pair(129, 1)) is None
        assert conv_reason(size=(300, 300), kernel=pair(130, 1)) == limits
        assert conv_reason(kernel=pair(1, 1), padding=pair(127, 0)) is None
        assert conv_reason(kernel=pair(1, 1), padding=pair(128, 0)) == limits


def test_a_layer_says_which_instruction_it_gets(gpu, monkeypatch):
    """The CPU stands for an H100."""
    linear, conv = sparseops.SparseLinear(40, 16).half(), sparseops.SparseConv2d(64, 16, 3).half()
    others = sparseops.SparseLinear(40, 12).half(), sparseops.SparseConv2d(32, 16, 3).half()
    assert linear.kernel_note is None
    gpu(built(), (9, 0))
    monkeypatch.setattr(registry, "on_gpu", lambda x: True)
    monkeypatch.setattr(_native, "emulated", None)
    note = "by mma.sp, which may lose to a dense layer on this GPU: "
    for layer in (linear, conv):
        assert (layer.kernel, layer.kernel_note) == ("cuda wgmma.sp", None)
    for layer, reason in zip(others, ("rows of y of whole 16", "one group of a multiple of 64"), strict=True):
        assert layer.kernel == "cuda mma.sp"
        assert layer.kernel_note.startswith(f"{note}wgmma.sp needs {reason}")
    for impl, kernel in (("small", "cuda mma.sp"), ("sm90_192x192", "cuda wgmma.sp")):
        monkeypatch.setattr(_native, "impl", impl)
        assert linear.kernel == kernel
    monkeypatch.setattr(_native, "impl", "auto")
    gpu(built(archs="80+PTX"), (9, 0))
    assert (linear.kernel, linear.kernel_note) == ("cuda mma.sp", note + NO_SM90A)
    gpu(built(), (8, 6))
    assert (linear.kernel, linear.kernel_note) == ("cuda mma.sp", None)


def test_a_report_says_so_too(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(40, 16))
    assert sparseops.explain(sparseops.convert(model))["0"].reason == "pruned by magnitude"
    monkeypatch.setattr(SparseModule, "kernel_note", "a note")
    assert sparseops.explain(sparseops.convert(model))["0"].reason == "pruned by magnitude; a note"


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
