"""Why kernels in Triton cannot run, and when it falls to them to serve a tensor; neither has to be there."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import sparseops
from sparseops import _native, env, triton
from sparseops.ops import REGISTRY, cuda, registry

NAMES = ("nm24_linear", "nm24_compress", "nm24_to_dense", "nm24_grad_values")
BUILT = {"cuda": True, "cuda_archs": "80+PTX;90a"}
NOT_BUILT = {"cuda": False, "cuda_archs": ""}
UNCACHED = [
    function.__wrapped__
    for function in (triton._gpu_reason, triton._install_reason, cuda.gpu_reason, cuda.no_sm90_reason)
]
NO_TRITON = "there is no Triton here"


def x_on(device, dtype=torch.float16):
    with FakeTensorMode():
        return torch.empty(2, 32, device=device, dtype=dtype)


# ---- whether they can run


@pytest.fixture
def machine(monkeypatch):
    """Sets which GPU and which Triton there are."""

    def set_machine(version="3.7.1", capability=(9, 0), hip=None, compilers=("gcc",), cc=""):
        def found():
            if version is None:
                raise ImportError("no module")
            return SimpleNamespace(__version__=version)

        monkeypatch.setattr(triton, "_triton", found)
        monkeypatch.setattr(triton, "_gpu_reason", UNCACHED[0])
        monkeypatch.setattr(triton, "_install_reason", UNCACHED[1])
        monkeypatch.setattr(triton.shutil, "which", lambda name: name if name in compilers else None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(_native, "config_error", None)
        monkeypatch.setattr(_native, "interpreted", False)
        monkeypatch.setenv("CC", cc)

    return set_machine


@pytest.mark.parametrize(
    ("there", "reason"),
    [
        ({}, None),
        ({"version": "3.6.0"}, None),
        ({"version": "3.9.0+git1"}, None),
        ({"capability": (8, 0)}, None),
        ({"capability": (12, 0)}, None),
        ({"capability": None}, "torch sees no GPU: install a torch that was built with CUDA"),
        ({"capability": (7, 5)}, "the GPU has compute capability 7.5, and the kernels need 8.0"),
        ({"hip": "6.0"}, "the Triton kernels are for NVIDIA's GPUs"),
        (
            {"version": None},
            'Triton cannot be imported (no module): pip install "triton>=3.6,<3.10"',
        ),
        (
            {"version": "3.5.1"},
            'Triton is of version 3.5.1, and the kernels need 3.6 to 3.9: pip install "triton>=3.6,<3.10"',
        ),
        (
            {"version": "3.10.0"},
            'Triton is of version 3.10.0, and the kernels need 3.6 to 3.9: pip install "triton>=3.6,<3.10"',
        ),
        (
            {"compilers": ()},
            "Triton 3.7.1 compiles its launchers with a C compiler: install gcc, or set CC",
        ),
        ({"compilers": ("clang",)}, None),
        ({"compilers": (), "cc": "/opt/cc"}, None),
        ({"compilers": (), "version": "3.8.0"}, None),
    ],
    ids=str,
)
def test_why_no_kernel_can_run(there, reason, machine):
    machine(**there)
    assert triton.no_triton_reason(x_on("cuda")) == reason


def test_other_devices(machine):
    machine()
    for device in ("cpu", "xpu"):
        assert not triton.serves(x_on(device))
        assert triton.no_triton_reason(x_on(device)) == f"there is no {device.upper()} kernel"
    assert triton.serves(x_on("cuda"))


def test_the_interpreter_needs_no_gpu(machine, monkeypatch):
    machine(capability=None, compilers=())
    monkeypatch.setattr(_native, "interpreted", True)
    assert triton.serves(x_on("cpu")) and not triton.serves(x_on("xpu"))
    assert triton.no_triton_reason(x_on("cpu")) is None
    machine(version="3.5.0")
    monkeypatch.setattr(_native, "interpreted", True)
    assert "3.5.0" in triton.no_triton_reason(x_on("cpu"))


def test_a_bad_variable_comes_first(machine, monkeypatch):
    machine()
    monkeypatch.setattr(_native, "config_error", "bad")
    assert triton.no_triton_reason(x_on("cuda")) == "bad"


def test_dtypes():
    half, whole = torch.empty(2, dtype=torch.float16), torch.empty(2, dtype=torch.float64)
    assert triton.no_dtype_reason(half, None) is None
    assert triton.no_dtype_reason(half, whole) == "there is no Triton kernel for torch.float64"


@pytest.mark.parametrize(
    ("setting", "precision"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")]
)
def test_precision(setting, precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        assert triton.precision(torch.float32) == precision
        assert triton.precision(torch.float16) == triton.precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("allowed", "precision"), [("ieee", "ieee"), ("tf32", "tf32")])
def test_precision_where_torch_does_not_say(allowed, precision, monkeypatch):
    def refuse():
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    switches = SimpleNamespace(cuda=SimpleNamespace(matmul=SimpleNamespace(fp32_precision=allowed)))
    monkeypatch.setattr(triton.torch, "backends", switches)
    assert triton.precision(torch.float32) == precision


# ---- whether it falls to them


@pytest.fixture
def gpu(monkeypatch):
    """Sets what was built, whether Triton can run, and what SPARSEOPS_IMPL says, on an H100."""

    def set_gpu(build=NOT_BUILT, no_triton=None, impl="auto"):
        module = SimpleNamespace(build_info=lambda: build, cuda_probe=lambda: {"error": None})
        monkeypatch.setattr(_native, "C", module)
        monkeypatch.setattr(_native, "emulated", None)
        monkeypatch.setattr(_native, "interpreted", False)
        monkeypatch.setattr(_native, "config_error", None)
        monkeypatch.setattr(_native, "impl", impl)
        monkeypatch.setattr(cuda, "gpu_reason", UNCACHED[2])
        monkeypatch.setattr(cuda, "no_sm90_reason", UNCACHED[3])
        monkeypatch.setattr(triton, "no_triton_reason", lambda x: no_triton)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))

    return set_gpu


NO_CUDA = "sparseops was built without CUDA: reinstall it with SPARSEOPS_CUDA=1"


@pytest.mark.parametrize(
    ("there", "falls", "reason"),
    [
        ({}, True, None),
        ({"no_triton": NO_TRITON}, False, NO_CUDA),
        ({"build": BUILT}, False, None),
        ({"build": BUILT, "impl": "triton"}, True, None),
        ({"build": BUILT, "impl": "triton", "no_triton": NO_TRITON}, True, NO_TRITON),
        ({"build": {**BUILT, "cuda_archs": "80"}}, True, None),
    ],
    ids=str,
)
def test_cuda_first_then_triton(there, falls, reason, gpu):
    gpu(**there)
    for name in NAMES:
        assert REGISTRY[name].supports(x_on("cuda")) == reason
    assert cuda.by_triton(x_on("cuda")) is falls
    assert not cuda.by_triton(x_on("cpu"))


@pytest.mark.parametrize("impl", ["dense", "small"])
def test_another_kind_may_be_asked_for(impl, gpu):
    """Of products; what is no product takes no tile."""
    gpu(impl=impl)
    assert REGISTRY["nm24_linear"].supports(x_on("cuda")) == NO_CUDA
    for name in NAMES[1:]:
        assert REGISTRY[name].supports(x_on("cuda")) is None


@pytest.mark.parametrize("name", NAMES)
def test_what_has_no_kernel_in_triton(name, gpu):
    gpu()
    assert (
        REGISTRY[name].supports(x_on("cuda", torch.float64)) == "there is no Triton kernel for torch.float64"
    )
    for other in ("nm24_conv", "nm24_linear_i8"):
        assert REGISTRY[other].supports(x_on("cuda", REGISTRY[other].dtype)) == NO_CUDA


def test_f32_falls_to_triton_where_cuda_was_not_built(gpu):
    gpu()
    assert REGISTRY["nm24_linear"].supports(x_on("cuda", torch.float32)) is None
    gpu(build=BUILT)
    assert REGISTRY["nm24_linear"].supports(x_on("cuda", torch.float32)) == cuda.F32_REASON


def test_a_layer_says_so(gpu, monkeypatch):
    """The CPU stands for an H100."""
    layer = sparseops.SparseLinear(40, 12).half()
    gpu()
    monkeypatch.setattr(registry, "on_gpu", lambda x: True)
    assert (layer.kernel, layer.kernel_note) == ("triton, expanded in registers", None)
    gpu(no_triton=NO_TRITON)
    assert (layer.kernel, layer.kernel_note) == (f"reference: {NO_CUDA}", None)
    gpu(build=BUILT)
    assert layer.kernel == "cuda mma.sp" and layer.kernel_note.startswith("by mma.sp")


# ---- the environment


@pytest.mark.parametrize(
    ("impl", "interpret", "interpreted"),
    [("triton", "1", True), ("triton", "true", True), ("triton", "0", False), ("auto", "1", False)],
)
def test_the_interpreter_has_to_be_asked_for_twice(impl, interpret, interpreted, monkeypatch):
    monkeypatch.setenv("SPARSEOPS_IMPL", impl)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert _native._read().interpret is interpreted
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not env.interpret()


def test_triton_is_not_imported_with_the_package():
    code = "import sys, sparseops, torch\nsparseops.SparseLinear(40, 24)(torch.ones(40))\n"
    code += "print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
