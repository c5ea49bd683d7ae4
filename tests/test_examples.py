"""Code that people copy: the README's example and the scripts under examples/ run and do what they say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from sparseops import SparseLinear

TREE = Path(__file__).resolve().parent.parent


def code_blocks(page: str, language: str) -> list[str]:
    """The code blocks of a Markdown page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (TREE / page).read_text(), re.MULTILINE | re.DOTALL)


def load(script: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, TREE / "examples" / script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_example(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = code_blocks("README.md", "python")
    assert len(example.strip().splitlines()) <= 11
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    sparse, dense, x, y = (names[name] for name in ("sparse", "dense", "x", "y"))
    assert isinstance(sparse, nn.Module) and isinstance(dense, nn.Module)
    assert not any(isinstance(module, SparseLinear) for module in dense.modules())
    with torch.inference_mode():
        torch.testing.assert_close(y, dense(x), rtol=1e-4, atol=1e-4)
    output = capsys.readouterr().out
    assert "1024x4096" in output or "4096x1024" in output


def test_prune_and_convert(capsys: pytest.CaptureFixture[str]) -> None:
    example = load("prune_and_convert.py")
    found = example.main(["--steps", "60"])
    assert list(found) == ["dense", "2:4, one shot", "2:4, fine-tuned", "2:4, loaded again"]
    assert found["2:4, loaded again"] == found["2:4, fine-tuned"]
    # Always guessing a space is right for about a fifth of the characters.
    assert found["dense"] > 0.25 and found["2:4, fine-tuned"] > 0.25
    output = capsys.readouterr().out
    assert "3 of 4 layers sparse" in output and "2:4, fine-tuned" in output


@pytest.mark.parametrize("script", sorted(file.name for file in (TREE / "examples").glob("*.py")))
def test_every_example_has_a_test(script: str) -> None:
    assert f'load("{script}")' in Path(__file__).read_text()
