"""What a run on a GPU goes through and leaves behind: processes that die or hang, files, summary, page."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import program
from gpu_rows import a_row

TREE = Path(__file__).resolve().parent.parent
sys.path.append(str(TREE))  # behind everything else, as in test_benchmarks.py

from benchmarks import (  # noqa: E402
    gpu_machine,
    gpu_results,
    gpu_run,
    gpu_shapes,
    gpu_small_set,
    gpu_summary,
    gpu_table,
    gpu_tests,
    gpu_time,
    output,
    results,
)
from benchmarks.gpu_results import Ceiling, GpuRow, OpTests, Power, PowerReading, Stage  # noqa: E402
from sparseops.ops import REGISTRY, dispatch  # noqa: E402

TINY = gpu_shapes.tiny_works("nm24_linear")[0]
CPU = torch.device("cpu")


# ---- processes


def crash(contender: str, work: gpu_shapes.GpuWork = TINY, plan: str = "") -> gpu_run.Crash:
    return gpu_run.Crash(work.op, work.name, work.tag, contender, plan, "it died")


def test_who_died_is_not_tried_again(tmp_path: Path) -> None:
    other = gpu_shapes.tiny_works("nm24_linear")[1]
    once = gpu_run.Journal(tmp_path / "now", [crash("cusparselt")])
    assert once.verdict(TINY, "cusparselt") == "failed: it died"
    assert once.verdict(other, "cusparselt") is None and once.verdict(TINY, "cublas") is None
    twice = gpu_run.Journal(tmp_path / "now", [crash("cusparselt"), crash("cusparselt", other)])
    third = gpu_shapes.tiny_works("nm24_linear")[2]
    assert twice.verdict(third, "cusparselt") == "not run: it took the process with it twice"
    ours = gpu_run.Journal(tmp_path / "now", [crash("sparseops"), crash("sparseops", other, "large/1")])
    assert ours.verdict(third, "sparseops") is None
    assert ours.verdict(other, "sparseops", "large/1") and not ours.verdict(other, "sparseops", "small/1")


def test_rows_after_a_crash(tmp_path: Path) -> None:
    for culprit, victims in (("cublas", {"cublas"}), ("timing", {"cublas", "sparseops"})):
        journal = gpu_run.Journal(tmp_path / "now", [crash(culprit)])
        with torch.no_grad():
            measured = gpu_run.Bench(gpu_time.CpuClock(), journal, dry_run=True).run(TINY)
            rows = {row.contender: row for row in measured}
        assert {name for name, row in rows.items() if "it died" in row.status} == victims
        assert rows["cublas"].ms is None and rows["sparseops"].ratio is None


def test_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def watched(target: Callable, argument: object, seconds: float) -> str | None:
        process = gpu_run.FORK.Process(target=target, args=(argument,))
        process.start()
        answer = gpu_run.watch(process, tmp_path / "now", time.time() + seconds)
        assert not process.is_alive()
        return answer

    assert watched(time.sleep, 0, 20) is None
    assert watched(os._exit, 7, 20) == "the process died with status 7"
    assert watched(lambda signal: os.kill(os.getpid(), signal), 9, 20) == "the process died with status -9"
    assert watched(time.sleep, 60, 0.3) == "cut"
    monkeypatch.setattr(gpu_run, "HUNG_SECONDS", 0.3)
    assert watched(time.sleep, 60, 20) == "hung for 0.3 s"


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> tuple[list, list]:
    """The journals that children are started with; a list takes what each of them does and how it ends."""
    started: list[gpu_run.Journal] = []
    deeds: list[tuple[Callable[[gpu_run.Journal], None], str | None]] = []

    class Process:
        def __init__(self, target: Callable, args: tuple) -> None:
            assert target is gpu_run.child
            started.append(args[-1])

        def start(self) -> None:
            deeds[len(started) - 1][0](started[-1])

    monkeypatch.setattr(gpu_run, "FORK", SimpleNamespace(Process=Process))
    monkeypatch.setattr(gpu_run, "watch", lambda *_: deeds[len(started) - 1][1])
    return started, deeds


def test_a_process_that_dies_is_started_again_behind_what_it_died_of(
    tmp_path: Path, children: tuple[list, list]
) -> None:
    started, deeds = children
    deeds += [
        (lambda journal: journal.at(TINY, "cusparselt"), "the process died with status -11"),
        (lambda journal: journal.at(TINY, "sparseops", "large/2", "an illegal memory access"), "status 70"),
        (lambda journal: None, None),
    ]
    crashes = gpu_run.supervise("nm24_linear", tmp_path, time.time() + 60, dry_run=True)
    assert [(c.contender, c.plan, c.how) for c in crashes] == [
        ("cusparselt", "", "the process died with status -11"),
        ("sparseops", "large/2", "an illegal memory access"),
    ]
    assert len(started) == 3 and started[0].verdict(TINY, "cusparselt") is None
    assert started[2].verdict(TINY, "cusparselt") and started[2].verdict(TINY, "sparseops", "large/2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["cut", "the process died with status 1"])
def test_a_process_that_is_cut_or_cannot_begin_is_not_started_again(
    tmp_path: Path, children: tuple[list, list], how: str
) -> None:
    started, deeds = children
    deeds.append((lambda journal: None, how))
    assert gpu_run.supervise("nm24_linear", tmp_path, time.time() + 60, dry_run=True) == []
    assert len(started) == 1


def test_works_that_have_rows_are_not_done_again_and_time_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = gpu_run.Journal(tmp_path / "now")
    works = gpu_shapes.tiny_works("nm24_linear")
    done: list[str] = []

    def fake(bench: gpu_run.Bench, work: gpu_shapes.GpuWork) -> list[GpuRow]:
        done.append(work.name + work.tag)
        monkeypatch.setattr(gpu_run, "LONGEST_WORK_SECONDS", 0)
        return [replace(a_row(), work=work.name, dtype=work.tag)]

    monkeypatch.setattr(gpu_run.Bench, "run", fake)
    gpu_results.append(tmp_path / "layers.csv", [replace(a_row(), work=works[0].name, dtype=works[0].tag)])
    gpu_run.child("nm24_linear", tmp_path, time.time() + 60, True, False, journal)
    assert done == [work.name + work.tag for work in works[1:]]
    (tmp_path / "layers.csv").unlink()
    monkeypatch.setattr(gpu_run, "LONGEST_WORK_SECONDS", 5)
    gpu_run.child("nm24_linear", tmp_path, time.time() + 4, True, False, journal)
    assert f"out of time before {works[0].name}" in capsys.readouterr().out


def test_gpu_run_says_what_came_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def supervise(op: str, folder: Path, *_: object) -> None:
        row = a_row(work=TINY.name, dtype=TINY.tag)
        rows = [row, replace(row, plan="large/1", picked=0, status="wrong: all", ms=None)]
        gpu_results.append(folder / "layers.csv", [*rows, replace(row, op="nm24_conv", status="failed: x")])

    monkeypatch.setattr(gpu_run, "supervise", supervise)
    assert gpu_run.main(["nm24_linear", "--out", str(tmp_path), "--dry-run"]) == 1
    output = capsys.readouterr().out
    assert "large/1: wrong: all" in output and "1 of 4 works, 1 wrong or failed of 2 calls of ours" in output


# ---- files


def test_rows_survive_the_file_and_a_line_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "a gpu" / "layers.csv"
    rows = [a_row(), a_row(status='failed: "a", b', rounds=None, ms=None, ratio=None, sm_mhz=None)]
    gpu_results.append(file, rows[:1])
    gpu_results.append(file, rows[1:])
    assert gpu_results.read(GpuRow, file) == rows
    whole = file.read_text()
    file.write_text(whole + whole.splitlines()[1][:40])
    assert gpu_results.read(GpuRow, file) == rows
    assert gpu_results.read(GpuRow, tmp_path / "none.csv") == []
    assert results.read(tmp_path) == []  # the CPU's tables pass over it


@pytest.mark.parametrize(
    ("capability", "name"),
    [((8, 0), "8.0"), ((8, 6), "8.6"), ((9, 0), "9.0a"), ((10, 0), "10.0a"), ((12, 0), "12.0")],
)
def test_a_gpu_names_its_architecture(capability: tuple[int, int], name: str) -> None:
    assert gpu_machine.arch(capability) == name


def test_nvidia_smi_is_asked_and_may_be_missing_or_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    program(tmp_path, "nvidia-smi", 'echo "$*" >&2; echo "1980, 580.1"')
    assert gpu_machine.smi("clocks.sm", "driver_version") == ["1980", "580.1"]
    program(tmp_path, "nvidia-smi", "echo 1755")
    assert gpu_machine.sm_mhz() == 1755
    program(tmp_path, "nvidia-smi", "echo '[N/A]'")
    assert gpu_machine.sm_mhz() is None
    program(tmp_path, "nvidia-smi", "echo 'No devices were found'; exit 6")
    assert gpu_machine.smi("clocks.sm") == [""]
    (tmp_path / "nvidia-smi").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_machine.smi("clocks.sm", "driver_version") == ["", ""]


def test_commit_is_given_or_gits_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMIT", "0123456789-dirty")
    assert gpu_machine.commit() == "0123456789-dirty"
    monkeypatch.delenv("COMMIT")
    monkeypatch.setattr(gpu_machine.provenance, "commit", lambda: "")
    assert gpu_machine.commit() == "unknown"


LOG = """
tests/test_ops.py::test_cuda[nm24_linear-tail f16] PASSED                [ 10%]
tests/test_ops.py::test_cuda[nm24_linear_i8-tail] FAILED                 [ 20%]
tests/test_ops.py::test_cuda[nm24_linear_i8-tail] ERROR                  [ 20%]
tests/test_ops.py::test_cuda[nm24_conv-x] SKIPPED (no memory)            [ 30%]
tests/test_graphs.py::test_capture PASSED                                [ 40%]
tests/test_ops.py::test_cuda[nm24_conv-y]"""


def test_tests_are_counted_by_op_also_when_cut_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_tests.count(LOG) == [
        OpTests("nm24_conv", 0, 0, 1),
        OpTests("nm24_linear", 1, 0, 0),
        OpTests("nm24_linear_i8", 0, 1, 0),
        OpTests("other", 1, 0, 0),
    ]
    (tmp_path / "log").write_text(LOG)
    assert gpu_tests.main([str(tmp_path / "log"), str(tmp_path)]) == 1
    assert capsys.readouterr().out == "2 passed, 1 failed, 1 skipped\n"
    assert gpu_results.read(OpTests, tmp_path / "tests.csv") == gpu_tests.count(LOG)
    (tmp_path / "log").write_text(LOG.replace("FAILED", "PASSED").replace("ERROR", "PASSED"))
    assert gpu_tests.main([str(tmp_path / "log"), str(tmp_path)]) == 0
    (tmp_path / "log").write_text("")
    assert gpu_tests.main([str(tmp_path / "log"), str(tmp_path)]) == 1


def test_small_set_tells_right_from_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    op = REGISTRY["nm24_linear"]
    few = tuple(case for case in op.cases if case.name in ("tail", "gt_tile"))
    for name in list(REGISTRY):
        monkeypatch.delitem(REGISTRY, name)
    monkeypatch.setitem(REGISTRY, "nm24_linear", replace(op, cases=few))
    assert gpu_small_set.main(["--dry-run"]) == 0
    assert "4 of 4 cases ran a kernel, 0 wrong" in capsys.readouterr().out
    monkeypatch.setitem(
        REGISTRY, "nm24_linear", replace(op, cases=few, fn=lambda *a, **k: op.fn(*a, **k) + 1)
    )
    assert gpu_small_set.main(["--dry-run"]) == 1
    assert "4 wrong" in capsys.readouterr().out
    assert gpu_small_set.main(["--dry-run", "--until", "1"]) == 1  # nothing ran


# ---- the summary


def work_rows(work: gpu_shapes.GpuWork) -> list[GpuRow]:
    common = {"op": work.op, "work": work.name, "dtype": work.tag, "source": work.source}
    dense = gpu_results.BASELINES[work.op]
    return [
        a_row(**common, contender=dense, plan="", picked=0, ms=0.75, ratio=1.0),
        a_row(**common),
        a_row(**common, plan="large/1", picked=0, ms=0.25, ratio=3.0),
        a_row(**common, plan="small/1", picked=0, ms=None, status="wrong: 7 of 9 elements are off"),
        *(
            a_row(**common, contender=name, plan="", picked=0, ms=None, ratio=ratio, status=status)
            for name, ratio, status in (
                ("cusparselt", 1.25, "ok"),
                ("cusparselt, searched", None, "failed: RuntimeError: " + 40 * "no such thing "),
                ("torch cutlass", None, "failed: x"),
            )
        ),
    ]


@pytest.fixture
def whole_run(tmp_path: Path) -> Path:
    """A run in which everything was measured and most went wrong."""
    facts = {
        "machine": "NVIDIA H999",
        "driver": "1",
        "commit": "abc",
        "date": "2999-01-01T00:00Z",
        "cuda": "13",
    }
    (tmp_path / "environment.json").write_text(json.dumps(facts))
    stages = [Stage(f"stage {i}", "failed", 100, "what it said " * 20) for i in range(16)]
    gpu_results.append(tmp_path / "stages.csv", stages)
    gpu_results.append(tmp_path / "tests.csv", [OpTests(op, 10, 1, 0) for op in REGISTRY])
    alone = [Ceiling(form, 128, 256, 2, 0, 144.0, 144.0, 0, 0.89, 0.89, 0.89) for form in ("SS", "RS")]
    gpu_results.append(tmp_path / "ceilings.csv", alone)
    power = Power("cublas", "", "short", 6, 1.4, 785.0, 1890, None, None, None, 0.77)
    gpu_results.append(tmp_path / "power.csv", [power])
    gpu_results.append(tmp_path / "power_log.csv", [PowerReading("cublas", 0.1, 1980, 300.0, 5.0, "0x0")])
    works = [work for make in gpu_shapes.WORKS.values() for work in make()]
    gpu_results.append(tmp_path / "layers.csv", [row for work in works for row in work_rows(work)])
    return tmp_path


def test_summary_of_a_whole_run_fits(whole_run: Path) -> None:
    lines = gpu_summary.summary(whole_run)
    assert len(lines) <= 66 and max(map(len, lines)) <= 110
    text = "\n".join(lines)
    assert "NVIDIA H999" in lines[0] and "commit abc" in lines[0]
    assert "nm24_linear bf16 squares: 1024 1.50/1.25  2048" in text
    heads = next(line for line in lines if line.startswith("nm24_linear bf16 tokens")).split()
    assert heads[3:] == ["1", "4", "16", "64", "256", "1024", "4096"]
    layer = next(line for line in lines if "4096->14336" in line)
    assert layer.split() == ["4096->14336", *["1.50/1.25"] * 7]
    assert "nm24_linear f16 layers, median: 1 tokens 1.50" in text
    assert "nm24_linear_i8 i8 squares" in text and "nm24_conv f16, batch 1 32 64" in text
    assert "3x3 256@14->256" in text and "3x3 128@56->128 /2" in text
    assert "2.00x nm24_linear 4096x4096->4096 bf16: large/1, not small/4" in text
    assert "wgmma.sp RS, of the peak: 128x256 0.89" in lines and "power: cublas 785 at 1890 MHz" in lines
    assert "wrong: 7 of 9 elements are off" in text and lines[-1].startswith("torch cutlass: ")


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("3x3 32x256@14->512, kept 128->256", 0.25),
        ("3x3 32x256@14->512 /2, kept 256->256", 0.5),
        ("64x4096->14336, kept 2048->14336", 0.5),
    ],
)
def test_kept_share(name: str, share: float) -> None:
    assert gpu_summary.kept_share(name) == share


@pytest.mark.parametrize("op", ["channel_conv", "channel_linear"])
def test_every_channel_work_names_its_share(op: str) -> None:
    for work in (*gpu_shapes.WORKS[op](), *gpu_shapes.tiny_works(op)):
        assert gpu_summary.kept_share(work.name) == work.layer.kept_macs


def test_summary_of_channels_has_ratio_tax_and_what_is_asked(tmp_path: Path) -> None:
    half, other, both = gpu_shapes.tiny_works("channel_conv")
    rows = []
    for work, ms, compact in ((half, 0.5, 0.5), (other, 0.55, 0.5), (both, 0.25, 0.2)):
        common = {"op": work.op, "work": work.name, "dtype": work.tag}
        rows += [
            a_row(**common, contender="cudnn", plan="", picked=0, ms=1.0, ratio=1.0),
            a_row(**common, contender="cudnn, compact", plan="", picked=0, ms=compact, ratio=1 / compact),
            a_row(**common, plan="triton", ms=ms, ratio=1 / ms),
        ]
    gpu_results.append(tmp_path / "layers.csv", rows)
    text = "\n".join(gpu_summary.summary(tmp_path))
    assert "channel_conv at 50% of the products: 1.91 (from 1.82, 2 layers, asked 1.80)" in text
    assert "tax 5.0% (to 10.0%, asked 3%)" in text
    assert "channel_conv at 25% of the products: 4.00 (from 4.00, 1 layers), tax 25.0%" in text


def test_summary_of_a_run_cut_off(tmp_path: Path) -> None:
    assert len(gpu_summary.summary(tmp_path)) == 2
    rows = work_rows(TINY)
    gpu_results.append(
        tmp_path / "layers.csv", [rows[0], replace(rows[1], status="wrong: x", ms=None, ratio=None)]
    )
    text = "\n".join(gpu_summary.summary(tmp_path))
    assert "128->64                     WRONG" in text and "ours, not ok: 1" in text


@pytest.mark.parametrize(
    ("mine", "text"),
    [
        ({}, "1.50/1.25"),
        ({"status": "failed: x", "ratio": None}, "FAILED/1.25"),
        ({"status": "not run: x", "ratio": None}, "-/1.25"),
    ],
)
def test_cell(mine: dict, text: str) -> None:
    rows = work_rows(TINY)
    assert gpu_summary.cell([rows[0], replace(rows[1], **mine), *rows[2:]]) == text
    assert gpu_summary.cell([]) == ""


# ---- the page


def test_page_is_up_to_date() -> None:
    for file, markers, table in gpu_table.pages():
        page = file.read_text()
        assert output.spliced(page, markers, table) == page, "python -m benchmarks.gpu_table --write"
    page = gpu_table.PAGE.read_text()
    assert "<!-- mutants: begin -->" in page and "<!-- mutants: end -->" in page


def test_every_cuda_kernel_is_on_the_page_and_never_run_says_so() -> None:
    text = gpu_table.markdown([])
    for op in REGISTRY.values():
        has_kernel = any(device == "cuda" for device, _ in op.impls)
        assert (f"| {op.name} |" in text) == has_kernel
    for tile in dispatch.MATRIX_TILES:
        assert f"| nm24_linear | {tile} | never run on hardware | | | |" in text
    assert set(gpu_table.TILES) <= set(REGISTRY)


def page_run(*rows: GpuRow, gpu: str = "NVIDIA H999", commit: str = "abc") -> gpu_table.Run:
    tests = {"nm24_linear": OpTests("nm24_linear", 9, 1, 0)}
    return gpu_table.Run(gpu, commit, list(rows), tests)


def test_page_shows_what_ran() -> None:
    rows = [a_row(ratio=ratio) for ratio in (1.0, 1.5, 2.5)]
    rows += [a_row(plan="large/2", picked=0), a_row(plan="few8/1", status="wrong: x", ratio=None)]
    text = gpu_table.markdown([page_run(commit="old"), page_run(*rows), page_run(gpu="NVIDIA A99")])
    line = "| nm24_linear | {} | NVIDIA H999 | `abc` | 9 passed, 1 failed | {} |"
    assert line.format("small", "1.50 (1.00 to 2.50, 3 layers)") in text
    assert line.format("large", "never picked") in text
    assert line.format("few8", "**wrong at 1 of 1 calls**") in text
    assert line.format("few16", "not measured") in text
    assert "| nm24_linear | few8 | NVIDIA A99 | `abc` |" in text and "old" not in text
    assert "| nm24_conv | large | never run on hardware | | | |" in text
    assert "| nm24_linear | sm90_128x256 | NVIDIA A99 | `abc` | 9 passed, 1 failed | not measured |" in text


def test_page_says_what_the_emulator_stands_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_table, "CONFORMANCE", tmp_path)
    assert "stands on documents (cross-checks)" in gpu_table.markdown([])
    (tmp_path / "nvidia-h999.txt").touch()
    assert "recorded: nvidia-h999.txt" in gpu_table.markdown([])


def test_a_run_is_kept(whole_run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("results")
    (whole_run / "log.txt").write_text("long")
    (whole_run / "conformance.txt").write_text("recorded")
    kept = gpu_table.keep(whole_run, root, root)
    assert kept == root / "nvidia-h999" / "29990101T0000Z-abc" and gpu_results.kept_runs(root) == [kept]
    assert not (kept / "log.txt").exists()
    assert (root / "nvidia-h999.txt").read_text() == "recorded"
    loaded = gpu_table.load(kept)
    assert loaded.gpu == "NVIDIA H999" and loaded.tests["nm24_conv"].passed == 10
    assert loaded.rows == gpu_results.read(GpuRow, whole_run / "layers.csv")
    for name in ("ceilings.csv", "power.csv", "power_log.csv"):
        assert (kept / name).read_text() == (whole_run / name).read_text()


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [({"dry_run": True}, "run on a GPU"), ({"commit": "unknown"}, "a known commit"), (None, "run on a GPU")],
)
def test_what_is_no_evidence_is_not_kept(whole_run: Path, changes: dict | None, refusal: str) -> None:
    file = whole_run / "environment.json"
    if changes is None:
        file.unlink()
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=refusal):
        gpu_table.keep(whole_run, whole_run / "kept", whole_run)
