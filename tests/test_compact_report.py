"""The report of a compaction, and the costs it counts."""

import io
import json

import pytest
import torch
from pruned import drop, randomise
from torch import nn

import sparseops
from sparseops.compact import CompactReport, compact, cost, explain_compact
from sparseops.compact.report import Code, EdgeRow, LayerRow


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    model = nn.Sequential(
        drop(nn.Conv2d(3, 16, 3, padding=1), range(8, 16)), nn.ReLU(), nn.Conv2d(16, 4, 3, padding=1)
    )
    return compact(randomise(model), torch.randn(2, 3, 8, 8, dtype=torch.float64))


def test_rows(small):
    report = explain_compact(small)
    first, last = report.layers
    assert first == LayerRow("0", "Conv2d", Code.COMPACTED, (3, 3), (16, 8), (8 * 27 * 128, 8 * 27 * 128), "")
    assert (last.code, last.inputs, last.outputs) == (Code.COMPACTED, (16, 8), (4, 4))
    folded = int(last.reason.split()[0])
    assert last.reason == f"{folded} constant inputs folded into it"
    # the constants are a convolution of one picture with one channel
    assert last.macs == (4 * 16 * 9 * 128, 4 * 8 * 9 * 128 + 4 * 9 * 64)
    assert report.edges == (
        EdgeRow("0", "2", Code.COMPACTED, (16, 8), ""),
        EdgeRow("2", "(output)", Code.WHOLE, (4, 4), "the model returns it"),
    )
    assert report["0"] is first
    with pytest.raises(KeyError):
        report["1"]
    with pytest.raises(KeyError):
        report.edge("0", "1")


def test_totals(small):
    report = explain_compact(small)
    parameters = 8 * 27 + 16 + 4 * 16 * 9 + 4
    assert report.before == cost.Totals(parameters, (8 * 27 + 4 * 16 * 9) * 128, (16 * 2 + 4) * 128 * 8)
    assert report.after.parameters == sum(p.numel() for p in small.parameters())
    assert report.after.macs == (8 * 27 + 4 * 8 * 9) * 128 + 4 * 9 * 64
    # beside the activations the constants' one picture, and their sum
    assert report.after.activations == (8 * 2 + 4) * 128 * 8 + (1 + 4) * 64 * 8


def test_text(small):
    text = str(explain_compact(small))
    assert text.startswith(
        "Sequential: 1 of 2 edges compacted, 0 with channels that stay\nparameters 812 → 552"
    )
    assert "16 → 8" in text
    lines = text.splitlines()
    assert any(
        line.split() == ["2", "(output)", "whole", "4", "the", "model", "returns", "it"] for line in lines
    )
    assert repr(explain_compact(small)).startswith("<CompactReport: 1 of 2 edges compacted")


def test_print(small, capsys):
    explain_compact(small).print()
    assert capsys.readouterr().out.split() == str(explain_compact(small)).split()


def test_names_that_look_like_markup():
    row = LayerRow("a[red]", "Odd[b]", Code.KEPT, (1, 1), (2, 2), (3, 3), "why [bold]")
    report = CompactReport([row], [EdgeRow("a[red]", "", Code.KEPT, (2, 2), "[i]")], model="M[x]")
    for text in ("a[red]", "Odd[b]", "why [bold]", "[i]", "M[x]", "(model)"):
        assert text in str(report)


def test_json(small):
    report = explain_compact(small)
    data = json.loads(report.to_json())
    assert data["layers"][0]["code"] == "compacted"
    assert data["edges"][1] == {
        "producer": "2",
        "consumer": "(output)",
        "code": "whole",
        "channels": [4, 4],
        "reason": "the model returns it",
    }
    assert data["total"]["before"]["macs"] == report.before.macs
    assert json.loads(CompactReport([], reason="x").to_json())["total"] == {"before": None, "after": None}


def test_explain_still_works():
    model = sparseops.convert(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)),
        sparseops.Channels(0.5),
    )
    small = compact(model, torch.randn(2, 64))
    report = sparseops.explain(small)
    assert [row.shape for row in report] == [(32, 64), (32, 32), (8, 32)]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # one place: a wide layer that computes an eighth
        ({"inputs": 1024, "outputs": 1024, "cols": 128, "rows": 128, "taps": 1}, (True, True)),
        # reads all, so there is nothing to gather
        ({"inputs": 1024, "outputs": 1024, "cols": 1024, "rows": 128, "taps": 1}, (False, True)),
        # all but one: multiplying by zeros is cheaper than moving
        ({"inputs": 64, "outputs": 64, "cols": 63, "rows": 63, "taps": 1}, (False, False)),
        # the same on a GPU, whose kernel does not move anything twice
        ({"inputs": 64, "outputs": 64, "cols": 63, "rows": 63, "taps": 1, "fused": True}, (True, True)),
        # few outputs of many inputs: gathering costs more than it saves, scattering does not
        ({"inputs": 64, "outputs": 4096, "cols": 56, "rows": 8, "taps": 1}, (False, True)),
    ],
)
def test_gather_and_scatter(sizes, expected):
    shape = cost.Shape(**{"places_in": 64, "places_out": 64, "itemsize": 4, "fused": False, **sizes})
    assert cost.gather_and_scatter(shape) == expected


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_bar_in_a_terminal(monkeypatch):
    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr("sys.stderr", stream)
        compact(nn.Sequential(drop(nn.Linear(16, 16), range(8)), nn.Linear(16, 4)), torch.randn(2, 16))
        assert ("compacting" in stream.getvalue()) == shown
