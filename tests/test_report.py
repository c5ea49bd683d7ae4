"""The report: what it says before and after a conversion, its table, its JSON, its picture."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import sparseops
from sparseops import _native
from sparseops.formats import NM24
from sparseops.report import Code, Report, Row


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3), nn.Flatten(), nn.Linear(64, 16))


def rows():
    """One row of each sort, with round numbers."""
    base = Row(
        "a", "Linear", (64, 64), "nm24", "avx2", Code.CONVERTED, "pruned by magnitude", 0.875, 16384, 9216
    )
    return [
        replace(base, ms_before=2.0, ms_after=1.0),
        replace(base, name="b.c", energy_kept=1.0),
        Row("d", "Conv2d", (8, 16, 3, 3), "", "", Code.SLOWER, "0.83x", None, 4608, 4608, 1.0, 1.25),
        Row("", "Odd[red]", (8, 3), "", "", Code.TOO_SMALL, "why [bold]", None, 96, 96),
    ]


def test_report_of_a_converted_model(model):
    report = sparseops.explain(sparseops.convert(model))
    packed = NM24.from_dense(model[1].weight, prune="magnitude")
    row = report["1"]
    assert (row.name, row.kind, row.shape, row.format) == ("1", "Conv2d", (32, 16, 3, 3), "nm24")
    assert (row.code, row.energy_kept) == (Code.CONVERTED, packed.energy_kept)
    assert (row.bytes_before, row.bytes_after) == (32 * 16 * 9 * 4, packed.nbytes)
    assert row.ms_before is row.ms_after is row.speedup is None
    assert [r.name for r in report] == ["0", "1", "3"]
    assert len(report) == 3
    assert report[0] is report["0"]
    assert report.bytes_before == sum(p.nbytes for p in model.parameters() if p.dim() > 1)
    with pytest.raises(KeyError):
        report["2"]


def test_kernel_is_the_one_in_use(model):
    report = sparseops.explain(sparseops.convert(model))
    expected = _native.C.cpu_isa() if _native.C else f"reference: {_native.error}"
    assert report["1"].kernel == expected


def test_explain_before_convert_changes_nothing_and_foretells(model):
    before = {name: (id(p), p._version) for name, p in model.named_parameters()}
    told = sparseops.explain(model)
    assert {name: (id(p), p._version) for name, p in model.named_parameters()} == before
    assert all(type(layer) in (nn.Conv2d, nn.Linear, nn.Flatten) for layer in model)
    done = sparseops.explain(sparseops.convert(model))
    assert [replace(row, code=Code.CONVERTED) for row in told if row.code is Code.ELIGIBLE] == list(
        done.sparse_rows
    )
    assert told["0"] == done["0"]


def test_explain_speaks_of_the_model_as_it_is_now(model):
    sparse = sparseops.convert(model, exclude="1")
    assert sparseops.explain(sparse)["1"].code is Code.EXCLUDED
    nn.utils.parametrizations.weight_norm(sparse[1])
    assert sparseops.explain(sparse)["1"].code is Code.PARAMETRIZED
    sparse[1] = nn.Conv2d(16, 8, 3)
    assert sparseops.explain(sparse)["1"].code is Code.ELIGIBLE
    sparse[3] = nn.Linear(64, 16)
    assert sparseops.explain(sparse)["3"].code is Code.ELIGIBLE
    sparse[3] = nn.Linear(8, 8)
    assert sparseops.explain(sparse)["3"].code is Code.TOO_SMALL
    part = sparseops.explain(sparseops.convert(model)[3])
    assert part[""].code is Code.ALREADY_SPARSE
    assert part[""].energy_kept is None


def test_parts_that_were_converted_by_themselves_are_remembered(model):
    whole = nn.Sequential(sparseops.convert(model, exclude="3"), sparseops.convert(nn.Linear(64, 64)))
    part = sparseops.explain(whole[0])
    report = sparseops.explain(whole)
    assert [row.name for row in report] == ["0.0", "0.1", "0.3", "1"]
    for row in part:
        assert report[f"0.{row.name}"] == replace(row, name=f"0.{row.name}")
    assert report["1"].code is Code.CONVERTED
    more = sparseops.explain(sparseops.convert(whole))
    assert more["0.1"].code is Code.ALREADY_SPARSE
    assert more["0.1"].energy_kept == part["1"].energy_kept
    assert more["0.3"].code is Code.CONVERTED, "the outermost report is the newest"


def test_explain_after_a_cast_tells_the_new_kernel(model):
    sparse = sparseops.convert(model).double()
    assert sparseops.explain(sparse)["1"].kernel == "reference: there is no kernel for torch.float64"


def test_totals():
    report = Report(rows(), model="Net", threads=2, torch="9.9")
    assert len(report.sparse_rows) == 2
    assert (report.bytes_before, report.bytes_after) == (2 * 16384 + 4608 + 96, 2 * 9216 + 4608 + 96)
    assert (report.ms_before, report.ms_after) == (3.0, 2.0), "a layer that was slower runs dense"
    assert report.speedup == 1.5
    assert (report["a"].speedup, report["d"].speedup, report["b.c"].speedup) == (2.0, 0.8, None)
    empty = Report([])
    assert (len(empty), empty.ms_before, empty.ms_after, empty.speedup, empty.bytes_before) == (
        0,
        None,
        None,
        None,
        0,
    )


def test_table():
    text = str(Report(rows(), model="Net", threads=2, torch="9.9"))
    lines = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    assert lines[0] == ["Net, pattern 2:4: 2 of 4 layers sparse (times: 2 threads, torch 9.9)"]
    header = next(line for line in lines if line[0] == "layer")
    assert header == "layer kind weight code kernel energy bytes ms speed-up reason".split()
    assert [
        "a", "Linear", "64x64", "converted", "avx2", "87.5%", "16.0 KiB → 9.0 KiB", "2 → 1", "2.00x",
        "pruned by magnitude",
    ] in lines  # fmt: skip
    assert ["d", "Conv2d", "8x16x3x3", "slower", "4.5 KiB", "1 → 1.25", "0.80x", "0.83x"] in lines
    assert ["(model)", "Odd[red]", "8x3", "too_small", "96 B", "why [bold]"] in lines
    assert lines[-1] == ["total", "36.6 KiB → 22.6 KiB", "3 → 2", "1.50x"] or lines[-2][0] == "total"
    assert "\x1b" not in text


def test_table_without_times_has_no_time_columns():
    text = str(Report([replace(row, ms_before=None, ms_after=None) for row in rows()], model="Net"))
    assert "speed-up" not in text
    assert "threads" not in text.splitlines()[0]


def test_print(capsys, tmp_path):
    report = Report(rows(), model="Net", threads=1, torch="9.9")
    report.print()
    assert capsys.readouterr().out.rstrip() == str(report)
    with open(tmp_path / "report.txt", "w", encoding="utf-8") as file:
        report.print(file)
    assert (tmp_path / "report.txt").read_text(encoding="utf-8").rstrip() == str(report)
    assert "1 thread," in str(report)


def test_json_round_trip():
    report = Report(rows(), model="Net", threads=2, torch="9.9")
    data = json.loads(report.to_json())
    assert data["layers"][0] == {
        "name": "a",
        "kind": "Linear",
        "shape": [64, 64],
        "format": "nm24",
        "kernel": "avx2",
        "code": "converted",
        "reason": "pruned by magnitude",
        "energy_kept": 0.875,
        "bytes_before": 16384,
        "bytes_after": 9216,
        "ms_before": 2.0,
        "ms_after": 1.0,
        "speedup": 2.0,
    }
    assert data["total"]["speedup"] == 1.5
    assert data["total"]["sparse"] == 2
    assert (data["model"], data["pattern"], data["threads"], data["torch"]) == ("Net", "2:4", 2, "9.9")
    again = Report.from_json(report.to_json())
    assert again == report
    assert again[0].code is Code.CONVERTED
    assert Report.from_json(Report([]).to_json()) == Report([])
    assert again != Report(rows()[:2], model="Net", threads=2, torch="9.9")


def test_json_of_numbers_that_json_does_not_have():
    text = Report([replace(rows()[0], energy_kept=math.nan, ms_before=math.inf)]).to_json()
    layer = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["layers"][0]
    assert layer["energy_kept"] is None


def test_json_with_an_unknown_code_is_refused():
    text = Report(rows()).to_json().replace('"converted"', '"conjured"')
    with pytest.raises(ValueError, match=r"Code: value must be one of converted, .*, got 'conjured'"):
        Report.from_json(text)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_plot_draws_the_times(tmp_path, ending):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"report.{ending}"
    Report(rows(), model="Net", threads=2, torch="9.9").plot(path)
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[ending]
    assert path.read_bytes().startswith(start)
    if ending == "svg":
        text = path.read_text(encoding="utf-8")
        for words in ("<!-- a -->", "<!-- d -->", "ms (2 threads)", "Net: 2 of 4 layers sparse, 1.50x"):
            assert words in text
        assert "<!-- b.c -->" not in text, "a layer that was not measured has no time to draw"


def test_plot_draws_bytes_when_nothing_was_measured(tmp_path, model):
    pytest.importorskip("matplotlib")
    path = tmp_path / "report.svg"
    sparseops.explain(sparseops.convert(model)).plot(str(path))
    text = path.read_text(encoding="utf-8")
    assert "MiB of weight" in text
    for name in ("0", "1", "3"):
        assert f"<!-- {name} -->" in text


def test_plot_of_an_empty_report_is_refused(tmp_path):
    with pytest.raises(ValueError, match="plot: report must have at least one layer, got none"):
        Report([]).plot(tmp_path / "x.png")


def test_import_stays_light():
    code = (
        "import sys, torch; before = set(sys.modules); import sparseops; new = set(sys.modules) - before;"
        "heavy = {n for n in new if n.partition('.')[0] in ('rich', 'matplotlib', 'h5py', 'skimage')};"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
