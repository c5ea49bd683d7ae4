"""The benchmarks of pruned channels: layers, whole networks, and the staircase."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.append(
    str(Path(__file__).resolve().parent.parent)
)  # behind everything else, as in test_benchmarks.py

from benchmarks import channel_nets, compare, results, run, staircase, table  # noqa: E402
from benchmarks.shapes import CHANNEL_WORKS, Conv, Linear, Pruned, Work  # noqa: E402
from sparseops.ops import REGISTRY  # noqa: E402

LAYERS = (Pruned(Conv(1, 32, 6, 16), 16, 8), Pruned(Linear(3, 64, 32), 64, 16))
TINY = tuple(Work(layer, "none", torch.float32, 0.001, 1000.0) for layer in LAYERS)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "SHORTEST_SAMPLE_MS", 0.01)


def test_works_ask_what_is_asked() -> None:
    asked = {round(w.layer.kept_macs, 4): w.at_least for w in CHANNEL_WORKS}
    assert asked[0.25] == 3.2 and asked[0.5] == 1.8
    assert set(asked) == {0.5625, 0.25, 0.0625, 0.5}
    assert {w.op for w in CHANNEL_WORKS} == {"channel_conv", "channel_linear"}
    assert len({(w.op, w.name) for w in CHANNEL_WORKS}) == len(CHANNEL_WORKS)
    assert all(w.layer.kept_inputs % 8 == w.layer.kept_outputs % 8 == 0 for w in CHANNEL_WORKS)


def test_kept_blocks_are_whole_and_anywhere() -> None:
    kept = compare.kept_blocks(64, 32, 8, torch.Generator().manual_seed(0))
    assert kept.view(4, 8).diff().eq(1).all() and kept[::8].remainder(8).eq(0).all()
    assert kept.diff().gt(0).all() and not torch.equal(kept, torch.arange(32))
    for total, count in ((64, 12), (60, 8), (64, 0), (64, 72)):
        with pytest.raises(ValueError, match="kept must be blocks of 8"):
            compare.kept_blocks(total, count, 8)


@pytest.mark.parametrize("work", TINY, ids=lambda work: work.op)
def test_contenders_are_dense_sparse_and_what_is_left(work: Work) -> None:
    calls = compare.contenders(work)
    for side in {key[1] for key in calls}:
        dense, sparse, compact = (calls[name, side]() for name in ("dense", "sparse", "compact"))
        kept = [o for o in range(sparse.shape[1]) if sparse[:, o].any()]
        assert dense.shape == sparse.shape and len(kept) == work.layer.kept_outputs
        torch.testing.assert_close(sparse[:, kept], compact, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(dense[:, kept], compact) or work.layer.kept_inputs == work.layer.inputs


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    op = REGISTRY["channel_conv"]
    monkeypatch.setitem(REGISTRY, "channel_conv", replace(op, fn=lambda *a, **k: op.fn(*a, **k) + 1))
    with pytest.raises(compare.WrongResult, match="channel_conv .* elements are off"):
        compare.compare(TINY[0], rounds=1)


def test_rows_know_ideal_and_tax_and_survive_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "WORKS", TINY)
    assert run.main(["--op", "channel_conv", "--rounds", "2", "--csv", str(tmp_path)]) == 0
    (row,) = results.read(tmp_path)
    assert isinstance(row, results.ChannelRow) and row.work == "3x3 1x32@6->16, kept 16->8"
    assert row.ideal == 4 and row.compact_ms is not None
    assert row.tax == pytest.approx(row.sparse_ms / row.compact_ms - 1)
    output = capsys.readouterr().out
    assert "4.00" in output and "tax: what gather and scatter add" in output
    text = table.markdown([row])
    assert "| convolution 3x3 1x32@6→16, kept 16→8 |" in text and "| ideal |" in text
    assert "| work |" not in text


def test_whole_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--small", "--net", "resnet50", "--batch", "2", "--ratio", "0.5", "--rounds", "2"]
    assert channel_nets.main([*options, "--csv", str(tmp_path)]) == 0
    rows = {row.work.rpartition(", ")[2]: row for row in results.read(tmp_path)}
    assert list(rows) == ["converted", "compacted", "together"]
    assert all(row.op == "channel_network" for row in rows.values())
    shares = [row.kept_macs for row in rows.values()]
    assert shares == sorted(shares, reverse=True) and rows["converted"].tax is None
    assert rows["compacted"].at_least == pytest.approx(0.9 * rows["compacted"].ideal, abs=0.02)
    assert "resnet50 2x3x32x32, kept 50%, compacted" in capsys.readouterr().out


def test_a_wrong_network_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        channel_nets, "compact", lambda model, x: channel_nets.NETWORKS["vgg16"].small(seed=1)
    )
    options = ["--small", "--net", "vgg16", "--batch", "1", "--ratio", "0.5", "--rounds", "1"]
    assert channel_nets.main(options) == 1
    assert "compacted: off by" in capsys.readouterr().out


def test_macs_are_counted() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(128, 5)
    )
    assert channel_nets.macs(model, torch.randn(2, 3, 4, 4)) == 2 * (16 * 8 * 27 + 128 * 5)


def test_staircase_measures_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "stairs.png"
    options = ["--channels", "16", "--lowest", "7", "--side", "5", "--rounds", "2", "--plot", str(picture)]
    assert staircase.main(options) == 0
    with picture.with_suffix(".csv").open() as stream:
        lines = list(csv.DictReader(stream))
    assert [int(line["width"]) for line in lines] == list(range(16, 6, -1))
    assert all(float(line["ms"]) > 0 and line["machine"] and line["torch"] for line in lines)
    assert picture.stat().st_size > 10_000 and "widths between multiples of 8" in capsys.readouterr().out
    call = staircase.calls(16, 5, [8])[8, "NCHW"]
    assert call().shape == (1, 8, 5, 5) and call.func is F.conv2d
