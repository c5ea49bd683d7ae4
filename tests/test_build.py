"""The build: what it reads, what it refuses in one sentence, what it compiles how, what the module needs.

Nothing is installed here. Compilers are stood in for by scripts.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SYSTEM_PATH = os.environ["PATH"]  # read before `machine` empties it

TREE = Path(__file__).resolve().parent.parent
CSRC = TREE / "csrc"
sys.path.insert(0, str(TREE / "build_backend"))

import archs  # noqa: E402
import ninja_file  # noqa: E402
import sources  # noqa: E402
import toolchain  # noqa: E402

VARIABLES = (
    "SPARSEOPS_CUDA",
    "TORCH_CUDA_ARCH_LIST",
    "MAX_JOBS",
    "CUDA_HOME",
    "CUDA_PATH",
    "CXX",
    "CXXFLAGS",
)


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine with nothing on it: no variable set, an empty folder as PATH, no toolkit anywhere."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(toolchain, "USUAL_NVCC", str(tmp_path / "usual" / "nvcc"))
    monkeypatch.setattr(toolchain, "wheel_nvcc", lambda: None)
    return tmp_path


def script(path: Path, answer: str) -> Path:
    """A program that prints `answer`, whatever it is asked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{answer}'\n")
    path.chmod(0o755)
    return path


def nvcc_at(folder: Path, release: str) -> Path:
    return script(folder / "nvcc", f"Cuda compilation tools, release {release}, V{release}.99")


def refusal(function, *arguments) -> str:
    """The one sentence with which a call stops the build."""
    with pytest.raises(SystemExit) as stopped:
        function(*arguments)
    sentence = str(stopped.value)
    assert sentence.startswith("sparseops: ") and "\n" not in sentence
    return sentence


# ---- settings


@pytest.mark.parametrize(
    ("variable", "value", "read", "rule"),
    [
        ("SPARSEOPS_CUDA", "2", toolchain.cuda_mode, "must be 0, 1 or auto, got '2'"),
        ("MAX_JOBS", "0", toolchain.jobs, "must be a whole number of at least 1, got '0'"),
        ("MAX_JOBS", "two", toolchain.jobs, "must be a whole number of at least 1, got 'two'"),
        ("TORCH_CUDA_ARCH_LIST", "9x", archs.check_list, "must list architectures such as 8.0"),
        ("TORCH_CUDA_ARCH_LIST", "Kepler", archs.check_list, "got 'kepler'"),
        ("TORCH_CUDA_ARCH_LIST", "7.0 7.5", archs.check_list, "must hold one of at least 8.0, got '7.0 7.5'"),
        ("CUDA_HOME", "/nowhere", toolchain.system_nvcc, "must hold bin/nvcc, got '/nowhere'"),
        ("CXX", "no-such-compiler", toolchain.cxx, "must name a C++ compiler, got 'no-such-compiler'"),
    ],
)
def test_bad_value_is_one_sentence(monkeypatch, variable, value, read, rule):
    monkeypatch.setenv(variable, value)
    sentence = refusal(read)
    assert variable in sentence and rule in sentence


def test_no_compiler_is_one_sentence():
    assert "no C++ compiler was found: install g++" in refusal(toolchain.cxx)


def test_compiler_that_does_not_run_is_one_sentence(machine, monkeypatch):
    script(machine / "bin" / "broken", "").write_text("#!/bin/sh\nexit 1\n")
    assert "does not answer --version" in refusal(toolchain.cxx_version, [str(machine / "bin" / "broken")])


def test_cxx_with_a_launcher(machine, monkeypatch):
    script(machine / "bin" / "ccache", "")
    monkeypatch.setenv("CXX", "ccache g++-14")
    assert toolchain.cxx() == ["ccache", "g++-14"]
    assert toolchain.ccbin(toolchain.cxx()) == "g++-14"


def test_config_settings_are_the_variables(monkeypatch):
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that monkeypatch puts back what the call sets
    toolchain.apply_config_settings(
        {"cuda": "0", "archs": ["8.0", "9.0a"], "jobs": "3", "--global-option": "x"}
    )
    assert toolchain.cuda_mode() == "0"
    assert toolchain.variable("TORCH_CUDA_ARCH_LIST") == "9.0a"
    assert toolchain.jobs() == (3, 3)


def test_unknown_config_setting_is_refused():
    assert "must set one of cuda, archs, jobs, got 'cudda'" in refusal(
        toolchain.apply_config_settings, {"cudda": "0"}
    )


def test_jobs_follow_memory(monkeypatch):
    monkeypatch.setattr(toolchain.os, "sched_getaffinity", lambda _: range(64), raising=False)
    monkeypatch.setattr(toolchain, "free_gib", lambda: 6.5)
    assert toolchain.jobs() == (8, 3)
    monkeypatch.setattr(toolchain, "free_gib", lambda: 0.1)
    assert toolchain.jobs() == (1, 1)


def test_lock_keeps_a_second_build_out(tmp_path):
    probe = (
        "import fcntl, sys\n"
        "try: fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "except BlockingIOError: print('held')\n"
        "else: print('free')\n"
    )

    def seen_from_outside() -> str:
        command = [sys.executable, "-c", probe, str(tmp_path / "build" / "lock")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with toolchain.tree_lock(tmp_path):
        with toolchain.tree_lock(tmp_path):
            assert seen_from_outside() == "held"
        assert seen_from_outside() == "held"
    assert seen_from_outside() == "free"


# ---- nvcc


def test_new_enough_nvcc_needs_no_wheels(machine):
    nvcc_at(machine / "bin", "12.8")
    assert toolchain.wheels_to_require()[0] == []
    assert toolchain.find_nvcc().version == (12, 8)


def test_cuda_home_comes_before_path(machine, monkeypatch):
    nvcc_at(machine / "bin", "12.9")
    nvcc_at(machine / "toolkit" / "bin", "13.1")
    monkeypatch.setenv("CUDA_HOME", str(machine / "toolkit"))
    assert toolchain.find_nvcc().release == "13.1"


@pytest.mark.parametrize("release", [None, "11.5", "12.7"])
def test_no_usable_nvcc_asks_for_wheels(machine, monkeypatch, release):
    monkeypatch.setattr(toolchain, "_has_wheels", lambda: True)
    if release:
        nvcc_at(machine / "bin", release)
    wheels, why = toolchain.wheels_to_require()
    assert wheels == ["cuda-toolkit[nvcc,nvvm,crt,cudart,cccl]==13.0.2"]
    assert (f"is {release}, older than 12.8" if release else "no nvcc was found") in why


def test_cuda_off_asks_for_nothing(machine, monkeypatch):
    nvcc_at(machine / "bin", "13.0")
    monkeypatch.setenv("SPARSEOPS_CUDA", "0")
    assert toolchain.wheels_to_require() == ([], "SPARSEOPS_CUDA=0: CPU kernels only")
    assert toolchain.find_nvcc() is None


def test_cuda_insisted_on_without_nvcc_is_one_sentence(monkeypatch):
    assert toolchain.find_nvcc() is None
    monkeypatch.setenv("SPARSEOPS_CUDA", "1")
    assert "SPARSEOPS_CUDA=1 needs nvcc, but no nvcc was found" in refusal(toolchain.find_nvcc)
    monkeypatch.setattr(toolchain, "_has_wheels", lambda: False)
    assert "no nvcc wheels for this platform" in refusal(toolchain.wheels_to_require)


# ---- architectures


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("8.0;9.0a+PTX", "80 90a+PTX"),
        ("8.0 8.6, 12.0", "80 86 120"),
        ("80;sm_90a;100f", "80 90a 100f"),
        ("Ampere;Hopper+PTX", "80 86 90a+PTX"),
        ("8.0;8.0+PTX", "80+PTX"),
        (archs.DEFAULT_ARCHS, "80+PTX 90a 100a 120"),
    ],
)
def test_arch_list(text, names):
    assert " ".join(map(str, archs.parse_archs(text)[0])) == names


def test_archs_older_than_any_kernel_are_left_out():
    wanted, left_out = archs.parse_archs("7.0;Turing;8.0")
    assert [str(arch) for arch in wanted] == ["80"]
    assert [str(arch) for arch in left_out] == ["70", "75"]


def test_gencode():
    assert archs.Arch("90a").gencode() == "-gencode arch=compute_90a,code=sm_90a"
    assert archs.Arch("80", ptx=True).gencode().endswith("-gencode arch=compute_80,code=compute_80")


def test_arch_that_nvcc_does_not_know_is_one_sentence():
    archs.check_known([archs.Arch("90a")], [80, 90], "12.8")
    assert "must name what nvcc 12.8 can build (80 90), got 130" in refusal(
        archs.check_known, [archs.Arch("130")], [80, 90], "12.8"
    )


@pytest.mark.parametrize(
    ("line", "names"),
    [("all", "80+PTX 90a 120"), ("90+", "90a 120"), ("90a 120", "90a 120"), ("100a", "80+PTX")],
)
def test_archs_of_a_file(tmp_path, line, names):
    source = tmp_path / "kernel.cu"
    source.write_text(f"// archs: {line}\n")
    wanted, _ = archs.parse_archs("8.0+PTX;9.0a;12.0")
    assert " ".join(map(str, archs.file_archs(source, wanted))) == names


@pytest.mark.parametrize("line", ["#include <x>", "// archs:", "// archs: hopper"])
def test_bad_archs_of_a_file_is_one_sentence(tmp_path, line):
    source = tmp_path / "kernel.cu"
    source.write_text(f"{line}\n")
    assert "kernel.cu must" in refusal(archs.file_archs, source, [archs.Arch("80")])


# ---- instruction sets


def tree_with(folder: Path, files: dict[str, str]) -> Path:
    for name, line in {"bindings.cpp": "", "cuda/absent.cpp": "", **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{line}\n")
    return folder


def test_file_with_isa_line_is_compiled_once_per_set(tmp_path):
    csrc = tree_with(tmp_path, {"cpu/conv.cpp": "// isa: portable avx2 avx512", "cpu/dispatch.cpp": ""})
    steps = sources.cpu_steps(csrc, ["portable", "avx2"])
    assert [step.object for step in steps] == [
        "bindings.o",
        "cpu/dispatch.o",
        "cpu/conv.portable.o",
        "cpu/conv.avx2.o",
    ]
    flags = {step.object: step.flags for step in steps}
    assert flags["cpu/dispatch.o"] == flags["bindings.o"] == "-DSPARSEOPS_HAS_PORTABLE -DSPARSEOPS_HAS_AVX2"
    assert flags["cpu/conv.portable.o"] == "-DSPARSEOPS_ISA=portable"
    assert flags["cpu/conv.avx2.o"] == "-DSPARSEOPS_ISA=avx2 -mavx2 -mfma -mf16c"


def test_unknown_isa_in_a_file_is_one_sentence(tmp_path):
    csrc = tree_with(tmp_path, {"cpu/conv.cpp": "// isa: portable sse9"})
    assert (
        "conv.cpp must list instruction sets out of portable, avx2, avx512, avx512_bf16, got 'sse9'"
        in refusal(sources.cpu_steps, csrc, ["portable"])
    )


def test_isa_that_the_compiler_does_not_know_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(sources, "is_x86", lambda: True)
    monkeypatch.setattr(sources, "cxx_accepts", lambda _, flags: "avx512bf16" not in flags)
    assert sources.buildable_isas(["g++"]) == ["portable", "avx2", "avx512"]
    assert "-mavx512bf16: kernels for avx512_bf16 are left out" in capsys.readouterr().out


def test_only_portable_on_other_processors(monkeypatch):
    monkeypatch.setattr(sources.platform, "machine", lambda: "aarch64")
    assert sources.buildable_isas(["g++"]) == ["portable"]


def test_without_cuda_the_stand_in_is_compiled(tmp_path):
    csrc = tree_with(tmp_path, {"cuda/device.cu": "// archs: all"})
    assert [step.source for step in sources.cuda_steps(csrc, [])] == ["cuda/absent.cpp"]
    assert [step.source for step in sources.cuda_steps(csrc, [archs.Arch("80")])] == ["cuda/device.cu"]


def test_command_lines_hold_no_path_of_the_build_environment(tmp_path):
    csrc = tree_with(tmp_path / "csrc", {"cuda/device.cu": "// archs: all", "cpu/a.cpp": "// isa: portable"})
    nvcc = toolchain.Nvcc(str(nvcc_at(tmp_path / "env" / "bin", "13.0")), (13, 0))
    (tmp_path / "env" / "lib").mkdir()
    (tmp_path / "env" / "lib" / "libcudart_static.a").touch()
    tools = ninja_file.Tools(["g++"], ["portable"], nvcc, [archs.Arch("80")])
    steps = sources.cpu_steps(csrc, tools.isas) + sources.cuda_steps(csrc, tools.archs)
    text = ninja_file.render(steps, tools, "../../csrc", 1)
    assert "build obj/cuda/device.cu.o: nvcc ../../csrc/cuda/device.cu | cxx_version.h cuda_version.h" in text
    assert str(tmp_path) not in text and sys.prefix not in text


@pytest.mark.parametrize("status", [0, 3])
def test_what_nvcc_says_stays_beside_the_object(tmp_path, status):
    csrc = tree_with(tmp_path / "csrc", {"cuda/device.cu": "// archs: all"})
    program = nvcc_at(tmp_path / "cuda" / "bin", "13.0")
    (tmp_path / "cuda" / "lib").mkdir()
    (tmp_path / "cuda" / "lib" / "libcudart_static.a").touch()
    tools = ninja_file.Tools(["g++"], [], toolchain.Nvcc(str(program), (13, 0)), [archs.Arch("80")])
    said = "ptxas info    : (C7508) Potential Performance Loss"
    program.write_text(
        f"#!/bin/sh\necho '{said}' >&2\n"
        "while [ $# -gt 0 ]; do case $1 in -MF) dep=$2 ;; -o) object=$2 ;; esac; shift; done\n"
        'printf "$object: csrc/cuda/device.cu \\\\\n cuda/b.h\\n" >$dep; echo >$object\n'
        f"exit {status}\n"
    )
    (tmp_path / "build.ninja").write_text(
        ninja_file.render(sources.cuda_steps(csrc, tools.archs), tools, "csrc", 1)
    )
    for name in ("cxx_version.h", "cuda_version.h"):
        (tmp_path / name).touch()
    target = "obj/cuda/device.cu.o"
    for times in (1, 0 if status == 0 else 1):  # the second run of a build that went well compiles nothing
        answer = subprocess.run(
            [toolchain.ninja(), "-C", str(tmp_path), target],
            capture_output=True,
            text=True,
            env={"PATH": SYSTEM_PATH},
        )
        assert (answer.returncode == 0) == (status == 0), answer.stdout
        assert answer.stdout.count(said) == times
        assert (tmp_path / f"{target}.log").read_text() == f"{said}\n"


# ---- what was built

TORCH_SYMBOL = r" UND (\S*(?:5torch|2at|3c10)\d\S*|aoti_torch\S*)"


def test_csrc_names_no_torch_header():
    headers = re.compile(r"#\s*include\s*[<\"](torch|ATen|c10)/")
    files = [path for path in CSRC.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path.name for path in files if headers.search(path.read_text())] == []


def module_file() -> str:
    spec = importlib.util.find_spec("sparseops._C")
    assert spec and spec.origin, "sparseops._C is not built: pip install -e ."
    return spec.origin


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_module_needs_neither_torch_nor_a_driver():
    readelf = shutil.which("readelf", path=SYSTEM_PATH)
    if not readelf:
        pytest.skip("no readelf on this machine")
    command = [readelf, "--wide", "--dynamic", "--dyn-syms", module_file()]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", text)
    assert "libgomp.so.1" in needed
    assert [name for name in needed if re.search("torch|c10|cuda|nvidia", name)] == []
    assert "PyInit__C" in text
    assert re.findall(TORCH_SYMBOL, text) == []


def test_torch_symbol_is_recognised():
    text = (
        "5: 0000 0 FUNC GLOBAL DEFAULT UND _ZN5torch8autograd4NodeE\n6: 0000 0 FUNC GLOBAL DEFAULT UND memcpy"
    )
    assert re.findall(TORCH_SYMBOL, text) == ["_ZN5torch8autograd4NodeE"]


def test_no_function_is_shared_between_instruction_sets():
    """A weak function compiled for AVX-512 could be the copy that the linker keeps for every processor."""
    nm = shutil.which("nm", path=SYSTEM_PATH)
    objects = sorted(ninja_file.build_folder(TREE).glob("obj/cpu/*.avx*.o"))
    if not nm or not objects:
        pytest.skip("needs nm and the objects of an x86 build in this tree")
    for file in objects:
        isa = file.suffixes[0].removeprefix(".")
        text = subprocess.run(
            [nm, "--demangle", str(file)], capture_output=True, text=True, check=True
        ).stdout
        weak = re.findall(r"^\S+ [Wu] (.+)$", text, re.MULTILINE)
        assert [name for name in weak if f"::{isa}::" not in name] == [], file.name
