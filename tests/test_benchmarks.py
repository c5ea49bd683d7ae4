"""The benchmarks: that they measure what they say, refuse what is wrong, and write what they measured."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

TREE = Path(__file__).resolve().parent.parent
# Behind everything else, so that an installed sparseops is not shadowed by the one in this tree.
sys.path.append(str(TREE))

from benchmarks import (  # noqa: E402
    compare,
    end_to_end,
    isa,
    memory,
    output,
    overhead,
    plot,
    provenance,
    results,
    run,
    table,
)
from benchmarks.shapes import WORKS, Conv, Linear, Work  # noqa: E402
from sparseops import SparseLinear  # noqa: E402
from sparseops.ops import REGISTRY  # noqa: E402

TINY = (
    Work(Linear(3, 64, 16), "none", torch.float32, 0.001, 1000.0),
    Work(Conv(1, 16, 6, 8), "none", torch.float32, 1000.0, 1000.0),
    Work(Linear(3, 64, 16), "none", torch.bfloat16, 0.001, 0.002, "avx512_bf16"),
)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "WORKS", TINY)
    monkeypatch.setattr(compare, "SHORTEST_SAMPLE_MS", 0.01)


def test_works_are_the_table_of_targets() -> None:
    linear = [w for w in WORKS if w.op == "nm24_linear" and w.tag == "f32"]
    convs = [w for w in WORKS if w.op == "nm24_conv"]
    bf16 = [w for w in WORKS if w.tag == "bf16"]
    assert [w.name for w in linear] == [
        "512x1024->1024",
        "1024x1024->1024",
        "128x768->3072",
        "256x4096->4096",
        "1x4096->4096",
        "8x4096->4096",
    ]
    assert {(w.at_least, w.aim) for w in linear[:4]} == {(1.5, 1.7)}
    assert {(w.at_least, w.aim) for w in linear[4:]} == {(1.5, 1.8)}
    assert len(convs) == 11 and {(w.at_least, w.aim) for w in convs} == {(1.25, 1.5)}
    assert "3x3 8x512@28->512" in [w.name for w in convs] and convs[-1].name == "1x1 1x256@14->1024"
    assert [w.name for w in bf16] == [w.name for w in linear[:4]]
    assert {(w.at_least, w.aim, w.isa) for w in bf16} == {(1.2, 1.5, "avx512_bf16")}
    assert len(WORKS) == 21 and all(w.source for w in WORKS)


def test_flops_count_multiplications_and_additions() -> None:
    assert Linear(2, 3, 5).flops == 2 * 2 * 3 * 5
    assert Conv(2, 3, 4, 5, kernel=3).flops == 2 * (2 * 4 * 4) * (3 * 9) * 5


def test_alternate_takes_turns_and_fills_short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "SHORTEST_SAMPLE_MS", 8.0)
    calls: list[str] = []
    clock = [0.0]
    monkeypatch.setattr(compare, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def call(name: str, seconds: float) -> Callable[[], Tensor]:
        def record() -> Tensor:
            calls.append(name)
            clock[0] += seconds
            return torch.empty(0)

        return record

    samples = compare.alternate({"short": call("s", 0.003), "long": call("l", 0.02)}, rounds=3)
    assert (
        "".join(calls) == "ss" + "ll" + "sssl" * 3
    )  # each once to warm up and once to see how long it takes
    assert samples["short"] == pytest.approx([3.0] * 3) and samples["long"] == pytest.approx([20.0] * 3)


def test_times_are_quantiles() -> None:
    found = compare.times("NCHW", [float(n) for n in range(11)])
    assert (found.p20, found.p50, found.p80) == (2.0, 5.0, 8.0)
    assert compare.times("", [3.0]) == compare.Times("", 3.0, 3.0, 3.0)


@pytest.mark.parametrize("work", TINY[:2], ids=lambda work: work.op)
def test_compare_names_the_formats(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "SHORTEST_SAMPLE_MS", 0.01)
    found = compare.compare(work, rounds=3)
    formats = {""} if work.op == "nm24_linear" else {"NCHW", "channels_last"}
    assert {found.dense.memory_format, found.sparse.memory_format} <= formats
    assert found.ratio == pytest.approx(found.dense.p50 / found.sparse.p50)


def _break(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    op = REGISTRY[name]

    def wrong(*args: object, **kwargs: object) -> Tensor:
        y = op.fn(*args, **kwargs).clone()
        y.flatten()[-1] += 1
        return y

    monkeypatch.setitem(REGISTRY, name, replace(op, fn=wrong))


@pytest.mark.parametrize("work", TINY[:2], ids=lambda work: work.op)
def test_compare_refuses_a_wrong_result(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, work.op)
    with pytest.raises(compare.WrongResult, match=f"{work.op} .*1 of .* elements are off"):
        compare.compare(work, rounds=1)


def test_run_prints_and_writes(tiny_works: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--threads", "1", "--rounds", "2", "--csv", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "3x64->16" in output and "3x3 1x16@6->8" in output and "threads: 1" in output
    if not isa.reaches("avx512_bf16"):
        assert "not run: needs avx512_bf16" in output
    folder = tmp_path / provenance.folder_name(provenance.machine())
    with (folder / "nm24_conv.csv").open() as stream:
        (line,) = csv.DictReader(stream)
    for name, value in {
        "machine": provenance.machine(),
        "isa": isa.current(),
        "commit": provenance.commit(),
        "torch": torch.__version__,
        "op": "nm24_conv",
        "work": "3x3 1x16@6->8",
        "dtype": "f32",
        "threads": "1",
        "rounds": "2",
        "at_least": "1000.0",
    }.items():
        assert line[name] == value
    assert line["date"].endswith("Z") and line["sparseops"]
    ratio = float(line["dense_ms"]) / float(line["sparse_ms"])
    assert float(line["ratio"]) == pytest.approx(ratio, rel=0.05)


def test_run_does_not_time_a_wrong_result(
    tiny_works: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _break(monkeypatch, "nm24_conv")
    assert run.main(["--dtype", "f32", "--rounds", "1", "--csv", str(tmp_path)]) == 1
    assert "WRONG RESULT, not timed" in capsys.readouterr().out
    assert [row.op for row in results.read(tmp_path)] == ["nm24_linear"]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--op", "nm24_conv"], ["3x3 1x16@6->8"]),
        (["--dtype", "bf16"], ["3x64->16"]),
        (["--work", "@6"], ["3x3 1x16@6->8"]),
        (["--op", "nm24_linear", "--work", "@6"], []),
    ],
)
def test_run_options_choose(tiny_works: None, options: list[str], names: list[str]) -> None:
    assert [work.name for work in run.chosen(run.parser().parse_args(options))] == names


def test_run_isa_is_used(tiny_works: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = isa.current()
    try:
        assert (
            run.main(["--isa", "portable", "--op", "nm24_linear", "--rounds", "1", "--csv", str(tmp_path)])
            == 0
        )
        assert {row.isa for row in results.read(tmp_path)} == {"portable"}
    finally:
        isa.use(before)


@pytest.fixture
def row() -> results.Row:
    found = compare.Comparison(
        compare.Times("NCHW", 2.9, 3.0, 3.1), compare.Times("channels_last", 1.9, 2.0, 2.1)
    )
    return results.new_row(
        "nm24_conv", "a->b", "f32", found, threads=1, rounds=9, at_least=1.25, aim=1.6, flops=6_000_000
    )


def test_row_derives_ratio_and_gflops(row: results.Row) -> None:
    assert (row.ratio, row.dense_gflops, row.sparse_gflops) == (1.5, 2.0, 3.0)
    verdicts = [replace(row, ratio=ratio).verdict for ratio in (1.2, 1.25, 1.6)]
    assert verdicts == ["below", "at least", "aim"]
    assert replace(row, aim=None, ratio=9.0).verdict == "at least"


def test_results_survive_the_file(row: results.Row, tmp_path: Path) -> None:
    rows = [row, replace(row, op="end_to_end", aim=None, dense_gflops=None, sparse_gflops=None)]
    files = results.append(rows, tmp_path)
    assert [file.name for file in files] == ["nm24_conv.csv", "end_to_end.csv"]
    results.append([replace(row, ratio=1.7, date="2999-01-01T00:00Z")], tmp_path)
    found = results.read(tmp_path)
    assert sorted(found[:2], key=lambda r: r.op) == rows[::-1]
    newest = {r.op: r for r in results.newest(found)}
    assert len(newest) == 2 and newest["nm24_conv"].ratio == 1.7


def test_commit_is_dirty_when_code_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    monkeypatch.setattr(provenance, "TREE", tmp_path)
    assert provenance.commit() == ""
    (tmp_path / "README.md").write_text("a")
    (tmp_path / "code.py").write_text("a")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = provenance.commit()
    assert len(clean) == 10
    (tmp_path / "README.md").write_text("b")
    (tmp_path / "new.py").write_text("b")
    assert provenance.commit() == clean
    (tmp_path / "code.py").write_text("b")
    assert provenance.commit() == f"{clean}-dirty"


def test_folder_name_is_plain() -> None:
    assert provenance.folder_name("AMD EPYC 9R14 (family 25, model 17), 2 cores") == (
        "amd-epyc-9r14-family-25-model-17-2-cores"
    )


def test_table_is_markdown(row: results.Row) -> None:
    end_to_end_row = replace(row, op="end_to_end", work="HED", aim=None)
    text = table.markdown([row, end_to_end_row])
    assert text.count("| work |") == 1  # one setting, one table
    assert "| convolution a→b | f32 | 3 | 2 | **1.50** | 1.25 | 1.60 | at least |" in text
    assert text.index("whole model: HED") < text.index("convolution a→b")
    assert f"1 thread; torch {torch.__version__}; commit `{row.commit}`" in text
    assert table.markdown([row, replace(row, threads=2)]).count("| work |") == 2


def test_table_is_spliced_between_the_markers() -> None:
    page = "before\n<!-- results: begin -->\n{}<!-- results: end -->\nafter\n"
    assert output.spliced(page.format("old\n"), "results", "new\n") == page.format("new\n")
    for broken in ("no markers", "<!-- results: begin -->", "<!-- other: begin --><!-- other: end -->"):
        with pytest.raises(ValueError, match="the page must hold <!-- results: begin -->"):
            output.spliced(broken, "results", "new\n")


@pytest.mark.parametrize("page", ["README.md", table.PAGE])
def test_pages_show_what_was_measured(page: str) -> None:
    _, _, after = (TREE / page).read_text().partition("<!-- results: begin -->")
    shown = after.partition("<!-- results: end -->")[0].strip()
    rows = results.newest(results.read())
    if page == "README.md":
        rows = [row for row in rows if row.work in table.HEADLINES]
    assert shown == table.markdown(rows).strip()


def test_every_headline_was_measured() -> None:
    assert table.HEADLINES - {row.work for row in results.read()} == set()


def test_plot_draws(row: results.Row, tmp_path: Path) -> None:
    results.append([row, replace(row, threads=2, aim=None)], tmp_path)
    picture = tmp_path / "picture.png"
    assert plot.main(["--csv", str(tmp_path), "--out", str(picture)]) == 0
    assert picture.stat().st_size > 10_000


def test_plot_without_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plot.main(["--csv", str(tmp_path)]) == 1
    assert "--csv must hold results, got none" in capsys.readouterr().err


def test_overhead_measures_every_way() -> None:
    found = overhead.measure(count=3, samples=2)
    assert list(found) == ["F.linear", "nm24_linear", "nm24_linear through the dispatcher"]
    assert all(set(times) == set(overhead.MODES) and min(times.values()) > 0 for times in found.values())


def test_overhead_calls_agree() -> None:
    dense, fast, dispatched = (call() for call in overhead.calls().values())
    torch.testing.assert_close(fast, dense)
    assert torch.equal(fast, dispatched)


def test_held_bytes_sees_a_hidden_copy() -> None:
    layer = nn.Linear(64, 32, bias=False)
    assert memory.held_bytes(layer) == 64 * 32 * 4
    layer.cache = {"packed": [torch.zeros(10)], "view": layer.weight[0]}  # type: ignore[assignment]
    assert memory.held_bytes(layer) == 64 * 32 * 4 + 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_layer_keeps_to_its_memory(dtype: torch.dtype) -> None:
    dense = nn.Linear(512, 256, dtype=dtype)
    sparse = SparseLinear.from_dense(dense, prune="magnitude")
    with torch.inference_mode():
        sparse(torch.randn(3, 512, dtype=dtype))
    assert memory.held_bytes(sparse) <= memory.AT_MOST * memory.held_bytes(dense)


def test_end_to_end_without_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> Path:
        raise end_to_end.demo.DemoError("demo: no weights")

    monkeypatch.setattr(end_to_end.demo, "weights_file", missing)
    assert end_to_end.main(["--photos", "1", "--size", "32"]) == 1
    assert "demo: no weights" in capsys.readouterr().err


def test_pytest_benchmarks_run_only_when_asked() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    asked = [*command, "benchmarks", "-k", "test_case and (relu or nm24_to_dense)", "--benchmark-disable"]
    answer = subprocess.run(asked, cwd=TREE, capture_output=True, text=True)
    assert answer.returncode == 0 and " passed" in answer.stdout, answer.stdout + answer.stderr
    config = (TREE / "pyproject.toml").read_text()
    assert 'testpaths = ["tests"]' in config
