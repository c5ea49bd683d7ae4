"""tests/emulation/mutate.py: what it changes, and that what it excuses is still there. Running it takes
minutes a kernel; docs/kernels.md says what came of that."""

import importlib.util
import sys
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def mutate():
    path = TREE / "tests" / "emulation" / "mutate.py"
    spec = importlib.util.spec_from_file_location("emulation_mutate", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_kernel_is_mutated(mutate):
    kernels = {path.stem for path in (TREE / "csrc" / "cuda").glob("nm24_*.cuh")}
    assert set(mutate.FILES) == kernels
    assert all((TREE / "tests" / "emulation" / f"{kernel}_test.cpp").exists() for kernel in kernels)


def test_a_mutant_changes_one_token(mutate):
    mutants = mutate.mutants_of("mainloop")
    lines = mutate.source(TREE, "mainloop").read_text().splitlines()
    assert len(mutants) > 200
    for mutant in mutants:
        changed = mutant.apply(lines).splitlines()
        different = [number for number, (a, b) in enumerate(zip(lines, changed, strict=True)) if a != b]
        assert different == [mutant.line]
        assert not lines[mutant.line].strip().startswith("//")
    assert any(mutant.token == "__syncthreads();" for mutant in mutants)


def test_what_is_excused_is_still_there(mutate):
    files = [file for files in mutate.FILES.values() for file in files]
    mutants = [mutant for file in files for mutant in mutate.mutants_of(file)]
    known = mutate.known_equivalent()
    assert known
    for record, reason in known.items():
        assert reason and any(mutate.is_equivalent(mutant, {record: reason}) for mutant in mutants), record


def test_counts_go_into_the_page(mutate, tmp_path, monkeypatch):
    page = tmp_path / "kernels.md"
    page.write_text(f"before\n{mutate.BEGIN}\n{mutate.END}\nafter\n")
    monkeypatch.setattr(mutate, "PAGE", page)
    mutants = mutate.mutants_of("nm24_conv")[:4]
    verdicts = ["plain", "race", "survived", "does not compile"]
    tally = mutate.tally("nm24_conv", 4, list(zip(mutants, verdicts, strict=True)))
    assert tally.survivors == [mutants[2]] and tally.share == pytest.approx(2 / 3)
    mutate.write_page(tally)
    mutate.write_page(mutate.Tally("nm24_linear", "abc", 9, 2, 0, {"plain": 2, "asan": 0, "race": 0}, []))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    conv = f"| nm24_conv | `{mutate.commit()}` | 4 | 3 | 1 | 0 | 1 | 0 | 1 | 66.7% |"
    assert text.index("| nm24_linear | `abc` | 9 | 2 |") < text.index(conv)
