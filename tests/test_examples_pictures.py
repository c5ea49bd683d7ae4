"""The examples on photographs, faces and slices of a brain run, and find what they say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from example_scripts import load, needs_file
from support.packages import NIFTI

from sparseops import demo


def test_detect_edges(capsys: pytest.CaptureFixture[str]) -> None:
    needs_file(demo.WEIGHTS_PACKAGE, demo.WEIGHTS_FILE)
    pytest.importorskip("skimage", reason="the photographs are scikit-image's")
    found = load("detect_edges.py").main(["--quick"])
    assert list(found) == ["dense", "l1", "wanda", "sparsegpt", "wanda, channels permuted"]
    assert found["dense"] == 1.0
    assert 0.8 < found["l1"] < found["wanda"] < found["sparsegpt"] < 1
    assert found["wanda"] < found["wanda, channels permuted"] < 1
    assert "3 of 3 layers permuted" in capsys.readouterr().out


def test_generate_faces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs_file("gan-face-generate", "gan_face_generate/weights.tar")
    picture, file = tmp_path / "faces.png", tmp_path / "results.json"
    found = load("generate_faces.py").main(["--quick", "--picture", str(picture), "--json", str(file)])
    assert found["dense"] == math.inf
    assert 15 < found["2:4, one-shot"] < found["2:4, retrained"]
    assert found["2:4, one-shot"] < found["unstructured, one-shot"] < found["unstructured, retrained"]
    assert found["2:4, retrained, MB, compressed"] < 0.65 * found["dense, MB, compressed"]
    rows = json.loads(file.read_text())["rows"]
    assert len({row["size"] for row in rows}) == 1
    assert all(0.49 < row["kept"] < 0.51 for row in rows[1:])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "0 of 5 layers sparse" in capsys.readouterr().out


def test_segment_brain(tmp_path: Path) -> None:
    for part in ("t1", "gm", "wm"):
        needs_file("nilearn", NIFTI.format(part))
    picture, file = tmp_path / "brain.png", tmp_path / "results.json"
    found = load("segment_brain.py").main(["--quick", "--picture", str(picture), "--json", str(file)])
    assert found["dense"] > 0.85
    assert min(found["2:4, retrained"], found["2:4, distilled"]) > found["dense"] - 0.05
    # dropping channels at once leaves nothing
    assert found["channels, one-shot"] < 0.5
    assert found["channels, retrained"] > found["channels, one-shot"] + 0.3
    kept = {row["name"]: row["kept"] for row in json.loads(file.read_text())["rows"]}
    assert 0.5 < kept["2:4, retrained"] < 0.6 and kept["channels, retrained"] < 0.4
    assert picture.read_bytes().startswith(b"\x89PNG")
