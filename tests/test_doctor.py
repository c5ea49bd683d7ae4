"""``doctor`` and the command line, also on machines where something is missing."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import sparseops
from sparseops import __main__ as cli
from sparseops import _native, triton
from sparseops.ops import REGISTRY, cuda

UNCACHED = cuda.gpu_reason.__wrapped__
UNCACHED_SM90 = cuda.no_sm90_reason.__wrapped__


CUDA_KERNELS = {("cuda", "sm_80+"), ("cuda", "sm_90a")}
CUDA_OPS = [name for name, op in REGISTRY.items() if CUDA_KERNELS & set(op.impls)]
NO_TRITON = "Triton cannot be imported (no triton): get it"


class FakeModule:
    """A built module on a machine of our choosing."""

    __file__ = "/somewhere/_C.so"

    def __init__(self, *, cuda=True, archs="80;90a", error=None, isas=("portable", "avx2"), isa="avx2"):
        self.cuda, self.archs, self.error, self.isas, self.isa = cuda, archs, error, isas, isa

    def build_info(self):
        archs = self.archs if self.cuda else ""
        return {
            "compiler": "gcc 99",
            "cuda": self.cuda,
            "cuda_archs": archs,
            "openmp": True,
            "isas": list(self.isas),
        }

    def cpu_isa(self):
        return self.isa

    def cpu_supports(self, isa):
        return isa in ("portable", self.isa)

    def cuda_probe(self):
        return {"error": self.error, "driver": 13010, "runtime": 13000, "devices": 0 if self.error else 1}


@pytest.fixture
def native(monkeypatch):
    """Sets what ``_native`` found, and what GPU torch sees."""

    def set_native(module, error=None, config_error=None, capability=(9, 0), triton_reason=NO_TRITON):
        monkeypatch.setattr(_native, "C", module)
        monkeypatch.setattr(_native, "error", error)
        monkeypatch.setattr(_native, "config_error", config_error)
        monkeypatch.setattr(cuda, "gpu_reason", UNCACHED)
        monkeypatch.setattr(cuda, "no_sm90_reason", UNCACHED_SM90)
        monkeypatch.setattr(cuda.torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(cuda.torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(cuda.torch.cuda, "get_device_name", lambda index: "GPU Y")
        monkeypatch.setattr(cuda.torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(triton, "no_triton_reason", lambda x: triton_reason)

    return set_native


def kernels(found):
    return {(kernel.op, kernel.device): kernel for kernel in found.kernels}


def test_doctor_of_this_machine():
    found = sparseops.doctor()
    assert found.versions["torch"] == torch.__version__
    assert found.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found.cpu["torch threads"] == torch.get_num_threads()
    assert {kernel.op for kernel in found.kernels} == set(REGISTRY)
    assert all(kernel.on or (kernel.reason and kernel.cure) for kernel in found.kernels)
    assert found.ok == all(kernel.on for kernel in found.kernels if kernel.device == "cpu" and kernel.exists)
    assert {(kernel.op, kernel.device) for kernel in found.kernels if not kernel.exists} == {
        ("nm24_linear_i8", "cpu"),
        ("nm24_linear_f8", "cpu"),
    }
    json.loads(found.to_json())


def test_healthy_machine(native):
    native(FakeModule())
    found = sparseops.doctor()
    assert found.ok
    assert found.versions["compiler"] == "gcc 99"
    assert found.versions["built module"] == "/somewhere/_C.so"
    assert found.instruction_sets == {
        "portable": "available",
        "avx2": "in use",
        "avx512": "not built (the compiler or the architecture does not know it)",
        "avx512_bf16": "not built (the compiler or the architecture does not know it)",
    }
    assert found.cuda["architectures built"] == "80;90a"
    assert (found.cuda["driver"], found.cuda["runtime"], found.cuda["devices"]) == ("13.1", "13.0", 1)
    assert "error" not in found.cuda
    by_place = kernels(found)
    assert by_place["nm24_linear", "cpu"].kernel == "avx2"
    assert [op for op in REGISTRY if by_place[op, "cuda"].on] == CUDA_OPS
    assert by_place["nm24_linear", "cuda"].kernel.startswith("f16 and bf16 by mma.sp")
    int8 = by_place["nm24_linear_i8", "cpu"]
    assert not int8.on and not int8.exists
    assert int8.reason == "there is no CPU kernel"
    assert "plain torch reference runs" in int8.cure


@pytest.mark.parametrize(
    ("capability", "reason", "cure"),
    [
        ((7, 5), "the GPU has compute capability 7.5, and the kernels need 8.0", "none; the plain torch"),
        ((10, 0), "sparseops was built for GPU architectures 80;90a, none of which", "build again with its"),
        (None, "torch sees no GPU: install a torch that", "install a torch that was built with CUDA"),
    ],
)
def test_a_gpu_that_no_kernel_runs_on(native, capability, reason, cure):
    native(FakeModule(), capability=capability)
    found = sparseops.doctor()
    assert found.ok
    for op in CUDA_OPS:
        kernel = kernels(found)[op, "cuda"]
        assert not kernel.on and kernel.exists
        assert kernel.reason.startswith(reason)
        assert kernel.cure.startswith(cure)


def test_dense_is_asked_for(native, monkeypatch):
    native(FakeModule())
    monkeypatch.setattr(_native, "impl", "dense")
    kernel = kernels(sparseops.doctor())["nm24_conv", "cuda"]
    assert (kernel.on, kernel.cure) == (False, "unset SPARSEOPS_IMPL")


def test_processor_without_an_instruction_set(native):
    native(FakeModule(isas=("portable", "avx2", "avx512")))
    assert sparseops.doctor().instruction_sets["avx512"] == "built; this processor does not have it"


def test_missing_module(native):
    native(None, error="the installation at /x has no built module: reinstall sparseops")
    found = sparseops.doctor()
    assert not found.ok
    assert found.versions["built module"] == "missing"
    assert found.problems == ("the installation at /x has no built module: reinstall sparseops",)
    linear = kernels(found)["nm24_linear", "cpu"]
    assert not linear.on
    assert linear.reason == "the installation at /x has no built module: reinstall sparseops"
    assert linear.cure == "reinstall sparseops"
    assert found.instruction_sets == {}
    assert "reinstall sparseops" in str(found)
    json.loads(found.to_json())


def test_bad_variable(native, monkeypatch):
    monkeypatch.setenv("SPARSEOPS_CPU_ISA", "mmx")
    native(FakeModule(), config_error="SPARSEOPS_CPU_ISA must be one of portable, avx2, got 'mmx'")
    found = sparseops.doctor()
    assert not found.ok
    assert found.environment["SPARSEOPS_CPU_ISA"] == "mmx"
    assert found.problems == ("SPARSEOPS_CPU_ISA must be one of portable, avx2, got 'mmx'",)
    assert kernels(found)["nm24_linear", "cpu"].cure == "correct or unset the variable"


def test_built_without_cuda(native):
    native(FakeModule(cuda=False))
    found = sparseops.doctor()
    assert found.cuda["sparseops built with CUDA"] == "no"
    assert found.cuda["architectures built"] == "none"
    kernel = kernels(found)["nm24_to_dense", "cuda"]
    assert "built without CUDA" in kernel.reason
    assert kernel.cure == (
        "reinstall with SPARSEOPS_CUDA=1" if torch.version.cuda else "none needed: torch has no CUDA either"
    )


def test_no_driver(native):
    native(FakeModule(error="CUDA driver version is insufficient"))
    found = sparseops.doctor()
    assert found.ok, "a machine without GPU is healthy"
    assert found.cuda["error"] == "CUDA driver version is insufficient"
    kernel = kernels(found)["nm24_to_dense", "cuda"]
    assert kernel.reason == "CUDA driver version is insufficient"
    assert "install or update the NVIDIA driver" in kernel.cure


@pytest.mark.parametrize(
    ("archs", "capability", "built", "runs"),
    [
        ("80;90a", (9, 0), "yes", "yes"),
        (
            "80+PTX",
            (9, 0),
            "no",
            "no: sparseops was built without sm_90a: build again with 9.0a in TORCH_CUDA_ARCH",
        ),
        ("80;90a", (8, 6), "yes", "no: the GPU has compute capability 8.6, and wgmma.sp needs 9.0"),
        ("90a", (8, 6), "yes", None),
        ("", None, "no", None),
    ],
)
def test_kernels_for_sm90(native, archs, capability, built, runs):
    native(FakeModule(cuda=bool(archs), archs=archs), capability=capability)
    found = sparseops.doctor().cuda
    assert found["kernels for sm_90a built"] == built
    if runs is None:
        assert "device 0 runs wgmma.sp" not in found
    else:
        assert found["device 0 runs wgmma.sp"].startswith(runs)


@pytest.mark.parametrize("reason", [None, NO_TRITON])
def test_triton_where_cuda_was_not_built(native, reason):
    native(FakeModule(cuda=False), triton_reason=reason)
    found = sparseops.doctor()
    assert found.versions["triton"] == (triton.installed_version() or "not installed")
    assert found.cuda["device 0 runs kernels in Triton"] == ("yes" if reason is None else f"no: {reason}")
    by_place = kernels(found)
    linear, int8 = by_place["nm24_linear", "cuda"], by_place["nm24_linear_i8", "cuda"]
    assert not int8.on and "built without CUDA" in int8.reason
    assert linear.on == (reason is None)
    if reason is None:
        assert linear.kernel == "triton, f32, f16 and bf16, any shape"
        assert by_place["nm24_compress", "cuda"].kernel.startswith("triton, ")
    else:
        assert "built without CUDA" in linear.reason


def test_what_has_a_kernel_in_triton_alone_runs_that_beside_kernels_of_cuda(native):
    native(FakeModule(), triton_reason=None)
    by_place = kernels(sparseops.doctor())
    assert by_place["channel_conv", "cuda"].kernel == "triton, f32, f16 and bf16, any shape"
    assert not by_place["nm24_linear", "cuda"].kernel.startswith("triton")


def test_devices_are_listed(native, monkeypatch):
    native(FakeModule())
    fake = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        get_device_capability=lambda index: (9, 0),
        get_device_name=lambda index: "GPU X",
    )
    module = sys.modules["sparseops.doctor"]
    monkeypatch.setattr(module, "torch", SimpleNamespace(**vars(torch) | {"cuda": fake}))
    assert module._cuda()["device 0"] == "GPU X, compute capability 9.0"


def test_text_and_json_say_the_same(native, capsys):
    native(FakeModule(error="no driver [x]"))
    found = sparseops.doctor()
    text = str(found)
    assert "\x1b" not in text
    for words in ("gcc 99", "avx2", "no driver [x]", "80;90a", "nm24_conv", "off (plain torch runs)"):
        assert words in text
    found.print()
    assert capsys.readouterr().out.rstrip() == text
    data = json.loads(found.to_json())
    assert data["ok"] is True
    assert data["versions"] == found.versions
    assert [kernel["op"] for kernel in data["kernels"]] == [kernel.op for kernel in found.kernels]


def test_ok_needs_every_cpu_kernel(native):
    native(FakeModule())
    found = sparseops.doctor()
    broken = tuple(replace(k, on=False) if k.device == "cpu" else k for k in found.kernels)
    assert not replace(found, kernels=broken).ok


# Command line


def test_doctor_command(native, capsys):
    native(FakeModule())
    assert cli.main(["doctor"]) == 0
    assert "CPU instruction sets" in capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    native(None, error="no built module: reinstall sparseops")
    assert cli.main(["doctor"]) == 1


def test_version_and_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"sparseops {sparseops.__version__}\n"
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "doctor" in text and "demo" in text and "COMMAND --help" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [([], "required: COMMAND"), (["cure"], "invalid choice: 'cure'"), (["doctor", "--xml"], "--xml")],
)
def test_wrong_command_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_demo_gets_its_own_arguments(monkeypatch):
    seen = []
    fake = SimpleNamespace(main=lambda argv: seen.append(argv) or 3)
    monkeypatch.setitem(sys.modules, "sparseops.demo", fake)
    monkeypatch.setattr(sparseops, "demo", fake, raising=False)
    assert cli.main(["demo", "--help", "x"]) == 3
    assert seen == [["--help", "x"]]


def test_as_a_process():
    done = subprocess.run(
        [sys.executable, "-m", "sparseops", "--version"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert re.fullmatch(r"sparseops \S+\n", done.stdout)
