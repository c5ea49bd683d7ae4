"""Who may import or include whom: a line that is not in these tables is a mistake, or a decision to note."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, CSRC, EMULATION = ROOT / "sparseops", ROOT / "csrc", ROOT / "tests" / "emulation"

# module or subpackage of sparseops -> what it may import of sparseops, and from outside the standard library
PYTHON = {
    "env": (set(), set()),
    "_native": ({"env", "_C"}, set()),
    "formats": (set(), {"torch"}),
    "triton": ({"_native", "env"}, {"torch", "triton"}),
    "ops": ({"formats", "triton", "_native", "env"}, {"torch"}),
    "prune": ({"formats"}, {"torch"}),
    "nn": ({"ops", "formats"}, {"torch"}),
    "report": (set(), {"rich", "matplotlib"}),
    "_eligible": ({"nn", "prune", "report"}, {"torch"}),
    "_select": ({"_eligible", "_measure", "compact", "nn", "prune"}, {"torch"}),
    "_replace": ({"_measure", "report"}, {"torch"}),
    "_pack": (
        {"_eligible", "_measure", "_replace", "_select", "formats", "nn", "prune", "report"},
        {"torch"},
    ),
    "_measure": ({"nn"}, {"torch", "rich"}),
    "convert": (
        {"nn", "prune", "report", "_eligible", "_measure", "_pack", "_replace", "_select"},
        {"torch"},
    ),
    "compact": ({"nn", "ops", "formats", "prune", "report", "_measure", "_replace"}, {"torch", "rich"}),
    # what is done to a model while it is trained
    "train": (
        {
            "_eligible",
            "_measure",
            "_replace",
            "_select",
            "compact",
            "convert",
            "formats",
            "nn",
            "prune",
            "report",
        },
        {
            "torch",
            "rich",
            "matplotlib",
            "tensorboard",
            "wandb",
            "lightning",
            "pytorch_lightning",
            "transformers",
        },
    ),
    "interop": ({"_eligible", "_measure", "formats", "nn"}, {"torch", "safetensors"}),
    "doctor": ({"_native", "env", "ops", "triton"}, {"torch", "rich"}),
    "testing": ({"ops", "formats"}, {"torch"}),
    "__init__": (
        {"formats", "nn", "ops", "prune", "convert", "compact", "doctor", "interop", "report", "train"},
        set(),
    ),
    "__main__": ({"__init__", "doctor", "demo"}, set()),
    "demo": (
        {"__init__", "convert", "formats", "nn", "ops", "report"},
        {"torch", "numpy", "h5py", "skimage", "PIL", "matplotlib", "rich"},
    ),
}
# within a subpackage: what lies at the bottom, and so imports nothing beside it
BOTTOM = {
    "formats": {"base"},
    "prune": {"criteria"},
    "ops": {"registry", "common", "conv_geometry", "derived", "tiles"},
}
# kind of file in csrc (first pattern that fits) -> what its includes may look like; the C++ standard library
# is open to all
SOURCES = [
    (r"ops\.h", []),
    (r"bindings\.cpp", [r"pybind11/.*", r"ops\.h"]),
    (r"cpu/vector\.h", [r"immintrin\.h", r"arm_neon\.h"]),
    (r"cpu/.*", [r"ops\.h", r"cpu/.*\.h", r"omp\.h"]),
    (r"cuda/absent\.cpp", [r"ops\.h"]),
    # the doors to the GPU, behind which tests put the emulator; no other file knows of it
    (r"cuda/ptx\.cuh", [r"ptx_emulation\.h", r"cuda_fp16\.h", r"cuda_bf16\.h"]),
    (r"cuda/ptx_sm90\.cuh", [r"ptx_sm90_emulation\.h", r"cuda/ptx\.cuh", r"cuda\.h"]),
    (r"cuda/launch\.cuh", [r"cuda_emulation\.h", r"cuda_runtime\.h"]),
    # the one that talks to the driver
    (r"cuda/tensor_map\.cuh", [r"cuda/.*\.cuh", r"ops\.h", r"cuda_runtime\.h", r"cudaTypedefs\.h"]),
    (r"cuda/.*\.cuh", [r"cuda/.*\.(cuh|h)", r"ops\.h", r"cuda_(runtime|fp16|bf16|fp8)\.h"]),
    (r"cuda/.*\.cu", [r"cuda/.*\.(cuh|h)", r"ops\.h", r"cuda_runtime\.h"]),
    (r"cuda/sm90\.h", [r"ops\.h"]),
]
# the same for tests/emulation, where what lies beside a file is open to it. The emulator knows no kernel.
CUDA_HEADERS = [r"cuda(_(runtime|fp16|bf16|fp8)|Typedefs)?\.h", r"vector_types\.h"]
SYSTEM_HEADERS = [r"(dlfcn|link|math|signal|ucontext|sys/mman|sanitizer/.*)\.h"]
EMULATION_SOURCES = [
    (r".*(_test\.cpp|_case\.h)", [r"cuda/.*\.cuh", r"ops\.h", *CUDA_HEADERS]),
    (r"conformance.*", [r"conformance.*", r"cuda/(ptx|launch|tensor_map|wgmma).*\.cuh", *CUDA_HEADERS]),
    (r".*", CUDA_HEADERS + SYSTEM_HEADERS),
]
FRAMEWORK = re.compile(r"^(torch|ATen|c10|caffe2)(/|$)")


def layer_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path):
    """(module, line) of every import of a file, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            if node.module == "sparseops":
                yield from ((submodule_of(alias.name), node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno


def submodule_of(name):
    """``from sparseops import name``: a module of that name, or a name that ``__init__`` offers."""
    is_module = (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists() or name == "_C"
    return f"sparseops.{name}" if is_module else "sparseops"


def wrong_imports(path):
    layer = layer_of(path)
    internal, external = PYTHON[layer]
    for module, line in imports_of(path):
        top, *rest = module.split(".")
        if top in sys.stdlib_module_names or top == "__future__":
            continue
        if top != "sparseops":
            if top not in external:
                yield f"{path.name}:{line} imports {module}"
            continue
        target = rest[0] if rest else "__init__"
        if target != layer:
            if target not in internal:
                yield f"{path.name}:{line} imports {module}"
        elif path.stem in BOTTOM.get(layer, ()):
            yield f"{path.name}:{line} imports {module}"


PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))
C_SUFFIXES = (".h", ".cpp", ".cu", ".cuh")
SOURCE_FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in C_SUFFIXES)
EMULATION_FILES = sorted(path for path in EMULATION.iterdir() if path.suffix in C_SUFFIXES)


def names(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PYTHON_FILES, ids=names)
def test_imports(path):
    assert not list(wrong_imports(path))


def test_every_module_is_in_the_table():
    assert {layer_of(path) for path in PYTHON_FILES} == set(PYTHON)


def test_a_wrong_import_is_seen(tmp_path, monkeypatch):
    module = sys.modules[__name__]
    monkeypatch.setattr(module, "PACKAGE", tmp_path)
    (tmp_path / "nn").mkdir()
    (tmp_path / "env.py").touch()
    path = tmp_path / "nn" / "base.py"
    path.write_text(
        "import torch, numpy\nfrom sparseops import env\ndef f():\n    from sparseops import convert\n"
    )
    assert list(wrong_imports(path)) == [
        "base.py:1 imports numpy",
        "base.py:2 imports sparseops.env",
        "base.py:4 imports sparseops",
    ]
    (tmp_path / "ops").mkdir()
    path = tmp_path / "ops" / "registry.py"
    path.write_text("from sparseops import _native\nfrom sparseops.ops.nm24_linear import nm24_linear\n")
    assert list(wrong_imports(path)) == [
        "registry.py:1 imports sparseops",
        "registry.py:2 imports sparseops.ops.nm24_linear",
    ]


@pytest.mark.parametrize("path", PYTHON_FILES, ids=names)
def test_only_env_reads_the_environment(path):
    if layer_of(path) == "env":
        return
    for node in ast.walk(ast.parse(path.read_text())):
        is_environment = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")
        assert not is_environment, f"{path}:{node.lineno} reads the environment"


def includes_of(path):
    """(header, line), a header below csrc written as a path from csrc, another beside the file by name."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        found = re.match(r'\s*#\s*include\s+(?:"([^"]+)"|<([^>]+)>)', line)
        if not found:
            continue
        quoted, system = found.groups()
        if quoted is None:
            yield system, number
            continue
        for base in (path.parent, CSRC):
            if (base / quoted).exists():
                header = (base / quoted).resolve()
                root = CSRC if CSRC in header.parents else path.parent
                yield header.relative_to(root).as_posix(), number
                break
        else:
            yield quoted, number


def wrong_includes(path, root, table):
    name = path.relative_to(root).as_posix()
    allowed = next((allowed for kind, allowed in table if re.fullmatch(kind, name)), None)
    if allowed is None:
        yield f"{name} is of no known kind"
        return
    for header, line in includes_of(path):
        is_standard = re.fullmatch(r"[a-z_0-9]+", header)
        if FRAMEWORK.match(header) or not (is_standard or any(re.fullmatch(a, header) for a in allowed)):
            yield f"{name}:{line} includes {header}"


@pytest.mark.parametrize("path", SOURCE_FILES, ids=names)
def test_includes(path):
    assert not list(wrong_includes(path, CSRC, SOURCES))


@pytest.mark.parametrize("path", EMULATION_FILES, ids=names)
def test_includes_of_the_emulator(path):
    beside = [re.escape(file.name) for file in EMULATION_FILES if file.suffix == ".h"]
    table = [(kind, allowed + beside) for kind, allowed in EMULATION_SOURCES]
    assert not list(wrong_includes(path, EMULATION, table))


@pytest.mark.parametrize("path", SOURCE_FILES, ids=names)
def test_assembly_is_in_the_instruction_wrappers_only(path):
    if path.parent.name == "cuda" and re.fullmatch(r"(ptx|wgmma).*\.cuh", path.name):
        return
    assert not re.search(r"\basm\b", path.read_text())


def test_a_wrong_include_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "CSRC", tmp_path)
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "tile.cuh").touch()
    path = tmp_path / "cpu" / "nm24_linear.cpp"
    path.write_text(
        '#include <vector>\n#include <torch/extension.h>\n#  include "../cuda/tile.cuh"\n#include <c10/x>'
    )
    assert list(wrong_includes(path, tmp_path, SOURCES)) == [
        "cpu/nm24_linear.cpp:2 includes torch/extension.h",
        "cpu/nm24_linear.cpp:3 includes cuda/tile.cuh",
        "cpu/nm24_linear.cpp:4 includes c10/x",
    ]
    path = tmp_path / "cuda" / "nm24_linear.cuh"
    path.write_text('#include "ptx_emulation.h"')
    assert list(wrong_includes(path, tmp_path, SOURCES)) == [
        "cuda/nm24_linear.cuh:1 includes ptx_emulation.h"
    ]
    path = tmp_path / "block.cpp"
    path.write_text('#include "cuda/tile.cuh"\n#include <link.h>')
    assert list(wrong_includes(path, tmp_path, EMULATION_SOURCES)) == ["block.cpp:1 includes cuda/tile.cuh"]


def test_tests_and_examples_do_not_import_one_another():
    for pattern in ("tests/test_*.py", "examples/*.py"):
        files = sorted(ROOT.glob(pattern))
        beside = {path.stem for path in files}
        for path in files:
            for module, line in imports_of(path):
                assert module.split(".")[0] not in beside, f"{path}:{line} imports {module}"
